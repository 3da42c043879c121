"""The limit of clients per address."""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import TYPE_CHECKING

from echod.net.addresses import TcpAddress

if TYPE_CHECKING:
    from echod.net.addresses import UnixAddress


class Quota:
    """Count the clients of each address, up to a limit. 0 means no limit.

    IPv6 clients count per /64 network, because a single host may use any address in it. Link-local addresses count one
    by one, with their zone: all hosts of an interface share one /64 network. Clients of a unix socket are not counted.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._clients = Counter[object]()

    def reconfigure(self, limit: int) -> None:
        """Apply another limit from now on."""
        self._limit = limit

    def acquire(self, client: TcpAddress | UnixAddress | None) -> bool:
        """Count a client; return False if its address has reached the limit."""
        key = _network(client)
        if key is None:
            return True
        if self._limit and self._clients[key] >= self._limit:
            return False
        self._clients[key] += 1
        return True

    def release(self, client: TcpAddress | UnixAddress | None) -> None:
        """Stop counting a client that `acquire` has counted."""
        if (key := _network(client)) is not None:
            self._clients[key] -= 1
            if not self._clients[key]:
                del self._clients[key]


def _network(client: TcpAddress | UnixAddress | None) -> object:
    if not isinstance(client, TcpAddress):
        return None
    if ":" not in client.host:
        return client.host
    address = ipaddress.IPv6Address(client.host)
    if address.is_link_local:
        return str(address)
    # HAProxy sends an IPv4 client as a mapped address if it connected to a socket of both families.
    return str(address.ipv4_mapped) if address.ipv4_mapped else int(address) >> 64
