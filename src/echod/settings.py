"""The settings: one frozen model, from which the help, the reference page and all validation come."""

# No annotations as text here: Pydantic would have to evaluate each again, at every start.

import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, LiteralString, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from echod import addresses

PREFIX = "ECHOD_"

# The event loops and the kernel take these numbers as an int of C.
_HIGHEST_COUNT = 2**31 - 1
_LARGEST_SIZE = 2**30

_ADMIN_FORMS = "HOST:PORT, [V6]:PORT, :PORT, unix:PATH or unix:@NAME"

Key = tuple[str, ...]


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        kind = "number_type"
        raise PydanticCustomError(kind, "Input should be a number")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        kind = "finite_number"
        raise PydanticCustomError(kind, "Input should be a finite number")
    return value


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # the command line and the environment may hold any bytes
        kind = "text"
        raise PydanticCustomError(kind, "Input should be UTF-8 text") from None
    return text


def _file_name(text: str) -> str:
    if not text or "\0" in text:
        kind = "file_name"
        raise PydanticCustomError(kind, "Input should be the name of a file")
    return text


def _address(text: str) -> str:
    addresses.parse_bindable(text)
    return text


def _admin_address(text: str) -> str:
    if not text:
        return text
    try:
        address = addresses.parse_bindable(text)
    except addresses.AddressError as error:
        raise addresses.AddressError(str(error).replace(addresses.FORMS, _ADMIN_FORMS)) from None
    if isinstance(address, addresses.InheritedAddress):
        msg = f"{text!r}: it opens its socket itself: write {_ADMIN_FORMS}"
        raise addresses.AddressError(msg)
    return text


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _network(text: str) -> str:
    try:
        addresses.network(text)
    except ValueError:
        kind = "network"
        message = "Input should be a network such as '10.0.0.0/8' or '2001:db8::/32', or an address"
        raise PydanticCustomError(kind, message) from None
    return text


def _mode(text: str) -> str:
    if not re.fullmatch("0?[0-7]{3}", text):
        kind = "permissions"
        raise PydanticCustomError(kind, "Input should be permissions in octal, such as '0660'")
    return text


Seconds = Annotated[float, BeforeValidator(_no_bool), AfterValidator(_finite), Field(ge=0)]
PositiveSeconds = Annotated[Seconds, Field(gt=0)]
Size = Annotated[ByteSize, BeforeValidator(_no_bool), Field(ge=1, le=_LARGEST_SIZE)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=_HIGHEST_COUNT)]
Number = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, le=_HIGHEST_COUNT)]
Probability = Annotated[float, BeforeValidator(_no_bool), AfterValidator(_finite), Field(gt=0, le=1)]
Trigger = Annotated[str, Field(min_length=1)]
Address = Annotated[str, AfterValidator(_address)]
AdminAddress = Annotated[str, AfterValidator(_admin_address)]
Network = Annotated[str, AfterValidator(_network)]
Permissions = Annotated[str, AfterValidator(_mode)]
Text = Annotated[str, AfterValidator(_text)]
FileName = Annotated[Text, AfterValidator(_file_name)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LimitsSettings(_Section):
    """What clients may use."""

    max_connections: Count = Field(
        10_000,
        description="Clients of each listener. At this number it stops accepting, and clients wait in the backlog.",
    )
    max_connections_per_client: Number = Field(
        0,
        description="Clients of each listener from one address, or one network of 64 bits of IPv6; others are closed at "
        "once. Behind a proxy it is the address in the PROXY header that counts. 0: no limit.",
    )
    backlog: Count = Field(
        4096,
        description="Connections that wait to be accepted, for each listening socket. The kernel's own limit is "
        "net.core.somaxconn.",
    )
    idle_timeout: Seconds = Field(
        0.0, description="Close a client after this many seconds without a byte either way. 0: never."
    )
    write_timeout: PositiveSeconds = Field(
        30.0,
        description="Reset a client that has not taken a byte for this many seconds while its echo waits and its "
        "reading is paused.",
    )
    handshake_timeout: PositiveSeconds = Field(
        10.0,
        description="Close a client that has not completed its PROXY header and its TLS handshake after this many seconds.",
    )
    write_buffer: Size = Field(
        ByteSize(64 * 1024),
        description="The high-water mark of each client's write buffer. Above it, reading from the client pauses.",
    )
    max_line: Size = Field(
        ByteSize(64 * 1024),
        description="The longest line in mode line, its ending included. A client that sends a longer one is closed.",
    )


class ShutdownSettings(_Section):
    """How a stop goes."""

    delay: Seconds = Field(
        0.0,
        description="Seconds from the signal on in which new clients are still accepted: time for a load balancer to "
        "look away.",
    )
    quiet_period: Seconds = Field(
        2.0,
        description="A client that is silent for this many seconds of the drain, and has all its echo, counts as done.",
    )
    drain_timeout: Seconds = Field(
        7.0, description="Seconds that the other clients get to finish. Then they are cut off, after their echo."
    )
    linger_timeout: Seconds = Field(
        1.0,
        description="Seconds without progress, after our FIN, until a connection is closed. In a drain, also the "
        "seconds after drain_timeout until it ends.",
    )


class LogSettings(_Section):
    """What is logged, how and where."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="The lowest level that is logged.")
    format: Literal["auto", "console", "json", "logfmt"] = Field(
        "auto", description="The form of a line. auto: console on a terminal, json elsewhere."
    )
    file: FileName = Field(
        "-", description='The file that lines are appended to. "-": standard error. "/dev/stdout": standard output.'
    )
    connections: Literal["all", "nonempty", "failed", "none"] = Field(
        "nonempty",
        description="Which closed connections get a line. nonempty: those that sent a byte. failed: those that did "
        "not end well.",
    )


class AdminSettings(_Section):
    """Metrics, status and probes over HTTP."""

    address: AdminAddress = Field(
        "",
        description=f"Where HTTP is spoken: {_ADMIN_FORMS}. Whoever reaches it may read all of it, so keep it on loopback "
        "or in a network of your own. Empty: nowhere.",
    )


class FaultSettings(_Section):
    """A named way to misbehave; a listener takes one with `fault`."""

    trigger: Trigger | None = Field(
        None,
        description="When: a message equals this. A message is, in mode stream, what one read returns, so TCP may split or "
        "join what the client wrote; in mode line, a line with its ending.",
    )
    after_bytes: Size | None = Field(None, description="When: so many bytes of messages have come.")
    after_seconds: Seconds | None = Field(
        None, description="When: so many seconds have passed, from the end of the handshake on where there is one."
    )
    probability: Probability | None = Field(None, description="When: chance has it so, message by message.")
    seed: Number | None = Field(
        None, description="Of chance: with the same one, a run can be repeated. Without it, each differs."
    )
    action: (
        Literal["raise", "close", "reset", "half_close", "stall", "blackhole", "corrupt", "duplicate", "truncate"]
        | None
    ) = Field(
        None,
        description="raise: an exception in the client's session, which is closed. close: after the echo so far. reset: "
        "with RST. half_close: FIN after the echo so far, and read on. stall: read nothing more. blackhole: read on, and "
        "answer nothing. corrupt: turn one bit of the message over. duplicate: echo it twice. truncate: echo its first "
        "half only.",
    )
    delay: Seconds = Field(0.0, description="Hold each message's echo back for so many seconds.")
    jitter: Seconds = Field(0.0, description="Let the delay differ by up to so many seconds, up or down.")
    rate: Size | None = Field(None, description="Echo so many bytes a second at most.")
    slice: Size | None = Field(None, description="Echo in pieces of so many bytes at most, each sent by itself.")

    @model_validator(mode="after")
    def _make_sense(self) -> Self:
        errors = [
            InitErrorDetails(type=PydanticCustomError("value_error", message), loc=(key,), input=getattr(self, key))
            for key, message in self._useless()
        ]
        if errors:
            raise ValidationError.from_exception_data(type(self).__name__, errors)
        return self

    def _useless(self) -> Iterator[tuple[LiteralString, LiteralString]]:
        """Yield the keys that could have no effect beside the others, each with why."""
        shapes = bool(self.delay or self.rate or self.slice)
        if self.action is None and not shapes:
            yield "action", "is missing, and so are delay, rate and slice: such a fault does nothing"
        if self.jitter > self.delay:
            yield "jitter", "is by how much delay differs, so it cannot be more than delay"
        if self.seed is not None and self.probability is None and not self.jitter and self.action != "corrupt":
            yield (
                "seed",
                "is of use with probability, jitter or action = 'corrupt' only: nothing else is left to chance",
            )
        at_once = (
            self.trigger is None and not self.after_bytes and not self.after_seconds and self.probability in {None, 1}
        )
        if shapes and at_once and self.action not in {None, "corrupt", "duplicate", "truncate"}:
            yield (
                "action",
                (
                    "ends the echo at the first message, so there is none to delay, slow or slice: give it a trigger, "
                    "after_bytes, after_seconds or probability, or leave out delay, rate and slice"
                ),
            )


class TlsSettings(_Section):
    """TLS on a listener."""

    certificate: FileName = Field(
        description="File with the certificate, and behind it those between it and its authority, PEM."
    )
    private_key: FileName = Field(description="File with the certificate's key, PEM, not encrypted.")
    client_ca: Text = Field(
        "",
        description="File with the authorities of clients, PEM; an intermediate is enough. Each client has to show a "
        "certificate that one of them has signed. Empty: no client certificates.",
    )
    minimum_version: Literal["1.2", "1.3"] = Field("1.2", description="The lowest version of TLS.")


class ListenerSettings(_Section):
    """A listener with settings of its own. Its name is the table's."""

    address: Address = Field(description=f"Where to listen: {addresses.FORMS}.")
    mode: Literal["stream", "line", "info"] = Field(
        "stream",
        description="stream: every byte at once. line: whole lines, and an unfinished one at the end. info: one JSON object "
        "on what the server sees of the connection, then close.",
    )
    proxy_protocol: Literal["off", "require"] = Field(
        "off", description="require: every client begins with a PROXY header, version 1 or 2."
    )
    proxy_trusted: Annotated[tuple[Network, ...], BeforeValidator(_split)] = Field(
        ("127.0.0.0/8", "::1/128"),
        description="Networks whose hosts may send the PROXY header; others are closed before a byte is read. On a unix "
        "socket, the permissions of its file decide.",
    )
    socket_mode: Permissions = Field("0660", description="Permissions of a unix socket's file, octal.")
    fault: str = Field("", description="The name of the fault it shows. Empty: none.")
    tls: TlsSettings | None = Field(None, description="TLS: a table, [listeners.NAME.tls]. Without it there is none.")


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=PREFIX, env_nested_delimiter="__")

    loop: Literal["auto", "uvloop", "asyncio"] = Field(
        "auto", description="The event loop. auto: uvloop where it is installed."
    )
    listen: Annotated[tuple[Address, ...], BeforeValidator(_split)] = Field(
        ("127.0.0.1:8000",),
        description=f"Addresses to listen on, each {addresses.FORMS}. Port 0 takes a free one. The default applies "
        "only where no listener has a table.",
    )
    limits: LimitsSettings = Field(LimitsSettings(), description="What clients may use.")
    shutdown: ShutdownSettings = Field(ShutdownSettings(), description="How a stop goes.")
    log: LogSettings = Field(LogSettings(), description="What is logged, how and where.")
    admin: AdminSettings = Field(AdminSettings(), description="Metrics, status and probes over HTTP.")
    faults: dict[Text, FaultSettings] = Field(
        {}, description="Named ways to misbehave: a table for each, [faults.NAME]."
    )
    listeners: dict[Text, ListenerSettings] = Field(
        {},
        description="Listeners with settings of their own, beside those of listen: a table for each, [listeners.NAME].",
    )

    @classmethod
    def settings_customise_sources(cls, *_: Any, **sources: Any) -> tuple[Any, ...]:
        """Take only what the constructor is given: echod.sources reads the rest, to know where each value is from."""
        return (sources["init_settings"],)

    def all_listeners(self) -> dict[str, ListenerSettings]:
        """Return every listener by its name, which for an address of `listen` is the address."""
        return {text: ListenerSettings(address=text) for text in self.listen} | self.listeners


def section(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of the table that a field holds, if it holds one; of a table of names, that of each."""
    # Of a table that may be missing, and of a table of names, it is an argument of the type.
    for annotation in (field.annotation, *get_args(field.annotation)):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
    return None


def leaves(model: type[BaseModel] = Settings, path: Key = ()) -> Iterator[tuple[Key, FieldInfo]]:
    """Yield the key and field of every setting with a fixed place, in the model's order."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, (*path, name))
        elif section(field) is None:
            yield (*path, name), field


def changes(before: Settings, after: Settings) -> Iterator[Key]:
    """Yield the keys whose values differ, in the model's order; of a table of names, also those that one alone has."""
    one, other = dict(flat(before.model_dump())), dict(flat(after.model_dump()))
    for key in one | other:
        if key not in one or key not in other or one[key] != other[key]:
            yield key


def flat(table: dict[str, Any], path: Key = ()) -> Iterator[tuple[Key, object]]:
    """Yield the key and value of everything in a table of tables."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, (*path, name))
        else:
            yield (*path, name), value
