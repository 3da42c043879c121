"""Report the state of the daemon, ready for JSON."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
import platform
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import echod
from echod.admin.snapshot import STATES, STEP, state_of
from echod.net.certificates import iso
from echod.settings.model import Settings, flat

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from echod.admin.snapshot import Count, DaemonView, Snapshot
    from echod.net.certificates import ServerTls
    from echod.server.client import Client

# Clients listed in a report.
_TOP = 10

# The shortest time in seconds over which a rate is measured.
_SHORTEST_SPAN = 0.9


class _Sample(NamedTuple):
    time: float
    totals: dict[str, tuple[int, int]]
    """Bytes received and sent, by listener name."""
    clients: dict[int, int]
    """Bytes received, by the id() of each connected client."""


class _Traffic(NamedTuple):
    rate: float
    received: int
    listener: str
    client: Client


class Reporter:
    """Write reports. Rates are measured since the previous report, if that is at least 0.9 seconds old."""

    def __init__(self, view: DaemonView, snapshot: Snapshot) -> None:
        self._view = view
        self._snapshot = snapshot
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._base = self._latest = _Sample(self._started, {}, {})

    async def report(self) -> dict[str, object]:
        """Return a report. Sizes are in bytes, times in seconds."""
        view = self._view
        counts = await self._snapshot.take()
        now = self._loop.time()
        if now - self._latest.time >= _SHORTEST_SPAN:
            self._base = self._latest
            self._latest = _Sample(now, {name: (count.received, count.sent) for name, count in counts.items()}, {})
        busiest = await self._busiest(counts, now)
        config = view.resources().config
        listeners = [self._listener(name, count, now) for name, count in counts.items()]
        return {
            "version": echod.__version__,
            "python": platform.python_version(),
            "loop": type(self._loop).__module__.partition(".")[0],
            "pid": os.getpid(),
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "uptime_seconds": round(now - self._started, 3),
            "state": "draining" if view.draining() else "ready",
            "listeners": listeners,
            "clients": {
                "active": sum(sum(count.states.values()) for count in counts.values()),
                "states": {state: sum(count.states[state] for count in counts.values()) for state in STATES},
                "most_traffic": [_client(entry, now) for entry in busiest],
            },
            "log_lines_dropped": view.log_lines_dropped(),
            "reloads": dict(view.reloads),
            "settings": list(_changed(config.settings, config.origins)),
            "restart_needed": list(view.restart_needed()),
        }

    def _listener(self, name: str, count: Count, now: float) -> dict[str, object]:
        server, counters = self._view.servers[name], count.counters
        received, sent = self._base.totals.get(name, (0, 0))
        span = max(now - self._base.time, _SHORTEST_SPAN)
        tls = self._view.resources().tls.get(name) if server.settings.tls is not None else None
        return {
            "name": name,
            "addresses": self._view.addresses[name],
            "mode": server.settings.listener.mode,
            "fault": server.settings.listener.fault or None,
            "proxy_protocol": server.settings.listener.proxy_protocol == "require",
            "tls": server.settings.tls is not None,
            **_certificate(tls, datetime.now(UTC)),
            "max_connections": server.settings.limits.max_connections,
            "accept_paused": server.accept_paused,
            "accept_pauses": counters.accept_pauses,
            "accept_failures": counters.accept_failures,
            "accepted": counters.accepted,
            "active": sum(count.states.values()),
            "states": {state: count.states[state] for state in STATES},
            "closed": dict(counters.reasons),
            "received": count.received,
            "sent": count.sent,
            "received_per_second": round((count.received - received) / span),
            "sent_per_second": round((count.sent - sent) / span),
        }

    async def _busiest(self, counts: Mapping[str, Count], now: float) -> list[_Traffic]:
        """Return the clients with the most traffic. If the latest sample is new, store each client's bytes in it."""
        base, fresh = self._base, self._latest.time == now
        busiest: list[_Traffic] = []
        for name, count in counts.items():
            for first in range(0, len(count.clients), STEP):
                step = slice(first, first + STEP)
                clients, traffic = count.clients[step], count.traffic[step]
                if fresh:
                    self._latest.clients.update(zip(map(id, clients), traffic, strict=True))
                entries = (
                    _Traffic(_rate(client, received, base, now), received, name, client)
                    for client, received in zip(clients, traffic, strict=True)
                    if received
                )
                busiest = heapq.nlargest(_TOP, itertools.chain(busiest, entries), key=lambda entry: entry[:2])
                await asyncio.sleep(0)
        return busiest


def _client(entry: _Traffic, now: float) -> dict[str, object]:
    rate, received, name, client = entry
    session = client.session
    return {
        "listener": name,
        "peer": client.peer,
        "client": str(client.proxied_client) if client.proxied_client is not None else None,
        "state": state_of(session),
        "seconds": round(now - client.opened, 3),
        "received": received,
        "unsent": session.unsent(),
        "received_per_second": round(rate),
        "tls": session.tls.version if session.tls is not None else None,
    }


def _rate(client: Client, received: int, base: _Sample, now: float) -> float:
    """Return the bytes per second received from a client since the base sample, or since it was accepted."""
    before = base.clients.get(id(client))
    # A client accepted after the base sample may have the id of an earlier client.
    if before is not None and client.opened < base.time:
        return (received - before) / (now - base.time)
    return received / max(now - client.opened, _SHORTEST_SPAN)


def _certificate(tls: ServerTls | None, now: datetime) -> dict[str, object]:
    """Describe the certificate that expires first, and list the warnings about all certificates."""
    file = subject = expires = left = None
    if tls is not None:
        _, file, (subject, _, not_after) = tls.first_to_expire
        expires, left = iso(not_after), round((not_after - now).total_seconds())
    return {
        "certificate_file": file,
        "certificate_subject": subject,
        "certificate_expires": expires,
        "certificate_seconds_left": left,
        "certificate_warnings": [] if tls is None else [warning.text for warning in tls.warnings(now)],
    }


def _changed(settings: Settings, origins: Mapping[tuple[str, ...], str]) -> Iterator[dict[str, object]]:
    """Yield the given settings that differ from their defaults."""
    defaults = dict(flat(Settings().model_dump()))
    for key, value in flat(settings.model_dump()):
        if key in origins and (key not in defaults or defaults[key] != value):
            yield {"key": ".".join(key), "value": value, "source": origins[key]}
