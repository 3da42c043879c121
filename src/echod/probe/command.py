"""`echod probe`: the grammar of its command line, and the quick check.

A quick check is what a container's health check runs every few seconds, so nothing is imported here that it does not
need: no settings, no measurement, and TLS only where it is asked for.
"""

from __future__ import annotations

import argparse
import enum
import ipaddress
import math
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Self

from echod.net import addresses
from echod.net.addresses import TcpAddress, UnixAddress
from echod.probe import connect, units
from echod.text import closest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echod.probe.tls import Tls

DEFAULT_DURATION = 10.0
_MESSAGE_SIZE = 64
_STREAM_SIZE = 65536
_RECEIVE = 65536

_LARGEST_SIZE = 1024**4

# The modules of the extra `probe`, each with the package that it is of.
_EXTRA = {"rich": "rich", "hdrh": "hdrhistogram"}

# Whoever asks for one of these asks for a measurement.
_OF_MEASUREMENTS = ("count", "duration", "connections", "size", "rate", "pipeline", "stream", "seed", "plot")

_DESCRIPTION = """\
A client of echod, or of any other echo server (RFC 862). TARGET is an address that echod can listen on: HOST:PORT,
[V6]:PORT, :PORT (of localhost), unix:PATH or unix:@NAME.

Without options of a measurement it is one quick check: connect, send a line, compare its echo byte for byte, close.
"""

_EPILOG = """\
sizes are bytes, or such as 64KiB; durations are seconds

exit codes: 0 the echo was right; 1 it was wrong, or did not come; 2 the command line could not be parsed; 69 no
connection; 130, 143 SIGINT, SIGTERM ended a measurement (what was measured so far is printed)
"""


class Ending(enum.Enum):
    """How a probe ended."""

    RIGHT = "right"
    FAILED = "failed"
    UNREACHABLE = "unreachable"
    INTERRUPTED = "interrupted"
    TERMINATED = "terminated"


class Answer(NamedTuple):
    """What a probe has to say."""

    ending: Ending
    text: str = ""
    """For standard output."""
    problem: str = ""
    """What went wrong, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is asked for on the command line, without contradictions."""

    target: TcpAddress | UnixAddress
    route: connect.Route
    timeout: float
    """Seconds: of connecting, and of waiting for any echo."""
    half_close: bool
    json: bool
    measure: bool
    """Whether a measurement is asked for; what follows is of those alone."""
    count: int | None
    """Messages, over all connections."""
    duration: float
    """Seconds; 0 where `count` says when to stop."""
    connections: int
    size: int
    """Of a message, or in a stream of a write, bytes."""
    rate: float | None
    """Messages a second, over all connections; None: the next one is sent when an echo has come."""
    pipeline: int
    """Messages on their way at once, on each connection."""
    stream: bool
    seed: int
    plot: Path | None


class Mismatch(NamedTuple):
    """Where an echo is first wrong."""

    offset: int
    """In all that the connection received."""
    expected: int | None
    """The byte; None: there should have been none, as no more had been sent."""
    got: int

    @classmethod
    def between(cls, sent: bytes, received: bytes, offset: int = 0) -> Self:
        """Compare two texts, the second of which is no beginning of the first, and stands at an offset."""
        place = next((i for i, pair in enumerate(zip(sent, received, strict=False)) if pair[0] != pair[1]), len(sent))
        return cls(offset + place, sent[place] if place < len(sent) else None, received[place])

    def __str__(self) -> str:
        """Return it as a sentence."""
        expected = "nothing, as no more had been sent" if self.expected is None else f"0x{self.expected:02x}"
        return f"wrong echo at offset {self.offset}: expected {expected}, got 0x{self.got:02x}"


def run(arguments: Sequence[str]) -> Answer:
    """Do what the command line asks for.

    Args:
        arguments: those behind `probe`.

    Raises:
        SystemExit: with 2 for what cannot be parsed, with 0 after --help.

    """
    order = parse(arguments)
    if not order.measure:
        return check(order)
    try:
        from echod.probe import load  # noqa: PLC0415  (a quick check has no need of it)
    except ModuleNotFoundError as error:
        if (package := _EXTRA.get(str(error.name).partition(".")[0])) is None:
            raise
        message = f"a measurement needs {package}, which is not installed: pip install 'echod[probe]'"
        return Answer(Ending.FAILED, problem=message)
    return load.run(order)


def check(order: Order) -> Answer:
    """Send one line, and compare its echo.

    It is a line, and a new one each time: not every echo server echoes what is none, and one that repeats what it has
    seen before is to be found out.
    """
    message = b"echod probe %s\r\n" % os.urandom(_MESSAGE_SIZE).hex().encode()[: _MESSAGE_SIZE - 14]
    deadline = time.perf_counter() + order.timeout
    try:
        connection = order.route.connect(order.route.endpoints(order.timeout), deadline)
    except OSError as error:
        return _report(order, Ending.UNREACHABLE, f"no connection: {connect.reason(error)}", connect.kind(error))
    echo = b""
    began = time.perf_counter()
    connection.socket.settimeout(0)
    try:
        connection.channel.send(message)  # it is shorter than any send buffer
        if order.half_close:
            connection.channel.shutdown(socket.SHUT_WR)
        while len(echo) < len(message) or order.half_close:
            try:
                data = connection.channel.recv(_RECEIVE)
            except BlockingIOError:  # also when a part of a TLS record has come
                connect.wait_readable(connection.socket, deadline)
                continue
            if not data:
                break
            echo += data
            if not message.startswith(echo):
                break
        seconds = time.perf_counter() - began
    except OSError as error:
        came = f"{len(echo)} of {len(message)} bytes came back, then: " if echo else "no echo: "
        return _report(order, Ending.FAILED, came + connect.reason(error), connect.kind(error))
    finally:
        connection.channel.close()
    if not message.startswith(echo):
        mismatch = Mismatch.between(message, echo)
        return _report(order, Ending.FAILED, str(mismatch), "wrong_echo", mismatch=mismatch)
    if len(echo) < len(message):
        problem = f"the server closed the connection after {len(echo)} of {len(message)} bytes"
        return _report(order, Ending.FAILED, problem, "early_eof")
    return _report(order, Ending.RIGHT, seconds=seconds, connect_seconds=connection.seconds)


def _report(
    order: Order,
    ending: Ending,
    problem: str = "",
    kind: str = "",
    *,
    mismatch: Mismatch | None = None,
    seconds: float | None = None,
    connect_seconds: float | None = None,
) -> Answer:
    if problem:
        problem = f"{order.target}: {problem}"
    text = ""
    if order.json:
        import json  # noqa: PLC0415  (a check without it has no need of it)

        answer = {
            "target": str(order.target),
            "mode": "check",
            "ending": ending.value,
            "seconds": seconds,
            "connect_seconds": connect_seconds,
            "errors": {kind: 1} if kind else {},
            "mismatch": mismatch and mismatch._asdict(),
            "problem": problem or None,
        }
        text = json.dumps(answer) + "\n"
    elif seconds is not None and connect_seconds is not None:
        text = (
            f"{order.target}: {_MESSAGE_SIZE} bytes came back right in {seconds * 1000:.3f} ms"
            f" (connected in {connect_seconds * 1000:.3f} ms)\n"
        )
    return Answer(ending, text, problem)


def parse(arguments: Sequence[str]) -> Order:
    """Parse the arguments, and find contradictions.

    Raises:
        SystemExit: with 2 for what cannot be parsed, with 0 after --help.

    """
    parser = _parser()
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse(parser, unknown[0])
    for present, message in _contradictions(given):
        if present:
            parser.error(message)
    measure = any(getattr(given, name) not in {None, False} for name in _OF_MEASUREMENTS)
    return Order(
        target=given.target,
        route=_route(parser, given),
        timeout=given.timeout,
        half_close=given.half_close,
        json=given.json,
        measure=measure,
        count=given.count,
        duration=0.0 if given.count is not None else given.duration or DEFAULT_DURATION,
        connections=given.connections or 1,
        size=given.size or (_STREAM_SIZE if given.stream else _MESSAGE_SIZE),
        rate=given.rate,
        pipeline=given.pipeline or 1,
        stream=given.stream,
        seed=given.seed or 0,
        plot=given.plot,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="echod probe",
        usage="%(prog)s TARGET [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="TARGET", type=_target, help="where the echo server listens")
    add = parser.add_argument
    add("--timeout", metavar="S", type=_timeout, default=5.0, help="for connecting, and for any echo (default: 5)")
    add("--half-close", action="store_true", help="close the sending side at the end, and require all echo, then EOF")
    add("--json", action="store_true", help="print one JSON object")
    add("--source", metavar="ADDRESS", type=_ip, help="the local IP address to connect from")
    add("--proxy-v1", metavar="SRC:PORT", type=_claim, help="send a PROXY header, version 1, that names this client")
    add("--proxy-v2", metavar="SRC:PORT", type=_claim, help="the same, version 2")

    add = parser.add_argument_group("TLS").add_argument
    add("--tls", action="store_true", help="speak TLS")
    add("--ca", metavar="FILE", type=Path, help="authorities to trust, PEM (default: those that the system trusts)")
    add("--cert", metavar="FILE", type=Path, help="the client's certificate, PEM")
    add("--key", metavar="FILE", type=Path, help="its private key, PEM (default: in the file of --cert)")
    text = "host name or IP address that the certificate has to hold (default: the target's host)"
    add("--server-name", metavar="NAME", type=_server_name, help=text)
    add("--insecure", action="store_true", help="take any certificate")

    add = parser.add_argument_group("measurement (any of these makes it one)").add_argument
    add("--count", metavar="N", type=_number, help="messages, over all connections")
    add("--duration", metavar="S", type=_seconds, help=f"without --count (default: {DEFAULT_DURATION:g})")
    add("--connections", metavar="C", type=_number, help="(default: 1)")
    text = f"of a message (default: {_MESSAGE_SIZE}), or of a stream's writes (default: 64KiB)"
    add("--size", metavar="B", type=_size, help=text)
    text = "messages a second over all connections, each sent when it is due (open loop): latency counts from then"
    add("--rate", metavar="R", type=_rate, help=text)
    add("--pipeline", metavar="D", type=_number, help="messages on their way at once on a connection (default: 1)")
    add("--stream", action="store_true", help="send and receive as fast as possible, both ways at once")
    add("--seed", metavar="N", type=_seed, help="of the random bytes that are sent (default: 0)")
    add("--plot", metavar="FILE.svg", type=Path, help="draw the latency by percentile")
    return parser


def _refuse(parser: argparse.ArgumentParser, argument: str) -> NoReturn:
    if not argument.startswith("-"):
        parser.error(f"there is one TARGET, and {argument!r} is a second one")
    option = argument.partition("=")[0]
    near = closest(option, parser._option_string_actions)  # noqa: SLF001  (argparse has no public list of options)
    parser.error(f"unknown option {option}" + (f"; did you mean {near}?" if near else ""))


def _contradictions(given: argparse.Namespace) -> list[tuple[object, str]]:
    """Return pairs: whether it is there, and what it is."""
    unix = isinstance(given.target, UnixAddress)
    tls_options = [f"--{name}" for name in ("ca", "cert", "key", "server-name", "insecure") if _given(given, name)]
    proxy = given.proxy_v1 or given.proxy_v2
    return [
        (given.count and given.duration, "--count and --duration both say when to stop: give one of them"),
        (given.stream and given.count, "--stream has no messages that --count could count: give --duration"),
        (given.stream and given.rate, "--stream sends as fast as it can, and --rate at a set rate: give one of them"),
        (given.stream and given.pipeline, "--stream never waits for an echo, so --pipeline sets nothing"),
        (given.stream and given.plot, "--stream has no messages, so there is no latency to --plot"),
        (
            given.rate and given.pipeline,
            "--rate sends what is due however much is on its way, so --pipeline sets nothing",
        ),
        (tls_options and not given.tls, f"{', '.join(tls_options)}: only with --tls"),
        (given.key and not given.cert, "--key is the key of a certificate: give --cert too"),
        (given.insecure and given.ca, "--insecure takes any certificate, so --ca sets nothing"),
        (
            unix and given.tls and not (given.insecure or given.server_name),
            "a unix socket has no name that a certificate could hold: give --server-name or --insecure",
        ),
        (given.proxy_v1 and given.proxy_v2, "--proxy-v1 and --proxy-v2: a connection has one header"),
        (unix and given.source, "--source is an IP address, and the target is a unix socket"),
        (unix and proxy, "a PROXY header names IP addresses, and the target is a unix socket"),
        (len(_families(given)) > 1, f"these are of different IP families: {', '.join(_families(given).values())}"),
    ]


def _given(given: argparse.Namespace, name: str) -> bool:
    return bool(getattr(given, name.replace("-", "_")))


def _families(given: argparse.Namespace) -> dict[int, str]:
    """Return the IP families of all addresses given as such, each with one of them."""
    claim = given.proxy_v1 or given.proxy_v2
    hosts = {
        "TARGET": given.target.host if isinstance(given.target, TcpAddress) else "",
        "--source": given.source,
        "--proxy-v1" if given.proxy_v1 else "--proxy-v2": claim.host if claim else "",
    }
    families = {}
    for option, host in hosts.items():
        if host and (family := _family(host)) is not None:
            families[family] = f"{option} {host}"
    return families


def _family(host: str) -> int | None:
    try:
        return socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        return None


def _route(parser: argparse.ArgumentParser, given: argparse.Namespace) -> connect.Route:
    families = list(_families(given))
    return connect.Route(
        target=given.target,
        source=given.source,
        header=_header(given),
        family=families[0] if families else socket.AF_UNSPEC,
        tls=_tls(parser, given) if given.tls else None,
    )


def _header(given: argparse.Namespace) -> Callable[[TcpAddress], bytes] | None:
    source = given.proxy_v1 or given.proxy_v2
    if source is None:
        return None
    from echod.net import proxy_protocol  # noqa: PLC0415  (only few probes have need of it)

    encode = proxy_protocol.encode_v1 if given.proxy_v1 else proxy_protocol.encode_v2
    return lambda destination: encode(source, destination)


def _tls(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Tls:
    from echod.probe.tls import Tls, TlsFileError  # noqa: PLC0415  (imports OpenSSL)

    name = given.server_name or (None if isinstance(given.target, UnixAddress) else given.target.host or "localhost")
    try:
        return Tls(
            ca=given.ca, certificate=given.cert, private_key=given.key, server_name=name, insecure=given.insecure
        )
    except TlsFileError as error:
        parser.error(f"{error.option}: {error}")


def _target(text: str) -> TcpAddress | UnixAddress:
    try:
        address = addresses.parse(text)
    except addresses.AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(address, TcpAddress | UnixAddress):
        msg = f"{text!r}: only a server inherits sockets; a client needs the address that they are bound to"
        raise argparse.ArgumentTypeError(msg)
    if isinstance(address, TcpAddress) and not address.port:
        msg = f"{text!r}: nobody listens on port 0"
        raise argparse.ArgumentTypeError(msg)
    return address


def _server_name(text: str) -> str:
    name = _unbracketed(text)
    if _family(name) is None and not addresses.is_name(name):
        msg = f"{text!r} is not a host name or an IP address"
        raise argparse.ArgumentTypeError(msg)
    return name


def _unbracketed(text: str) -> str:
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def _ip(text: str) -> str:
    host = _unbracketed(text)
    if _family(host) is None:
        msg = f"{text!r} is no IP address"
        raise argparse.ArgumentTypeError(msg)
    return host


def _claim(text: str) -> TcpAddress:
    try:
        address = addresses.parse(text)
    except addresses.AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(address, TcpAddress) or _family(address.host) is None or "%" in address.host:
        msg = f"{text!r}: a PROXY header names an IP address and a port"
        raise argparse.ArgumentTypeError(msg)
    return address


def _number(text: str) -> int:
    if not re.fullmatch("0*[1-9][0-9]{0,14}", text, re.ASCII):
        msg = f"{text!r} is no whole number from 1 on"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _seed(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text, re.ASCII):
        msg = f"{text!r} is no whole number from 0 on"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _size(text: str) -> int:
    try:
        size = units.parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not 0 < size <= _LARGEST_SIZE:
        msg = f"{text!r} is no size from 1 byte to 1TiB"
        raise argparse.ArgumentTypeError(msg)
    return size


def _seconds(text: str) -> float:
    return _positive(text, "no time in seconds, above 0 and at most a year", 366 * 86400)


def _timeout(text: str) -> float:
    return _positive(text, "no time in seconds, above 0 and at most a day", 86400)  # poll(2) takes 24 days at most


def _rate(text: str) -> float:
    return _positive(text, "no rate of messages a second, above 0 and at most 10 million", 1e7)


def _positive(text: str, problem: str, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= most:
        msg = f"{text!r} is {problem}"
        raise argparse.ArgumentTypeError(msg)
    return value
