"""Addresses to listen on: text to values and back. Nothing here touches a socket."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

FORMS = "HOST:PORT, [V6]:PORT or :PORT"
HIGHEST_PORT = 65535

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
    """A unix socket's path; it begins with "@" for an abstract name."""

    path: str

    def __str__(self) -> str:
        """Return the address as text."""
        return f"unix:{self.path}"


def join_host_port(host: str, port: int) -> str:
    """Return `host:port`, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def from_sockaddr(sockaddr: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """Return the text of what `getsockname` or `accept` gives for AF_INET and AF_INET6."""
    return join_host_port(sockaddr[0], sockaddr[1])


def parse(text: str) -> TcpAddress:
    """Read an address to listen on.

    Two texts of one IPv6 address (`[0:0::1]:7`, `[::1]:7`) or name (`Host:7`, `host:7`) give equal values.

    Raises:
        AddressError: the text is none of the forms, or its port is none.

    """
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        msg = f"{text!r} has no port: write {FORMS}"
        raise AddressError(msg)
    if host.startswith("[") and host.endswith("]"):
        host = _ipv6(host[1:-1], text)
    elif ":" in host and _IPV6_CHARACTERS.issuperset(host.partition("%")[0]):
        msg = f"{text!r}: an IPv6 address goes into brackets, and its port after them: [V6]:PORT"
        raise AddressError(msg)
    elif not _is_name(host):
        msg = f"{text!r}: {host!r} is no host name: write {FORMS}"
        raise AddressError(msg)
    else:
        host = host.lower()  # an IPv6 zone names an interface, whose case counts
    return TcpAddress(host, _port(port, text))


def _is_name(host: str) -> bool:
    try:
        host.encode("idna")  # as getaddrinfo does, whose error for an empty or too long label is no OSError
    except UnicodeError:
        return False
    return all(char.isalnum() or char in "-._" for char in host)


def _ipv6(host: str, text: str) -> str:
    try:
        address = str(ipaddress.IPv6Address(host))
    except ipaddress.AddressValueError:
        address = ""
    if not address or not address.isprintable():  # a zone may hold anything
        msg = f"{text!r}: {host!r} is no IPv6 address"
        raise AddressError(msg)
    return address


def _port(port: str, text: str) -> int:
    # The length comes first: int() of a few thousand digits is an error of its own.
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= HIGHEST_PORT):
        msg = f"{text!r}: {port!r} is no port: write a number from 0 to {HIGHEST_PORT}"
        raise AddressError(msg)
    return int(port)
