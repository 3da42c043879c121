"""The command line of `echod probe`: its grammar, and the options that contradict each other."""

from __future__ import annotations

import argparse
import ipaddress
import math
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from echod.net import addresses
from echod.net.addresses import TcpAddress, UnixAddress
from echod.probe.connect import Route
from echod.probe.errors import TlsFileError
from echod.probe.model import ProbeOptions
from echod.text import closest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echod.probe.tls import ClientTls

_DURATION = 10.0
_MESSAGE_SIZE = 64
_STREAM_SIZE = 65536
_LARGEST_SIZE = 1024**4

# Any of these options makes the probe a measurement.
_MEASUREMENT = ("count", "duration", "connections", "size", "rate", "pipeline", "stream", "seed", "plot")

_DESCRIPTION = """\
Check or measure an echo server: echod, or any other (RFC 862). TARGET is HOST:PORT, [V6]:PORT, :PORT (localhost),
unix:PATH or unix:@NAME.

Without a measurement option, the probe is one quick check: it connects, sends a line, compares the echo and closes.
"""

_EPILOG = """\
sizes are in bytes, or with a unit such as 64KiB; durations are in seconds

exit codes: 0 the echo was right; 1 it was wrong or missing; 2 usage error; 69 no connection; 130 or 143 SIGINT or
SIGTERM ended a measurement (the results so far are printed)
"""


def parse(command_line: Sequence[str]) -> ProbeOptions:
    """Parse the arguments after `probe`.

    Raises:
        SystemExit: with code 2 for a usage error, with 0 after --help.

    """
    parser = build_parser()
    given, unknown = parser.parse_known_args(command_line)
    if unknown:
        _reject(parser, unknown[0])
    for present, message in _contradictions(given):
        if present:
            parser.error(message)
    measure = any(getattr(given, name) not in {None, False} for name in _MEASUREMENT)
    return ProbeOptions(
        target=given.target,
        route=_route(parser, given),
        timeout=given.timeout,
        half_close=given.half_close,
        json=given.json,
        measure=measure,
        messages=given.count,
        duration=0.0 if given.count is not None else given.duration or _DURATION,
        connections=given.connections or 1,
        size=given.size or (_STREAM_SIZE if given.stream else _MESSAGE_SIZE),
        rate=given.rate,
        pipeline=given.pipeline or 1,
        stream=given.stream,
        seed=given.seed or 0,
        plot=given.plot,
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options and TARGET."""
    parser = argparse.ArgumentParser(
        prog="echod probe",
        usage="%(prog)s TARGET [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="TARGET", type=_target, help="address of the echo server")
    add = parser.add_argument
    text = "seconds to connect, and to wait for an echo (default: 5)"
    add("--timeout", metavar="S", type=_timeout, default=5.0, help=text)
    add("--half-close", action="store_true", help="half-close at the end, and require the whole echo and EOF")
    add("--json", action="store_true", help="print one JSON object")
    add("--source", metavar="ADDRESS", type=_ip, help="local IP address to connect from")
    add("--proxy-v1", metavar="SRC:PORT", type=_claim, help="send a PROXY v1 header with this client address")
    add("--proxy-v2", metavar="SRC:PORT", type=_claim, help="send a PROXY v2 header")

    add = parser.add_argument_group("TLS").add_argument
    add("--tls", action="store_true", help="use TLS")
    add("--ca", metavar="FILE", type=Path, help="trusted authorities, PEM (default: those of the system)")
    add("--cert", metavar="FILE", type=Path, help="client certificate, PEM")
    add("--key", metavar="FILE", type=Path, help="private key of --cert, PEM (default: in the same file)")
    text = "host name or IP address that the certificate must contain (default: the target's host)"
    add("--server-name", metavar="NAME", type=_server_name, help=text)
    add("--insecure", action="store_true", help="accept any certificate")

    add = parser.add_argument_group("measurement (any of these options starts one)").add_argument
    add("--count", metavar="N", type=_number, help="number of messages over all connections")
    add("--duration", metavar="S", type=_seconds, help=f"seconds to measure, without --count (default: {_DURATION:g})")
    add("--connections", metavar="C", type=_number, help="number of connections (default: 1)")
    text = f"message size (default: {_MESSAGE_SIZE}); with --stream, size of each write (default: 64KiB)"
    add("--size", metavar="B", type=_size, help=text)
    text = "messages per second over all connections, sent on schedule (open loop); latency counts from the due time"
    add("--rate", metavar="R", type=_rate, help=text)
    add("--pipeline", metavar="D", type=_number, help="messages in flight per connection (default: 1)")
    add("--stream", action="store_true", help="send and receive at full speed in both directions")
    add("--seed", metavar="N", type=_seed, help="seed of the random bytes (default: 0)")
    add("--plot", metavar="FILE.svg", type=Path, help="plot latency by percentile")
    return parser


def _reject(parser: argparse.ArgumentParser, argument: str) -> NoReturn:
    if not argument.startswith("-"):
        parser.error(f"{argument!r} is a second TARGET: give only one")
    option = argument.partition("=")[0]
    near = closest(option, parser._option_string_actions)  # noqa: SLF001  (argparse has no public list of options)
    parser.error(f"unknown option {option}" + (f"; did you mean {near}?" if near else ""))


def _contradictions(given: argparse.Namespace) -> list[tuple[object, str]]:
    """Return pairs of a condition and the message to show if it is true."""
    unix = isinstance(given.target, UnixAddress)
    tls_options = [f"--{name}" for name in ("ca", "cert", "key", "server-name", "insecure") if _given(given, name)]
    proxy = given.proxy_v1 or given.proxy_v2
    return [
        (given.count and given.duration, "--count and --duration both end the measurement: give one of them"),
        (given.stream and given.count, "--stream has no messages to --count: give --duration"),
        (given.stream and given.rate, "--stream sends at full speed, --rate at a fixed rate: give one of them"),
        (given.stream and given.pipeline, "--stream never waits for an echo, so --pipeline has no effect"),
        (given.stream and given.plot, "--stream has no messages, so there is no latency to --plot"),
        (given.rate and given.pipeline, "--rate never waits for an echo, so --pipeline has no effect"),
        (tls_options and not given.tls, f"{', '.join(tls_options)}: add --tls"),
        (given.key and not given.cert, "--key is the key of a certificate: give --cert too"),
        (given.insecure and given.ca, "--insecure accepts any certificate, so --ca has no effect"),
        (
            unix and given.tls and not (given.insecure or given.server_name),
            "a unix socket has no host name to verify: give --server-name or --insecure",
        ),
        (
            given.proxy_v1 and given.proxy_v2,
            "--proxy-v1 and --proxy-v2: a connection has only one header, give one of them",
        ),
        (unix and given.source, "--source is an IP address, but the target is a unix socket"),
        (unix and proxy, "a PROXY header contains IP addresses, but the target is a unix socket"),
        (len(_families(given)) > 1, f"addresses of different IP families: {', '.join(_families(given).values())}"),
    ]


def _given(given: argparse.Namespace, name: str) -> bool:
    return bool(getattr(given, name.replace("-", "_")))


def _families(given: argparse.Namespace) -> dict[int, str]:
    """Return the IP families of the given addresses, each with an option that has it."""
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


def _route(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Route:
    families = list(_families(given))
    return Route(
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
    from echod.net import proxy_protocol  # noqa: PLC0415  (few probes need it)

    encode = proxy_protocol.encode_v1 if given.proxy_v1 else proxy_protocol.encode_v2
    return lambda destination: encode(source, destination)


def _tls(parser: argparse.ArgumentParser, given: argparse.Namespace) -> ClientTls:
    from echod.probe.tls import ClientTls  # noqa: PLC0415  (imports OpenSSL)

    name = given.server_name or (None if isinstance(given.target, UnixAddress) else given.target.host or "localhost")
    try:
        return ClientTls(
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
        msg = f"{text!r}: only a server inherits sockets; give the address that they are bound to"
        raise argparse.ArgumentTypeError(msg)
    if isinstance(address, TcpAddress) and not address.port:
        msg = f"{text!r}: a server cannot listen on port 0: use 1 to 65535"
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
        msg = f"{text!r} is not an IP address"
        raise argparse.ArgumentTypeError(msg)
    return host


def _claim(text: str) -> TcpAddress:
    try:
        address = addresses.parse(text)
    except addresses.AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(address, TcpAddress) or _family(address.host) is None or "%" in address.host:
        msg = f"{text!r} is not an IP address and a port, which a PROXY header contains"
        raise argparse.ArgumentTypeError(msg)
    return address


def _number(text: str) -> int:
    if not re.fullmatch("0*[1-9][0-9]{0,14}", text, re.ASCII):
        msg = f"{text!r} is not a whole number: use 1 or more"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _seed(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text, re.ASCII):
        msg = f"{text!r} is not a whole number: use 0 or more"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _size(text: str) -> int:
    from echod import units  # noqa: PLC0415  (a quick check does not need it)

    try:
        size = units.parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not 0 < size <= _LARGEST_SIZE:
        msg = f"{text!r} is not a valid size: use 1 byte to 1TiB"
        raise argparse.ArgumentTypeError(msg)
    return size


def _seconds(text: str) -> float:
    return _positive(text, "a time in seconds: use more than 0, at most a year", 366 * 86400)


def _timeout(text: str) -> float:
    return _positive(text, "a time in seconds: use more than 0, at most a day", 86400)  # poll(2) takes at most 24 days


def _rate(text: str) -> float:
    return _positive(text, "a number of messages per second: use more than 0, at most 10 million", 1e7)


def _positive(text: str, expected: str, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= most:
        msg = f"{text!r} is not {expected}"
        raise argparse.ArgumentTypeError(msg)
    return value
