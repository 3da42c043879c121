"""Convert addresses from text to values and back. This module opens no socket."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

FORMS = (
    "HOST:PORT, [V6]:PORT, :PORT, unix:PATH, unix:@NAME or systemd:NAME; for UDP udp:HOST:PORT, udp:[V6]:PORT, udp::PORT "
    "or udp:systemd:NAME"
)
HIGHEST_PORT = 65535

# struct sockaddr_un holds 108 bytes: a path and its NUL, or the NUL that marks an abstract name and the name.
_LONGEST_PATH = 107

# Of a host name, in ASCII (RFC 1035, section 2.3.4).
_LONGEST_LABEL = 63
_LONGEST_NAME = 253

# Bits in front of the IPv4 address in an IPv4-mapped one: RFC 4291, 2.5.5.2.
_MAPPED_PREFIX = 96

_IPV6_CHARACTERS = frozenset("0123456789abcdefABCDEF:.")


class AddressError(ValueError):
    """The text is not an address. The message has the reason and the valid forms."""


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP port of a host. An empty host means all addresses of both families, and port 0 a free port."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        return join_host_port(self.host, self.port)


@dataclass(frozen=True, slots=True)
class UdpAddress:
    """A UDP port of a host. An empty host means all addresses of both families, and port 0 a free port."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        return f"udp:{join_host_port(self.host, self.port)}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A unix socket: a path, or "@" and a name in the abstract namespace of Linux (unix(7))."""

    path: str

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        return f"unix:{self.path}"

    @property
    def sockaddr(self) -> str:
        """The address for bind(2) and connect(2)."""
        return f"\0{self.path[1:]}" if self.path.startswith("@") else self.path


@dataclass(frozen=True, slots=True)
class InheritedAddress:
    """The sockets that the service manager has passed to the process under one name (sd_listen_fds(3))."""

    name: str
    datagram: bool = False
    """Whether the UDP sockets of that name are meant, instead of its stream sockets."""

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        return f"udp:systemd:{self.name}" if self.datagram else f"systemd:{self.name}"


Address = TcpAddress | UdpAddress | UnixAddress | InheritedAddress


def join_host_port(host: str, port: int) -> str:
    """Return `host:port`, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def from_sockaddr(sockaddr: Any) -> TcpAddress | UnixAddress | None:
    """Return an address of `getsockname`, `getpeername` or `accept` as a value.

    An IPv4-mapped IPv6 address is returned as an IPv4 address. A link-local address gets its zone, which connect(2)
    needs. For a unix socket without a name, as clients have it, and for other families, the result is None.
    """
    match sockaddr:
        case (str(host), int(port), _, int(scope)) if scope:
            return TcpAddress(f"{host.partition('%')[0]}%{_zone(scope)}", port)
        case (str(host), int(port), *_):
            if host.startswith("::ffff:"):
                host = str(ipaddress.IPv6Address(host).ipv4_mapped or host)
            return TcpAddress(host, port)
        case str(path) if path:
            return UnixAddress(path)
        case bytes(name) if name:
            return UnixAddress("@" + os.fsdecode(name[1:]))
        case _:
            return None


def text(sockaddr: Any) -> str:
    """Return an address of `from_sockaddr` as text. For other families, it is Python's text of the address."""
    match sockaddr:
        case (str(host), int(port)):  # IPv4
            return f"{host}:{port}"
    return str(from_sockaddr(sockaddr) or sockaddr)


def host(sockaddr: Any) -> str | None:
    """Return the IP address of an address of `from_sockaddr`, or None for other families."""
    match sockaddr:
        case (str(host), int(_)):  # IPv4
            return host
    address = from_sockaddr(sockaddr)
    return address.host if isinstance(address, TcpAddress) else None


def of_socket(sock: socket.socket) -> TcpAddress | UdpAddress | UnixAddress | None:
    """Return the address that a socket is bound to, or None if it has none.

    Raises:
        OSError: getsockname(2) failed.

    """
    address = from_sockaddr(sock.getsockname())
    if isinstance(address, TcpAddress) and sock.type == socket.SOCK_DGRAM:
        return UdpAddress(address.host, address.port)
    return address


def _zone(scope: int) -> str:
    try:
        return socket.if_indextoname(scope)
    except OSError:  # the interface is gone
        return str(scope)


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def network(text: str) -> Network:
    """Read a network of clients. A network of IPv4-mapped addresses is the IPv4 network that `from_sockaddr` shows.

    Raises:
        AddressError: the text is not a network, or has bits set beyond its prefix.

    """
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        msg = f"{text!r} is not a network: write for example 10.0.0.0/8, 2001:db8::/32 or an address"
        raise AddressError(msg) from None
    if "%" in text:
        address, *prefix = text.split("/")
        right = "/".join((address.partition("%")[0], *prefix))
        msg = f"{text!r}: a network has no zone: write {right}, which matches on every interface"
        raise AddressError(msg)
    found: Network = interface.network
    mapped = found.network_address.ipv4_mapped if isinstance(found, ipaddress.IPv6Network) else None
    if mapped is not None and found.prefixlen >= _MAPPED_PREFIX:
        found = ipaddress.IPv4Network((mapped, found.prefixlen - _MAPPED_PREFIX))
    if interface.ip != interface.network.network_address:
        msg = f"{text!r} has host bits set: write {found}, or {interface.ip} for that address alone"
        raise AddressError(msg)
    return found


def is_within(host: str, networks: Iterable[Network]) -> bool:
    """Tell whether an IP address belongs to one of the networks, whatever its zone."""
    address = ipaddress.ip_address(host)
    return any(address in each for each in networks)


def parse(text: str) -> Address:
    """Read an address.

    Two texts of one IPv6 address (`[0:0::1]:7`, `[::1]:7`) or name (`Host:7`, `host:7`) give equal values.

    Raises:
        AddressError: the text is not an address.

    """
    if text.startswith("unix:"):
        return _unix(text.removeprefix("unix:"), text)
    datagram = text.startswith("udp:")
    rest = text.removeprefix("udp:")
    if rest.startswith("systemd:"):
        return InheritedAddress(_inherited_name(rest.removeprefix("systemd:"), text), datagram)
    if rest.startswith("unix:"):
        msg = f"{text!r}: a unix socket has no UDP: write udp:HOST:PORT, or {rest} for a stream"
        raise AddressError(msg)
    return (UdpAddress if datagram else TcpAddress)(*_host_and_port(text))


def parse_bindable(text: str) -> Address:
    """Read an address to listen on, as `parse` does.

    Raises:
        AddressError: the text is not an address, or no socket can be bound to it.

    """
    if text.startswith(("*:", "udp:*:")):
        msg = f"{text!r}: '*' is not a host name: write {text.replace('*', '', 1)} for all addresses"
        raise AddressError(msg)
    address = parse(text)
    if isinstance(address, TcpAddress | UdpAddress) and ":" in address.host:
        host = ipaddress.IPv6Address(address.host)
        if host.ipv4_mapped:
            right = type(address)(str(host.ipv4_mapped), address.port)
            msg = f"{text!r}: an IPv6 socket accepts no IPv4 clients: write {right}"
            raise AddressError(msg)
        if host.is_link_local and host.scope_id is None:
            right = type(address)(f"{host}%eth0", address.port)
            msg = f"{text!r}: a link-local address needs its interface: write {right}"
            raise AddressError(msg)
    return address


def _unix(path: str, text: str) -> UnixAddress:
    size = len(os.fsencode(path))
    if path in {"", "@"} or not path.isprintable():
        msg = f"{text!r} does not name a socket: write unix:PATH or unix:@NAME"
        raise AddressError(msg)
    if size > _LONGEST_PATH + path.startswith("@"):
        msg = f"{text!r}: a unix socket's path has at most {_LONGEST_PATH} bytes, not {size}"
        raise AddressError(msg)
    return UnixAddress(path)


def _inherited_name(name: str, text: str) -> str:
    # The rules of systemd. LISTEN_FDNAMES separates names by colons.
    if not (name.isascii() and name.isprintable()) or not name or ":" in name:
        msg = f"{text!r} does not name an inherited socket: write systemd:NAME, as in FileDescriptorName= of the socket's unit"
        raise AddressError(msg)
    return name


def _host_and_port(text: str) -> tuple[str, int]:
    udp = "udp:" if text.startswith("udp:") else ""
    rest = text.removeprefix(udp)
    host, colon, port = rest.rpartition(":")
    if rest.isascii() and rest.isdecimal():
        number = _port(rest, text)
        msg = f"{text!r} is a port without a host: write {udp}127.0.0.1:{number}, or {udp}:{number} for all addresses"
        raise AddressError(msg)
    if not colon or text.endswith("]"):
        msg = f"{text!r} has no port: write {FORMS}"
        raise AddressError(msg)
    if host.startswith("[") and host.endswith("]"):
        host = _ipv6(host[1:-1], text)
    elif ":" in host and _IPV6_CHARACTERS.issuperset(host.partition("%")[0]):
        msg = f"{text!r}: an IPv6 address needs brackets: write {udp}[V6]:PORT"
        raise AddressError(msg)
    elif host and not is_name(host):
        msg = f"{text!r}: {host!r} is not a host name: write {FORMS}"
        raise AddressError(msg)
    else:
        _check_ipv4(host, text)
        host = host.lower()  # not for an IPv6 zone: interface names are case-sensitive
    return host, _port(port, text)


def _check_ipv4(host: str, text: str) -> None:
    """Refuse digits and dots that getaddrinfo(3) does not read as an IPv4 address, or reads as octal numbers."""
    labels = host.removesuffix(".").split(".")
    if not all(label.isascii() and label.isdecimal() for label in labels):
        return
    if any(label.startswith("0") and len(label) > 1 for label in labels):
        decimal = ".".join(label.lstrip("0") or "0" for label in labels)
        msg = f"{text!r}: {host!r} is ambiguous, as a number with a leading zero may be octal: write {decimal} if it is decimal"
        raise AddressError(msg)
    try:
        socket.inet_aton(host)
    except OSError:
        msg = f"{text!r}: {host!r} is not an IPv4 address: write four numbers of at most 255"
        raise AddressError(msg) from None


def is_name(text: str) -> bool:
    """Tell whether a text is a host name that getaddrinfo(3), SNI and the idna codec accept."""
    host = text
    if not host.isascii():  # the codec's Unicode tables are slow to import
        try:
            host = host.encode("idna").decode("ascii")
        except UnicodeError:
            return False
    host = host.removesuffix(".")
    return (
        len(host) <= _LONGEST_NAME
        and all(0 < len(label) <= _LONGEST_LABEL for label in host.split("."))
        and all(char.isalnum() or char in "-._" for char in text)
    )


def _ipv6(host: str, text: str) -> str:
    try:
        address = ipaddress.IPv6Address(host)
    except ipaddress.AddressValueError:
        address = None
    if address is None or not host.isprintable():  # a zone may contain any character
        msg = f"{text!r}: {host!r} is not an IPv6 address"
        raise AddressError(msg)
    return str(address)


def _port(port: str, text: str) -> int:
    # Check the length first: int() raises an exception for thousands of digits.
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= HIGHEST_PORT):
        msg = f"{text!r}: {port!r} is not a port: use 0 to {HIGHEST_PORT}"
        raise AddressError(msg)
    return int(port)
