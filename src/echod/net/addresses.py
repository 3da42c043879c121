"""Addresses: text to values and back, and what the kernel says of a socket. No socket is opened here."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

FORMS = "HOST:PORT, [V6]:PORT, :PORT, unix:PATH, unix:@NAME or systemd:NAME"
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
    """The text is no address; the message says why and what would be one."""


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP port of a host. An empty host stands for all addresses of both families; port 0 for a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        return join_host_port(self.host, self.port)


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A unix socket: a path, or behind an @ a name in the abstract namespace of Linux (unix(7))."""

    path: str

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        return f"unix:{self.path}"

    @property
    def sockaddr(self) -> str:
        """What bind(2) and connect(2) take."""
        return f"\0{self.path[1:]}" if self.path.startswith("@") else self.path


@dataclass(frozen=True, slots=True)
class InheritedAddress:
    """The sockets that whoever started the process has opened, and passed on under one name (sd_listen_fds(3))."""

    name: str

    def __str__(self) -> str:
        """Return the text that `parse` reads back."""
        return f"systemd:{self.name}"


Address = TcpAddress | UnixAddress | InheritedAddress


def join_host_port(host: str, port: int) -> str:
    """Return `host:port`, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def from_sockaddr(sockaddr: Any) -> TcpAddress | UnixAddress | None:
    """Return what `getsockname`, `getpeername` or `accept` gives, for AF_INET, AF_INET6 and AF_UNIX.

    An IPv4 address that a socket of both families shows as an IPv6 one is given as what it is. A link-local address
    gets its zone, without which it cannot be connected to. None is a unix socket without a name, as clients have them,
    and a family of another kind.
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


def _zone(scope: int) -> str:
    try:
        return socket.if_indextoname(scope)
    except OSError:  # the interface is gone
        return str(scope)


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def network(text: str) -> Network:
    """Read a network of clients. A network of IPv4-mapped addresses is the IPv4 network that `from_sockaddr` shows.

    Raises:
        ValueError: the text is not a network, or has bits set beyond its prefix.

    """
    found = ipaddress.ip_network(text)
    mapped = found.network_address.ipv4_mapped if isinstance(found, ipaddress.IPv6Network) else None
    if mapped is None or found.prefixlen < _MAPPED_PREFIX:
        return found
    return ipaddress.IPv4Network((mapped, found.prefixlen - _MAPPED_PREFIX))


def is_within(host: str, networks: Iterable[Network]) -> bool:
    """Tell whether an IP address belongs to one of some networks. A network with a zone has addresses of that zone only."""
    address = ipaddress.ip_address(host)
    return any(address in each and _scope(each.network_address) in {None, _scope(address)} for each in networks)


def _scope(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    return address.scope_id if isinstance(address, ipaddress.IPv6Address) else None


def parse(text: str) -> Address:
    """Read an address.

    Two texts of one IPv6 address (`[0:0::1]:7`, `[::1]:7`) or name (`Host:7`, `host:7`) give equal values.

    Raises:
        AddressError: the text is none of the forms, or its port is none.

    """
    if text.startswith("unix:"):
        return _unix(text.removeprefix("unix:"), text)
    if text.startswith("systemd:"):
        return _inherited(text.removeprefix("systemd:"), text)
    return _tcp(text)


def parse_bindable(text: str) -> Address:
    """Read an address to listen on, as `parse` does.

    Raises:
        AddressError: the text is not an address, or one that no socket can be bound to.

    """
    address = parse(text)
    if isinstance(address, TcpAddress) and ":" in address.host:
        host = ipaddress.IPv6Address(address.host)
        if host.ipv4_mapped:
            msg = f"{text!r}: a socket for IPv6 takes no IPv4 clients: write {host.ipv4_mapped}:{address.port}"
            raise AddressError(msg)
        if host.is_link_local and host.scope_id is None:
            msg = f"{text!r}: a link-local address needs its interface: write [{host}%eth0]:{address.port}"
            raise AddressError(msg)
    return address


def _unix(path: str, text: str) -> UnixAddress:
    size = len(os.fsencode(path))
    if path in {"", "@"} or not path.isprintable():
        msg = f"{text!r} names no socket: write unix:PATH or unix:@NAME"
        raise AddressError(msg)
    if size > _LONGEST_PATH + path.startswith("@"):
        msg = f"{text!r}: a unix socket's path has at most {_LONGEST_PATH} bytes, not {size}"
        raise AddressError(msg)
    return UnixAddress(path)


def _inherited(name: str, text: str) -> InheritedAddress:
    # As systemd has them: LISTEN_FDNAMES separates names by colons.
    if not (name.isascii() and name.isprintable()) or not name or ":" in name:
        msg = f"{text!r} names no inherited socket: write systemd:NAME, as in FileDescriptorName= of the socket's unit"
        raise AddressError(msg)
    return InheritedAddress(name)


def _tcp(text: str) -> TcpAddress:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        msg = f"{text!r} has no port: write {FORMS}"
        raise AddressError(msg)
    if host.startswith("[") and host.endswith("]"):
        host = _ipv6(host[1:-1], text)
    elif ":" in host and _IPV6_CHARACTERS.issuperset(host.partition("%")[0]):
        msg = f"{text!r}: an IPv6 address goes into brackets, and its port after them: [V6]:PORT"
        raise AddressError(msg)
    elif host and not is_name(host):
        msg = f"{text!r}: {host!r} is no host name: write {FORMS}"
        raise AddressError(msg)
    else:
        host = host.lower()  # an IPv6 zone names an interface, whose case counts
    return TcpAddress(host, _port(port, text))


def is_name(text: str) -> bool:
    """Tell whether a text is a host name: one that getaddrinfo(3), SNI and the idna codec take without a ValueError."""
    host = text
    if not host.isascii():  # the codec's tables of Unicode take their time to import
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
    if address is None or not host.isprintable():  # a zone may hold anything
        msg = f"{text!r}: {host!r} is no IPv6 address"
        raise AddressError(msg)
    return str(address)


def _port(port: str, text: str) -> int:
    # The length comes first: int() of a few thousand digits is an error of its own.
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= HIGHEST_PORT):
        msg = f"{text!r}: {port!r} is no port: write a number from 0 to {HIGHEST_PORT}"
        raise AddressError(msg)
    return int(port)
