"""Find the clients with the most traffic, and the paused ones with the least."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from typing import TYPE_CHECKING, NamedTuple

from echod.admin.snapshot import STEP, Traffic, state_of
from echod.net import kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from echod.admin.snapshot import Count
    from echod.connection.echo import EchoSession
    from echod.net.kernel import TcpInfo
    from echod.server.client import Client

# Clients per list in a report.
_TOP = 10

# The shortest time in seconds over which a rate is measured.
SHORTEST_SPAN = 0.9


class _Sample(NamedTuple):
    time: float
    clients: dict[int, int]
    """Bytes received, by the id() of each connected client."""


class _Ranked(NamedTuple):
    rate: float
    received: int
    listener: str
    client: Client


class Notable:
    """Rank clients. Their rates are measured since the previous report that is at least 0.9 seconds old.

    Args:
        now: the loop's time.

    """

    def __init__(self, now: float) -> None:
        self._base = self._latest = _Sample(now, {})

    async def take(self, counts: Mapping[str, Count], now: float) -> tuple[list[Traffic], list[Traffic]]:
        """Return the clients with the most traffic, and the paused clients with the least.

        If the latest sample is new, store each client's bytes in it.
        """
        if now - self._latest.time >= SHORTEST_SPAN:
            self._base = self._latest
            self._latest = _Sample(now, {})
        base, fresh = self._base, self._latest.time == now
        busiest: list[_Ranked] = []
        paused: list[_Ranked] = []
        for name, count in counts.items():
            for first in range(0, len(count.clients), STEP):
                step = slice(first, first + STEP)
                clients, traffic = count.clients[step], count.traffic[step]
                if fresh:
                    self._latest.clients.update(zip(map(id, clients), traffic, strict=True))
                entries = [
                    _Ranked(_rate(client, received, base, now), received, name, client)
                    for client, received in zip(clients, traffic, strict=True)
                    if received
                ]
                stuck = (entry for entry in entries if state_of(entry.client.session) == "paused")
                busiest = heapq.nlargest(_TOP, itertools.chain(busiest, entries), key=lambda entry: entry[:2])
                paused = heapq.nsmallest(_TOP, itertools.chain(paused, stuck), key=lambda entry: entry[:2])
                await asyncio.sleep(0)
        others = list(counts.values())
        return (
            _first(heapq.nlargest, busiest, (traffic for count in others for traffic in count.busiest), now),
            _first(heapq.nsmallest, paused, (traffic for count in others for traffic in count.paused), now),
        )


def _first(
    select: Callable[..., list[Traffic]], ranked: Iterable[_Ranked], others: Iterable[Traffic], now: float
) -> list[Traffic]:
    """Return the first of these clients and of those that workers have ranked."""
    own = [Traffic(entry.rate, entry.received, _describe(entry, now)) for entry in ranked]
    return select(_TOP, [*own, *others], key=lambda traffic: traffic[:2])


def _describe(entry: _Ranked, now: float) -> dict[str, object]:
    rate, received, name, client = entry
    session = client.session
    info = _tcp_info(session)
    return {
        "listener": name,
        "peer": client.peer,
        "client": str(client.proxied_client) if client.proxied_client is not None else None,
        "state": state_of(session),
        "seconds": round(now - client.opened, 3),
        "received": received,
        "unsent": session.unsent(),
        "received_per_second": round(rate),
        "rtt_ms": None if info is None else info.rtt_ms,
        "retransmits": None if info is None else info.retransmits,
        "tls": session.tls.version if session.tls is not None else None,
    }


def _tcp_info(session: EchoSession) -> TcpInfo | None:
    """Return the kernel's figures of a connection: the final ones, or else those of now."""
    if session.tcp_info is not None:
        return session.tcp_info
    try:
        return kernel.tcp_info(session.sock)
    except OSError:  # refused, or the client has left during the report
        return None


def _rate(client: Client, received: int, base: _Sample, now: float) -> float:
    """Return the bytes per second received from a client since the base sample, or since it was accepted."""
    before = base.clients.get(id(client))
    # A client accepted after the base sample may have the id of an earlier client.
    if before is not None and client.opened < base.time:
        return (received - before) / (now - base.time)
    return received / max(now - client.opened, SHORTEST_SPAN)
