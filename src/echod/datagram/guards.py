"""Guards against loops and reflection: the datagrams that get no answer. Without I/O.

The rules are those of inetd in OpenBSD, and a list of networks. CVE-1999-0103 and CVE-2024-2169 describe the loops.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Literal, NamedTuple

from echod.net.addresses import is_within

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable

    from echod.net.addresses import Network

Cause = Literal["multicast", "port", "self", "network", "rate", "truncated"]
"""The reasons for a refusal, in the order of the checks."""


class OwnAddresses:
    """The addresses of the daemon's own UDP listeners.

    Args:
        bound: host and port of each socket.
        is_local: tells whether an IP address belongs to this host. It is asked only if the port is that of a listener on
            all addresses.

    """

    def __init__(self, bound: Iterable[tuple[str, int]], is_local: Callable[[str], bool]) -> None:
        bound = list(bound)
        self._bound = frozenset(bound)
        # An inherited IPv6 socket may receive IPv4 too, so a wildcard stands for both families.
        self._wildcard_ports = frozenset(port for host, port in bound if is_wildcard(host))
        self._is_local = is_local

    def contains(self, host: str, port: int) -> bool:
        """Tell whether a datagram from there was sent by an own listener."""
        return (host, port) in self._bound or (port in self._wildcard_ports and self._is_local(host))


class Guards(NamedTuple):
    """The checks of a listener that depend on the addresses of a datagram only."""

    refused_ports: Collection[int]
    allowed: Collection[Network]
    """Empty: everyone."""
    own: OwnAddresses

    def refusal(self, host: str, port: int, local: str) -> Cause | None:
        """Return the reason to refuse a datagram, or None.

        Args:
            host: the source, an IP address that may have a zone.
            port: of the source.
            local: the destination, an IP address that may have a zone.

        """
        if not (is_unicast(host) and is_unicast(local)):
            return "multicast"
        if port in self.refused_ports:
            return "port"
        if self.own.contains(host, port):
            return "self"
        if self.allowed and not is_within(host, self.allowed):
            return "network"
        return None


def is_wildcard(host: str) -> bool:
    """Tell whether a bound address means all addresses."""
    return host in {"0.0.0.0", "::"}  # noqa: S104  (nothing is bound here)


def is_unicast(host: str) -> bool:
    """Tell whether an address can belong to a single host: not multicast, 0/8, 255/8, unspecified or IPv4-mapped."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv4Address):
        return not address.is_multicast and address.packed[0] not in {0, 255}
    return not (address.is_multicast or address.is_unspecified or address.ipv4_mapped)


def source_of(host: str) -> Hashable:
    """Return the key of the source that shares a bucket: an IPv4 address, or an IPv6 /64 network.

    A single host may use any address in a /64 network. All hosts of an interface share the link-local network, so there
    each address counts by itself, with its zone.
    """
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host)
    return host if address.is_link_local else int(address) >> 64
