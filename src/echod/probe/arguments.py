"""The command line of `echod probe`: its grammar, and the options that contradict each other."""

from __future__ import annotations

import argparse
import ipaddress
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from echod.net import addresses
from echod.net.addresses import TcpAddress, UdpAddress, UnixAddress
from echod.probe.connect import Route
from echod.probe.model import ProbeOptions
from echod.text import closest, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from fractions import Fraction

    from echod.probe.tls import ClientTls

T = TypeVar("T")

_TIMEOUT = 5.0
_DURATION = 10.0
_MESSAGE_SIZE = 64
_STREAM_SIZE = 65536
_LARGEST_SIZE = 1024**4
# The length fields of UDP and IPv4 have 16 bits and include the headers, 8 and 20 bytes.
_LARGEST_DATAGRAM = 65507
_HIGHEST_DSCP = 63
_HIGHEST_TTL = 255
_DAY = 86400
_HIGHEST_RATE = 10_000_000

# Any of these options makes the probe a measurement.
_MEASUREMENT = (
    *("count", "duration", "connections", "size", "rate", "interval", "pipeline", "window", "stream", "seed", "plot"),
    "max_loss",
)

_FORMS = "HOST:PORT, [V6]:PORT, :PORT, udp:HOST:PORT, unix:PATH or unix:@NAME"

_FACTORS = {"": 1, "k": 1_000, "m": 1_000_000}

# The options of similar tools, by the text to write instead.
_SIMILAR = {
    "--connections": ("-c", "--concurrency", "--clients"),
    "--count": ("-n", "--number", "--requests", "--messages"),
    "--duration": ("-d", "-z", "--time"),
    "--duration or --timeout": ("-t",),
    "--timeout": ("-w", "--wait"),
    "--rate": ("-q", "-R", "--qps"),
    "--interval": ("-i", "--delay"),
    "udp:HOST:PORT": ("-u", "--udp"),
    "--dscp": ("-Q", "--tos"),
    "--size": ("-s", "-l", "--length", "--bytes", "--payload-size"),
    "--json": ("-j",),
    "--ca": ("--cacert", "--cafile"),
    "--insecure": ("-k",),
    "--server-name": ("--sni", "--servername"),
    "--proxy-v1 or --proxy-v2": ("--proxy", "--proxy-protocol", "--send-proxy"),
    "echod --version": ("-v", "-V", "--version"),
    "HOST:PORT": ("-p", "-H", "--port", "--host", "--target", "--url", "--listen"),
}

_DESCRIPTION = """\
Check or measure an echo server: echod, or any other (RFC 862).

Without a measurement option, the probe is one quick check: it connects, sends
a line, compares the echo and closes. To udp:HOST:PORT, it sends a datagram, and
again every second until an echo comes.
"""

_EPILOG = """\
TIME is in seconds, or has units: 250ms, 10s, 5m, 1h. SIZE is in bytes, or has
a unit: 64k, 64KiB, 1MB. N may end in k or M: 10k is 10,000.

exit codes:
  0         the echo was right
  1         the echo was wrong or missing, more datagrams than --max-loss were
            lost, or the output could not be written
  2         the command line is wrong
  69        no connection, no TLS, or for UDP an ICMP error instead of any echo
  130, 143  SIGINT or SIGTERM ended the probe; a measurement prints its results
            so far

examples:
  echod probe 127.0.0.1:8000
  echod probe localhost:8443 --tls --ca ca.pem
  echod probe :8000 --connections 50 --size 1KiB --duration 30s
  echod probe :8000 --rate 10k --duration 1m --plot latency.svg
  echod probe udp:192.0.2.1:7 --interval 20ms --count 500 --max-loss 1%
"""


def parse(command_line: Sequence[str]) -> ProbeOptions:
    """Parse the arguments after `probe`.

    Raises:
        SystemExit: with code 2 for a usage error, with 0 after --help.

    """
    parser = build_parser()
    given, unknown = parser.parse_known_intermixed_args(command_line)
    if unknown:
        _reject(parser, unknown[0])
    given.target = _target(parser, given.target)
    for present, message in _contradictions(given):
        if present:
            parser.error(message)
    measure = any(getattr(given, name) is not None for name in _MEASUREMENT)
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
        size=given.size if given.size is not None else _STREAM_SIZE if given.stream else _MESSAGE_SIZE,
        rate=1 / given.interval if given.interval else given.rate,
        pipeline=given.pipeline or given.window or 1,
        stream=bool(given.stream),
        seed=given.seed or 0,
        plot=given.plot,
        max_loss=given.max_loss or 0,
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
        add_help=False,
    )
    text = f"{_FORMS}; :PORT and PORT are on localhost"
    parser.add_argument_group("server").add_argument("target", metavar="TARGET", nargs="*", help=text)
    add = parser.add_argument_group("connection").add_argument
    text = f"time limit to connect, and to wait for an echo (default: {_TIMEOUT:g}s)"
    day = _seconds(_DAY, "a day")  # poll(2) takes at most 24 days
    add("--timeout", metavar="TIME", type=day, default=_TIMEOUT, help=text)
    add("--half-close", action="store_true", help="half-close at the end, and require the whole echo and EOF")
    add("--source", metavar="ADDRESS", type=_ip, help="local IP address to connect from")
    add("--dscp", metavar="CLASS", type=_dscp, help="DSCP of the packets: 0 to 63, or a name such as EF or AF41")
    add("--ttl", metavar="N", type=_ttl, help="TTL or hop limit of the packets")
    add("--proxy-v1", metavar="SRC:PORT", type=_claim, help="send a PROXY v1 header with this client address")
    add("--proxy-v2", metavar="SRC:PORT", type=_claim, help="send a PROXY v2 header with this client address")

    add = parser.add_argument_group("TLS").add_argument
    add("--tls", action="store_true", help="use TLS 1.2 or later")
    add("--ca", metavar="FILE", type=Path, help="trusted authorities, PEM (default: those of the system)")
    add("--cert", metavar="FILE", type=Path, help="client certificate, PEM")
    add("--key", metavar="FILE", type=Path, help="private key of --cert, PEM (default: in the same file)")
    text = "host name or IP address that the certificate must contain (default: the target's host)"
    add("--server-name", metavar="NAME", type=_server_name, help=text)
    add("--insecure", action="store_true", help="accept any certificate")

    add = parser.add_argument_group("measurement (any of these options starts one)").add_argument
    add("--count", metavar="N", type=_number, help="number of messages over all connections")
    text = f"time to measure, without --count (default: {_DURATION:g}s)"
    add("--duration", metavar="TIME", type=_seconds(366 * _DAY, "a year"), help=text)
    add("--connections", metavar="N", type=_number, help="number of connections (default: 1)")
    text = f"size of messages or datagrams (default: {_MESSAGE_SIZE}); with --stream, of each write (default: 64KiB)"
    add("--size", metavar="SIZE", type=_size, help=text)
    text = "messages per second over all connections, sent on schedule (open loop); latency counts from the due time"
    add("--rate", metavar="N", type=_rate, help=text)
    add("--interval", metavar="TIME", type=_seconds(_DAY, "a day"), help="time between two messages, instead of --rate")
    add("--pipeline", metavar="N", type=_number, help="messages in flight per connection (default: 1)")
    add("--window", metavar="N", type=_number, help="UDP: datagrams in flight (default: 1)")
    text = "UDP: percentage of lost datagrams up to which the exit code is 0 (default: 0)"
    add("--max-loss", metavar="PERCENT", type=_percentage, help=text)
    add("--stream", action="store_true", default=None, help="send and receive at full speed in both directions")
    add("--seed", metavar="N", type=_seed, help="seed of the random bytes (default: 0)")
    add("--plot", metavar="FILE.svg", type=_plot, help="plot latency by percentile, as SVG")

    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print one JSON object")
    add("-h", "--help", action="help", help="print this help and exit")
    return parser


def _reject(parser: argparse.ArgumentParser, argument: str) -> NoReturn:
    known = parser._option_string_actions  # noqa: SLF001  (argparse has no public list of options)
    option = printable(argument.partition("=")[0])
    if f"-{option}" in known:  # as Go writes options
        parser.error(f"unknown option {option}; did you mean -{option}?")
    if not option.startswith("--"):
        option = option[:2]  # the value may follow at once: -c10
    for instead, options in _SIMILAR.items():
        if option in options:
            parser.error(f"unknown option {option}; write {instead}")
    near = closest(option, known)
    parser.error(f"unknown option {option}" + (f"; did you mean {near}?" if near else ""))


def _target(parser: argparse.ArgumentParser, words: Sequence[str]) -> TcpAddress | UnixAddress | UdpAddress:
    """Return the target, which may also be a port alone or HOST and PORT."""
    match words:
        case []:
            parser.error("TARGET is missing: write the server's address, such as 127.0.0.1:8000")
        case [port] if _is_number(port.removeprefix("udp:")):
            text = f"udp:{port[3:]}" if port.startswith("udp:") else f":{port}"
        case [host, port] if _is_number(port) and (":" not in host or _family(_unbracketed(host)) is not None):
            text = f"[{_unbracketed(host)}]:{port}" if ":" in host else f"{host}:{port}"
        case [text]:
            pass
        case _:
            parser.error(f"{words[1]!r} is a second TARGET: give only one")
    try:
        return _server(text)
    except ValueError as error:
        parser.error(f"TARGET {error}")


def _server(text: str) -> TcpAddress | UnixAddress | UdpAddress:
    if url := re.match(r"([a-z][a-z0-9+.-]*)://(?:[^/?#@]*@)?([^/?#]+)", text, re.ASCII | re.IGNORECASE):
        scheme, host = url[1].lower(), url[2]
        port = "" if re.search(r":[0-9]+$", host) else {"http": ":80", "https": ":443"}.get(scheme, ":PORT")
        tls = " --tls" if scheme in {"https", "tls", "ssl", "tcps"} else ""
        udp = "udp:" if scheme == "udp" else ""
        msg = f"{text!r} is a URL: write {udp}{host}{port}{tls}"
        raise addresses.AddressError(msg)
    if text.startswith(("/", "./", "@")):
        msg = f"{text!r} has no port: for a unix socket, write unix:{text}"
        raise addresses.AddressError(msg)
    try:
        address = addresses.parse(text)
    except addresses.AddressError as error:
        raise addresses.AddressError(str(error).replace(addresses.FORMS, _FORMS)) from None
    if not isinstance(address, TcpAddress | UnixAddress | UdpAddress):
        msg = f"{text!r}: only a server inherits sockets; give the address that they are bound to"
        raise addresses.AddressError(msg)
    if not isinstance(address, UnixAddress) and not address.port:
        msg = f"{text!r}: a server cannot listen on port 0: use 1 to {addresses.HIGHEST_PORT}"
        raise addresses.AddressError(msg)
    return address


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _contradictions(given: argparse.Namespace) -> list[tuple[object, str]]:
    """Return pairs of a condition and the message to show if it is true."""
    unix = isinstance(given.target, UnixAddress)
    of_tls = ("ca", "cert", "key", "server_name", "insecure")
    tls_options = [f"--{name.replace('_', '-')}" for name in of_tls if getattr(given, name)]
    proxy = given.proxy_v1 or given.proxy_v2
    udp = isinstance(given.target, UdpAddress)
    return [
        (udp and given.tls, "--tls: there is no TLS over UDP; remove --tls"),
        (udp and tls_options, f"{', '.join(tls_options)}: there is no TLS over UDP; remove it"),
        (udp and proxy, "a PROXY header starts a connection, but UDP has none: remove the --proxy option"),
        (udp and given.half_close, "--half-close ends a connection, but UDP has none: remove it"),
        (udp and given.connections, "--connections: UDP has none; --window N sets the datagrams in flight"),
        (udp and given.pipeline, "--pipeline is for connections: for UDP, write --window"),
        (udp and given.stream, "--stream is for connections: for UDP, give --rate or --window"),
        (udp and given.seed is not None, "--seed has no effect on UDP, as the bytes depend on a random session"),
        (
            udp and (given.size or 0) > _LARGEST_DATAGRAM,
            f"--size: a datagram has at most {_LARGEST_DATAGRAM:,} bytes, not {given.size:,}" if given.size else "",
        ),
        (given.size == 0 and not udp, "--size 0: only a datagram (udp:HOST:PORT) may be empty; use 1 byte or more"),
        (given.window and not udp, "--window is for UDP: for connections, write --pipeline"),
        (given.max_loss is not None and not udp, "--max-loss is for UDP: over TCP, a lost message is always an error"),
        (given.window and (given.rate or given.interval), "--window waits for echoes, --rate does not: give only one"),
        (given.rate and given.interval, "--interval TIME is the same as --rate 1/TIME: give only one"),
        (given.stream and given.interval, "--stream sends at full speed, not at an --interval: give only one"),
        (given.interval and given.pipeline, "--interval never waits for an echo, so --pipeline has no effect"),
        (given.count and given.duration, "--count and --duration both end the measurement: give only one"),
        (given.stream and given.count, "--stream has no messages to --count: give --duration"),
        (given.stream and given.rate, "--stream sends at full speed, --rate at a fixed rate: give only one"),
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
            "--proxy-v1 and --proxy-v2: a connection has only one header; give only one of them",
        ),
        (unix and given.source, "--source is an IP address, but the target is a unix socket"),
        (
            unix and (given.dscp is not None or given.ttl),
            "--dscp and --ttl are for IP, but the target is a unix socket",
        ),
        (unix and proxy, "a PROXY header contains IP addresses, but the target is a unix socket"),
        (len(_families(given)) > 1, f"addresses of different IP families: {', '.join(_families(given).values())}"),
    ]


def _families(given: argparse.Namespace) -> dict[int, str]:
    """Return the IP families of the given addresses, each with an option that has it."""
    claim = given.proxy_v1 or given.proxy_v2
    hosts = {
        "TARGET": "" if isinstance(given.target, UnixAddress) else given.target.host,
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
        dscp=given.dscp,
        ttl=given.ttl,
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
    except ValueError as error:
        parser.error(str(error))


def _value(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return the parser of a value, with errors in the form that argparse shows."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


@_value
def _server_name(text: str) -> str:
    name = _unbracketed(text)
    if _family(name) is None and not addresses.is_name(name):
        msg = f"{text!r} is not a host name or an IP address"
        raise ValueError(msg)
    return name


def _unbracketed(text: str) -> str:
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


@_value
def _ip(text: str) -> str:
    host = _unbracketed(text)
    if _family(host) is None:
        msg = f"{text!r} is not an IP address"
        raise ValueError(msg)
    return host


@_value
def _claim(text: str) -> TcpAddress:
    try:
        address = addresses.parse(text)
    except addresses.AddressError as error:
        raise ValueError(str(error).replace(addresses.FORMS, "SRC:PORT")) from error
    if not isinstance(address, TcpAddress) or _family(address.host) is None or "%" in address.host:
        msg = f"{text!r} is not an IP address and a port, which a PROXY header contains"
        raise ValueError(msg)
    return address


@_value
def _dscp(text: str) -> int:
    """Read a code point: a number, CS0 to CS7 (RFC 2474), AF11 to AF43 (RFC 2597), EF (RFC 3246) or LE (RFC 8622)."""
    name = text.upper()
    if re.fullmatch("[0-9]{1,2}", text, re.ASCII) and int(text) <= _HIGHEST_DSCP:
        return int(text)
    if match := re.fullmatch("CS([0-7])", name):
        return int(match[1]) * 8
    if match := re.fullmatch("AF([1-4])([1-3])", name):
        return int(match[1]) * 8 + int(match[2]) * 2
    if name in {"EF", "LE"}:
        return {"EF": 46, "LE": 1}[name]
    msg = f"{text!r} is not a DSCP: use 0 to {_HIGHEST_DSCP}, CS0 to CS7, AF11 to AF43, EF or LE"
    raise ValueError(msg)


@_value
def _ttl(text: str) -> int:
    if not (re.fullmatch("[0-9]{1,3}", text, re.ASCII) and 0 < int(text) <= _HIGHEST_TTL):
        msg = f"{text!r} is not a TTL: use 1 to {_HIGHEST_TTL}"
        raise ValueError(msg)
    return int(text)


@_value
def _percentage(text: str) -> Fraction:
    from fractions import Fraction  # noqa: PLC0415  (a quick check does not need it)

    match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%?", text, re.ASCII)
    if match is None or Fraction(match[1]) > 100:
        msg = f"{text!r} is not a percentage: use 0 to 100, such as 0.5 or 0.5%"
        raise ValueError(msg)
    return Fraction(match[1])


@_value
def _number(text: str) -> int:
    match = re.fullmatch("0*([1-9][0-9]{0,8})([km]?)", text, re.ASCII | re.IGNORECASE)
    if match is None:
        msg = f"{text!r} is not a number of at least 1: write for example 50 or 10k"
        raise ValueError(msg)
    return int(match[1]) * _FACTORS[match[2].lower()]


@_value
def _seed(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text, re.ASCII):
        msg = f"{text!r} is not a whole number: use 0 or more"
        raise ValueError(msg)
    return int(text)


@_value
def _size(text: str) -> int:
    from echod import units  # noqa: PLC0415  (a quick check does not need it)

    size = units.parse_size(text)
    if size > _LARGEST_SIZE:
        msg = f"{text!r} is not a valid size: use at most 1TiB"
        raise ValueError(msg)
    return size


def _seconds(most: float, limit: str) -> Callable[[str], float]:
    """Return the parser of a time up to a limit."""

    @_value
    def convert(text: str) -> float:
        from echod import units  # noqa: PLC0415  (most checks do not need it)

        seconds = units.parse_duration(text)
        if not 0 < seconds <= most:
            msg = f"{text!r}: use more than 0, at most {limit}"
            raise ValueError(msg)
        return seconds

    return convert


@_value
def _rate(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([km]?)(?:/s)?", text, re.ASCII | re.IGNORECASE)
    rate = float(match[1]) * _FACTORS[match[2].lower()] if match else 0.0
    if not 0 < rate <= _HIGHEST_RATE:
        msg = f"{text!r} is not a rate: use messages per second, more than 0 and at most 10M, such as 500 or 10k"
        raise ValueError(msg)
    return rate


@_value
def _plot(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in {".svg", ""}:  # a device or a pipe has no suffix
        msg = f"{text!r}: the plot is an SVG file: write {str(path.with_suffix('.svg'))!r}"
        raise ValueError(msg)
    return path
