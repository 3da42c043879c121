"""Addresses to listen on: text to values and back. Nothing here touches a socket."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from typing import Any

FORMS = "HOST:PORT, [V6]:PORT, :PORT, unix:PATH, unix:@NAME or systemd:NAME"
HIGHEST_PORT = 65535

# struct sockaddr_un holds 108 bytes: a path and its NUL, or the NUL that marks an abstract name and the name.
_LONGEST_PATH = 107

# Of a host name, in ASCII (RFC 1035, section 2.3.4).
_LONGEST_LABEL = 63
_LONGEST_NAME = 253

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

    An IPv4 address that a socket of both families shows as an IPv6 one is given as what it is. None is a unix socket
    without a name, as clients have them, and a family of another kind.
    """
    match sockaddr:
        case (str(host), int(port), *_):
            if host.startswith("::ffff:"):
                # A zone belongs to a link-local address only, which is never a mapped one.
                host = str(ipaddress.IPv6Address(host).ipv4_mapped or host)
            return TcpAddress(host, port)
        case str(path) if path:
            return UnixAddress(path)
        case bytes(name) if name:
            return UnixAddress("@" + os.fsdecode(name[1:]))
        case _:
            return None


def parse(text: str) -> Address:
    """Read an address to listen on.

    Two texts of one IPv6 address (`[0:0::1]:7`, `[::1]:7`) or name (`Host:7`, `host:7`) give equal values.

    Raises:
        AddressError: the text is none of the forms, or its port is none.

    """
    if text.startswith("unix:"):
        return _unix(text.removeprefix("unix:"), text)
    if text.startswith("systemd:"):
        return _inherited(text.removeprefix("systemd:"), text)
    return _tcp(text)


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
