"""The limit of clients per address."""

from __future__ import annotations

import ipaddress


class Quota:
    """Count the clients of each address, up to a limit. 0 means no limit.

    IPv6 clients count per /64 network, because a single host may use any address in it. Link-local addresses count one
    by one, with their zone: all hosts of an interface share one /64 network. Clients of a unix socket are not counted.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._clients: dict[object, int] = {}

    def reconfigure(self, limit: int) -> None:
        """Apply another limit from now on."""
        self._limit = limit

    def acquire(self, host: str) -> bool:
        """Count a client; return False if its IP address has reached the limit."""
        key = network(host)
        count = self._clients.get(key, 0)
        if self._limit and count >= self._limit:
            return False
        self._clients[key] = count + 1
        return True

    def release(self, host: str) -> None:
        """Stop counting a client that `acquire` has counted."""
        key = network(host)
        count = self._clients[key] - 1
        if count:
            self._clients[key] = count
        else:
            del self._clients[key]


def network(host: str) -> object:
    """Return the network that an IP address counts for."""
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host)
    if address.is_link_local:
        return str(address)
    # HAProxy sends an IPv4 client as a mapped address if it connected to a socket of both families.
    return str(address.ipv4_mapped) if address.ipv4_mapped else int(address) >> 64
