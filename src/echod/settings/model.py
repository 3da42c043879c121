"""The settings: frozen models, from which help, reference page and validation are derived."""

# Annotations are not deferred here: Pydantic would have to evaluate each of them again at every start.

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic.functional_validators import ModelWrapValidatorHandler

from echod.net import addresses
from echod.settings.conflicts import Conflict, in_table, raise_all, repeated
from echod.settings.types import (
    ADMIN_FORMS,
    Address,
    Addresses,
    AdminAddress,
    AnyCase,
    BurstLength,
    Count,
    FileName,
    Key,
    Location,
    Networks,
    Number,
    Permissions,
    PortRanges,
    PositiveSeconds,
    Probability,
    Seconds,
    Size,
    Text,
    Trigger,
    Workers,
    is_utf8,
    port_range,
    split,
)
from echod.text import hint

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_LOOPBACK = ("127.0.0.0/8", "::1/128")
_SOCKET_MODE = "0660"

# Ports of services that answer any datagram, such as echo, chargen, daytime, DNS and NFS: CVE-1999-0103, CVE-2024-2169.
_REFUSED_PORTS = ("0-1023", "2049")

# Actions of a fault that need a connection.
_STREAM_ACTIONS = frozenset({"raise", "close", "reset", "half_close", "stall"})


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LimitsSettings(_Section):
    """Limits and timeouts of clients."""

    max_connections: Count = Field(
        10_000,
        description="Maximum number of clients per listener. At this number, the listener stops accepting and new "
        "clients wait in the backlog.",
    )
    max_connections_per_client: Number = Field(
        0,
        description="Maximum number of clients per listener from one IPv4 address or one IPv6 /64 network. Further "
        "clients are closed at once. Behind a proxy, the address in the PROXY header counts. 0: no limit.",
    )
    backlog: Count = Field(
        4096,
        description="Maximum number of connections waiting to be accepted, per listening socket. The kernel caps it "
        "at net.core.somaxconn.",
    )
    idle_timeout: Seconds = Field(
        0.0, description="Close a client after this many seconds without a byte in either direction. 0: never."
    )
    write_timeout: PositiveSeconds = Field(
        30.0,
        description="Reset a client that takes none of its echo for this many seconds while reading from it is paused.",
    )
    handshake_timeout: PositiveSeconds = Field(
        10.0,
        description="Close a client that has not completed its PROXY header and its TLS handshake after this many seconds.",
    )
    write_buffer: Size = Field(
        ByteSize(64 * 1024),
        description="High-water mark of each client's write buffer. Above it, reading from the client pauses.",
    )
    max_line: Size = Field(
        ByteSize(64 * 1024),
        description="Maximum length of a line in mode line, including its line ending. A client that sends a longer "
        "line is closed.",
    )
    datagram_rate: Number = Field(
        1000,
        description="UDP: maximum rate in datagrams per second from one IPv4 address or one IPv6 /64 network, per listener. "
        "Datagrams above it are refused, which ends every faster loop between two echo services. 0: no limit.",
    )
    datagram_burst: Count = Field(
        200, description="UDP: burst allowance of datagram_rate: the datagrams that may arrive at once after a silence."
    )
    datagram_total_rate: Number = Field(
        0,
        description="UDP: maximum rate in datagrams per second from all addresses together, per listener. Its burst "
        "allowance is a fifth of a second. 0: no limit.",
    )
    max_flows: Count = Field(
        10_000,
        description="UDP: maximum number of flows per listener. A further flow takes the place of one that has been silent.",
    )
    flow_timeout: PositiveSeconds = Field(
        60.0, description="UDP: end a flow after this many seconds without a datagram, and write its line to the log."
    )

    @cached_property
    def high_water_mark(self) -> int:
        """The write buffer as an integer that all sessions share, and that compares faster."""
        return int(self.write_buffer)


class ShutdownSettings(_Section):
    """The phases of a graceful stop."""

    delay: Seconds = Field(
        0.0,
        description="Keep accepting new clients for this many seconds after the signal. This gives load balancers "
        "time to stop sending them.",
    )
    quiet_period: Seconds = Field(
        2.0,
        description="During the drain, close a client that is silent for this many seconds and has all of its echo.",
    )
    drain_timeout: Seconds = Field(
        7.0, description="Give the other clients this many seconds to finish. Then close them after their echo."
    )
    linger_timeout: Seconds = Field(
        1.0,
        description="Seconds without progress after our FIN until a connection is closed. During a drain, also the "
        "time from drain_timeout to the end of the drain.",
    )


class LogSettings(_Section):
    """Level, format and destination of the log."""

    level: Annotated[Literal["debug", "info", "warning", "error"], AnyCase] = Field(
        "info", description="Lowest level that is logged."
    )
    format: Annotated[Literal["auto", "console", "json", "logfmt"], AnyCase] = Field(
        "auto", description="Format of a line. auto: console on a terminal, otherwise json."
    )
    file: FileName = Field(
        "-", description='File to append lines to. "-": standard error. "/dev/stdout": standard output.'
    )
    connections: Annotated[Literal["all", "nonempty", "failed", "none"], AnyCase] = Field(
        "nonempty",
        description="Closed connections that are logged. nonempty: those that sent a byte. failed: those that did not "
        "end well.",
    )


class AdminSettings(_Section):
    """Metrics, status and probes over HTTP."""

    address: AdminAddress = Field(
        "",
        description=f"Address of the HTTP server: {ADMIN_FORMS}. Every client that can connect can read everything, so "
        "use loopback or a private network. Empty: no HTTP server.",
    )


class FaultSettings(_Section):
    """A named fault. A listener uses it if its key `fault` has that name."""

    trigger: Trigger | None = Field(
        None,
        description="Condition: the message equals this text. In mode line, a message is a line with its line ending. "
        "In mode stream, it is the data of one read, so TCP may split or join the client's writes.",
    )
    after_bytes: Size | None = Field(None, description="Condition: earlier messages contain at least this many bytes.")
    after_seconds: Seconds | None = Field(
        None,
        description="Condition: this many seconds have passed since the connection opened, or since the end of its handshake.",
    )
    probability: Probability | None = Field(None, description="Condition: the probability that a message matches.")
    burst: BurstLength | None = Field(
        None,
        description="Mean number of messages in a row that match, as in the model of Gilbert and Elliott. The share of all "
        "messages that match stays probability. Without it, each message is independent of the others.",
    )
    seed: Number | None = Field(
        None, description="Random seed. Set it to make runs repeatable. Without it, each run differs."
    )
    action: (
        Annotated[
            Literal[
                "raise",
                "close",
                "reset",
                "half_close",
                "stall",
                "blackhole",
                "corrupt",
                "duplicate",
                "truncate",
                "drop",
            ],
            AnyCase,
        ]
        | None
    ) = Field(
        None,
        description="raise: raise an exception in the client's session, which closes it. close: close after the echo so "
        "far. reset: send RST. half_close: send FIN after the echo so far, and read on. stall: stop reading. "
        "blackhole: read on, and echo nothing. corrupt: flip one bit of the message. duplicate: echo the message twice. "
        "truncate: echo only its first half. drop: do not echo the datagram; on UDP only.",
    )
    delay: Seconds = Field(0.0, description="Delay the echo of each message by this many seconds.")
    jitter: Seconds = Field(0.0, description="Vary the delay by up to this many seconds in either direction.")
    reorder: bool = Field(
        default=False,
        description="On UDP only: let the jitter change the order of datagrams.",
    )
    rate: Size | None = Field(None, description="Maximum rate of the echo in bytes per second.")
    slice: Size | None = Field(
        None, description="Maximum number of bytes that are sent at once. Longer echo is sent in pieces."
    )

    @cached_property
    def trigger_bytes(self) -> bytes | None:
        """The message that triggers the fault."""
        return None if self.trigger is None else self.trigger.encode()

    @property
    def ends_echo(self) -> bool:
        """Whether the client gets no more echo after the action."""
        return self.action not in {None, "corrupt", "duplicate", "truncate", "drop"}

    @property
    def shapes(self) -> bool:
        """Whether echo is delayed, slowed or sliced."""
        return bool(self.delay or self.rate or self.slice)

    @property
    def fires_at_once(self) -> bool:
        """Whether the first message meets all conditions."""
        return self.trigger is None and not (self.after_bytes or self.after_seconds) and self.probability in {None, 1}

    def conflicts(self) -> Iterator[Conflict]:
        """Yield the keys that have no effect together with the others."""
        if self.action is None and not self.shapes:
            message = "is missing: without action, delay, rate or slice, a fault does nothing"
            yield in_table("action", message, "delay", "rate", "slice")
        if self.jitter > self.delay:
            yield in_table("jitter", "varies the delay, so it cannot be greater than delay", "delay")
        if self.reorder and not self.jitter:
            yield in_table("reorder", "has no effect without jitter: equal delays keep the order", "jitter")
        if self.burst is not None and self.probability in {None, 1}:
            message = "has no effect without a probability below 1: every message matches"
            yield in_table("burst", message, "probability")
        elif self.burst is not None and self.probability is not None:
            # Between two bursts there is at least one message that does not match.
            shortest = self.probability / (1 - self.probability)
            if self.burst < shortest:
                message = f"is too short for probability = {self.probability:g}: set it to at least {shortest:.4g}"
                yield in_table("burst", message, "probability")
        if self.seed is not None and self.probability is None and not self.jitter and self.action != "corrupt":
            message = "has no effect without probability, jitter or action = 'corrupt': nothing else is random"
            yield in_table("seed", message, "probability", "jitter", "action")
        if self.shapes and self.ends_echo and self.fires_at_once:
            message = (
                "ends the echo at the first message, so no echo is left to delay, slow or slice: set trigger, "
                "after_bytes, after_seconds or probability, or remove delay, rate and slice"
            )
            yield in_table("action", message, "trigger", "after_bytes", "after_seconds", "probability")


class TlsSettings(_Section):
    """TLS of a listener."""

    certificate: FileName = Field(
        description="PEM file with the server's certificate, followed by the intermediate certificates."
    )
    private_key: FileName = Field(description="PEM file with the certificate's private key, not encrypted.")
    client_ca: Text = Field(
        "",
        description="PEM file with certificate authorities, or intermediates. Each client must present a certificate "
        "signed by one of them. Empty: no client certificates.",
    )
    minimum_version: Literal["1.2", "1.3"] = Field("1.2", description="Lowest version of TLS.")


class ListenerSettings(_Section):
    """A named listener with settings of its own."""

    address: Address = Field(description=f"Address to listen on: {addresses.FORMS}.")
    mode: Annotated[Literal["stream", "line", "info"], AnyCase] = Field(
        "stream",
        description="stream: echo every byte at once. line: echo whole lines, and an unfinished line at the end. info: "
        "send one JSON object that describes the connection, then close.",
    )
    proxy_protocol: Annotated[Literal["off", "require"], AnyCase] = Field(
        "off", description="require: every client starts with a PROXY header of version 1 or 2."
    )
    proxy_trusted: Networks = Field(
        _LOOPBACK,
        description="Networks that may send the PROXY header. Clients from other networks are closed before a byte is "
        "read. A unix socket is protected by the permissions of its file instead.",
    )
    socket_mode: Permissions = Field(_SOCKET_MODE, description="Permissions of a unix socket's file, in octal.")
    allow: Networks = Field(
        (),
        description="Networks that may use the listener. A client from another network is closed before a byte is read, "
        "and its datagrams are refused. With a PROXY header, the client that it names counts. Empty: everyone.",
    )
    refuse_ports: PortRanges = Field(
        _REFUSED_PORTS,
        description="UDP: source ports whose datagrams are refused, as numbers and ranges. Services on these ports would "
        "answer the echo, which could loop. Empty: none.",
    )
    fault: str = Field("", description="Name of the listener's fault. Empty: none.")
    tls: TlsSettings | None = Field(None, description="TLS: a table, [listeners.NAME.tls]. Without it, TLS is off.")

    @cached_property
    def parsed_address(self) -> addresses.Address:
        """The address to listen on, as a value."""
        return addresses.parse(self.address)

    @cached_property
    def trusted_networks(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """The networks that may send the PROXY header."""
        return tuple(map(addresses.network, self.proxy_trusted))

    @cached_property
    def allowed_networks(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """The networks that may use the listener. Empty: all."""
        return tuple(map(addresses.network, self.allow))

    @cached_property
    def refused_ports(self) -> frozenset[int]:
        """The source ports whose datagrams are refused."""
        return frozenset(port for text in self.refuse_ports for port in port_range(text))

    @property
    def is_datagram(self) -> bool:
        """Whether the listener is one of UDP."""
        return self.address.startswith("udp:")

    @property
    def is_open_reflector(self) -> bool:
        """Whether hosts elsewhere may send datagrams under another host's address, which then gets the echo.

        An inherited socket counts, as its address is not known before the start.
        """
        if not self.is_datagram or self.allow:
            return False
        address = self.parsed_address
        return not (isinstance(address, addresses.UdpAddress) and _is_loopback(address.host))

    @property
    def permissions(self) -> int:
        """The permissions of a unix socket's file."""
        return int(self.socket_mode, 8)

    def conflicts(self) -> Iterator[Conflict]:
        """Yield the keys that have no effect together with the others. Defaults are accepted: `echod config` prints them."""
        if self.proxy_trusted != _LOOPBACK and self.proxy_protocol == "off":
            yield in_table("proxy_trusted", "has no effect without proxy_protocol = 'require'", "proxy_protocol")
        if self.socket_mode != _SOCKET_MODE and not re.match("unix:[^@]", self.address):
            yield in_table("socket_mode", "has no effect on this address: only unix:PATH has a file", "address")
        if self.allow and self.address.startswith("unix:") and self.proxy_protocol == "off":
            message = "has no effect on a unix socket, whose clients have no IP address: set socket_mode"
            yield in_table("allow", message, "address", "proxy_protocol")
        if self.is_datagram:
            if self.mode != "stream":
                message = f"{self.mode!r} needs a stream: on UDP, each datagram is echoed as it is; remove it or listen on TCP"
                yield in_table("mode", message, "address")
            if self.proxy_protocol == "require":
                message = "has no effect on UDP: datagrams have no PROXY header; remove it or listen on TCP"
                yield in_table("proxy_protocol", message, "address")
            if self.tls is not None:
                yield in_table("tls", "needs a stream, and echod has no DTLS: remove it or listen on TCP", "address")
        elif self.refuse_ports != _REFUSED_PORTS:
            yield in_table("refuse_ports", "has no effect on this address: it is for datagrams, on udp:", "address")

    def conflicts_with_fault(self, fault: FaultSettings) -> Iterator[str]:
        """Yield the reasons why this listener cannot show the fault."""
        if self.is_datagram:
            if fault.action in _STREAM_ACTIONS:
                yield f"has action = {fault.action!r}, which needs a connection: on UDP, choose drop or blackhole"
            if fault.slice is not None:
                yield "has slice, which divides a stream: on UDP, choose truncate or rate"
            return
        if fault.action == "drop":
            yield "has action = 'drop', and a stream has no datagrams to lose: choose blackhole or truncate"
        if fault.reorder:
            yield "has reorder, and a stream keeps its order: use it on UDP"
        if self.mode == "info":
            yield "has no effect in mode info, which does not echo: choose stream or line"
            return
        if self.mode == "line" and fault.trigger is not None and fault.trigger.find("\n") != len(fault.trigger) - 1:
            yield "never fires: in mode line, its trigger must be one line with a line feed at its end"
        if fault.action == "reset" and self.address.startswith("unix:"):
            yield "has action = 'reset', and a unix socket cannot send RST: choose close"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or none for all addresses
        return host in {"localhost", "localhost."}


ONE_PROCESS = "a UDP listener needs a single process: set workers to 1, or run another daemon for UDP"


class Settings(_Section):
    """All settings of the daemon."""

    loop: Annotated[Literal["auto", "uvloop", "asyncio"], AnyCase] = Field(
        "auto", description="Event loop. auto: uvloop if it is installed, otherwise asyncio."
    )
    workers: Workers = Field(
        1,
        description="Number of processes that serve clients. auto: one for each CPU that the process may use. From 2 on, "
        "another process supervises them, and the listeners' limits apply to all of them together.",
    )
    listen: Addresses = Field(
        ("127.0.0.1:8000",),
        description=f"Addresses to listen on: {addresses.FORMS}. Port 0 takes a free port. The default applies only if "
        "no listener has a table.",
    )
    limits: LimitsSettings = Field(LimitsSettings(), description="Limits and timeouts of clients.")
    shutdown: ShutdownSettings = Field(ShutdownSettings(), description="The phases of a graceful stop.")
    log: LogSettings = Field(LogSettings(), description="Level, format and destination of the log.")
    admin: AdminSettings = Field(AdminSettings(), description="Metrics, status and probes over HTTP.")
    faults: dict[Text, FaultSettings] = Field({}, description="Named faults: a table for each, [faults.NAME].")
    listeners: dict[Text, ListenerSettings] = Field(
        {},
        description="Listeners with settings of their own, in addition to listen: a table for each, [listeners.NAME].",
    )

    def all_listeners(self) -> dict[str, ListenerSettings]:
        """Return every listener by name. The name of a listener from `listen` is its address."""
        return {text: ListenerSettings(address=text) for text in self.listen} | self.listeners

    @model_validator(mode="wrap")
    @classmethod
    def _validate_all(cls, values: Any, handler: ModelWrapValidatorHandler["Settings"]) -> "Settings":
        """Report the conflicts between valid values even if other values are invalid."""
        if values.get("listeners"):
            values = {"listen": (), **values}
        errors: list[ErrorDetails] = []
        wrong: set[Location] = set()
        try:
            settings = handler(values)
        except ValidationError as error:
            errors = error.errors()
            wrong = {details["loc"] for details in errors}
            settings = handler(_valid_part(values, wrong))
        conflicts = (conflict for conflict in settings.conflicts() if not conflict.is_consequence(wrong))
        raise_all(cls.__name__, conflicts, errors)
        return settings

    def conflicts(self) -> Iterator[Conflict]:
        """Yield all conflicts between settings."""
        if not (self.listen or self.listeners):
            message = "there is no address to listen on: add one here or in a table [listeners.NAME]"
            yield Conflict(("listen",), message, (("listen",), ("listeners",)))
        for name, fault in self.faults.items():
            yield from (conflict.within("faults", name) for conflict in fault.conflicts())
        places: list[tuple[Location, str]] = [(("listen", index), text) for index, text in enumerate(self.listen)]
        places += [(("listeners", name, "address"), listener.address) for name, listener in self.listeners.items()]
        if self.workers != 1:
            udp = (key for key, text in places if text.startswith("udp:"))
            yield from (Conflict(key, ONE_PROCESS, (("workers",), ("listen",), ("listeners",))) for key in udp)
        places.append((("admin", "address"), self.admin.address))
        yield from repeated((key, text) for key, text in places if text)
        taken = dict.fromkeys(self.listen, "this name belongs to an address in listen: choose another name")
        if self.admin.address:
            taken["admin"] = "this name belongs to admin.address: choose another name"
        for name, listener in self.listeners.items():
            if name in taken:
                yield Conflict(("listeners", name), taken[name])
            yield from (conflict.within("listeners", name) for conflict in listener.conflicts())
            if listener.fault in self.faults:
                reasons = listener.conflicts_with_fault(self.faults[listener.fault])
                yield from (Conflict(("listeners", name, "fault"), reason) for reason in reasons)
            elif listener.fault:
                message = f"no fault is named {listener.fault!r}; {hint(listener.fault, self.faults)}"
                yield Conflict(("listeners", name, "fault"), message)


class Config(NamedTuple):
    """Settings and their origins."""

    settings: Settings
    origins: Mapping[Key, str]
    """The file and its line, the variable or the option of each value that is not a default."""
    unknown_variables: Mapping[str, str]
    """`ECHOD_` variables that name no setting, such as those of Kubernetes for a service called echod.

    For each, the variable that was probably meant; empty if none is similar.
    """


def _valid_part(values: Mapping[str, Any], locations: Iterable[Location]) -> dict[str, Any]:
    """Return the valid values that may conflict with each other.

    A named table remains even if nothing in it is valid. An invalid address is replaced by one without conflicts.

    Args:
        values: tables of tables.
        locations: those of the invalid values.

    """
    wrong = {location[:3] for location in locations}

    def valid_keys(table: Any, *path: str) -> dict[str, Any]:
        return {} if path in wrong else {name: table[name] for name in table if (*path, name) not in wrong}

    def valid_tables(name: str) -> dict[str, dict[str, Any]]:
        tables = {} if (name,) in wrong else values.get(name, {})
        return {key: valid_keys(tables[key], name, key) for key in tables if is_utf8(key)}

    listen: Any = () if ("listen",) in wrong else split(values.get("listen", Settings.model_fields["listen"].default))
    return {
        "listen": [
            f"unix:@invalid address {index}" if ("listen", index) in wrong else address
            for index, address in enumerate(listen)
        ],
        "admin": valid_keys(values.get("admin", {}), "admin"),
        "faults": valid_tables("faults"),
        "listeners": {name: {"address": ":0"} | table for name, table in valid_tables("listeners").items()},
    }


def section(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field that is a table, or of each table in a field of named tables. Otherwise None."""
    # The model of an optional table or of named tables is an argument of the type.
    for annotation in (field.annotation, *get_args(field.annotation)):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
    return None


def has_named_tables(field: FieldInfo) -> bool:
    """Tell whether a field contains named tables."""
    return get_origin(field.annotation) is dict


def leaves(model: type[BaseModel] = Settings, path: Key = ()) -> Iterator[tuple[Key, FieldInfo]]:
    """Yield the key and field of each setting outside named tables, in the model's order."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, (*path, name))
        elif section(field) is None:
            yield (*path, name), field


def changes(before: Settings, after: Settings) -> Iterator[Key]:
    """Yield the keys of different values, in the model's order. A key in only one of the settings counts as different."""
    one, other = dict(flat(before.model_dump())), dict(flat(after.model_dump()))
    for key in one | other:
        if key not in one or key not in other or one[key] != other[key]:
            yield key


def flat(table: dict[str, Any], path: Key = ()) -> Iterator[tuple[Key, object]]:
    """Yield the key and value of every leaf in nested tables."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, (*path, name))
        else:
            yield (*path, name), value
