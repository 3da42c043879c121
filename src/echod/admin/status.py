"""What the daemon is doing, read from its counters when somebody asks; and the report on it, ready for JSON."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
import platform
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import echod
from echod.net.certificates import iso
from echod.settings.model import Settings, flat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from echod.connection.echo import EchoSession
    from echod.net.certificates import ServerTls
    from echod.server.client import Client
    from echod.server.ledger import Counters
    from echod.server.server import Server
    from echod.settings.resources import Resources

STATES = ("proxy_header", "handshake", "open", "paused", "closing")

# Clients looked at in one go; between two goes, the loop serves.
_STEP = 250

# Clients named in a report.
_TOP = 10

# A rate is taken over this many seconds at least.
_SHORTEST_SPAN = 0.9


class DaemonView(NamedTuple):
    """What there is to be told of: one process."""

    servers: Mapping[str, Server]
    """By the listeners' names."""
    addresses: Mapping[str, Sequence[str]]
    """Those that are listened on, by the listeners' names."""
    found: Callable[[], Resources]
    """Those in force."""
    draining: Callable[[], bool]
    """Whether a signal has come."""
    restart_needed: Callable[[], Sequence[str]]
    """The settings that take effect at a start only, and have changed since."""
    reloads: Mapping[str, int]
    """By their results, "success" and "failure"."""
    log_lines_dropped: Callable[[], int]


@dataclass(slots=True)
class Count:
    """One listener's figures."""

    counters: Counters
    received: int
    """Bytes, of closed connections and of those that are open."""
    sent: int
    states: Counter[str] = field(default_factory=Counter)
    clients: list[Client] = field(default_factory=list)
    """Those that were connected when the counting began."""
    traffic: list[int] = field(default_factory=list)
    """What was received from each of them."""


class Snapshot:
    """Counts what all listeners have done, and what their clients are doing.

    Nothing is kept for it: every client is looked at, a few hundred at a time, so that the echo goes on in between.
    Whoever closes during that is counted once all the same, by the figures of its end, and who connects then is left
    for the next time; so the sums never lie behind those of a census before.
    """

    def __init__(self, subject: DaemonView) -> None:
        self._subject = subject
        self._sent: dict[str, int] = {}

    async def take(self) -> dict[str, Count]:
        """Count, listener by listener."""
        counts: dict[str, Count] = {}
        for name, server in self._subject.servers.items():
            counters = server.ledger.counters.snapshot()
            counts[name] = Count(counters, counters.received, counters.sent, clients=list(server.connected))
        for name, count in counts.items():
            for first in range(0, len(count.clients), _STEP):
                _look(count, count.clients[first : first + _STEP])
                await asyncio.sleep(0)
            # What a connection has sent is known exactly at its end; until then it may be taken for a little more.
            count.sent = self._sent[name] = max(count.sent, self._sent.get(name, 0))
        return counts


def _look(count: Count, clients: Sequence[Client]) -> None:
    states, traffic = count.states, count.traffic
    for client in clients:
        session = client.session
        received = session.received
        traffic.append(received)
        count.received += received
        if session.delivery is not None:
            count.sent += session.delivery.sent
            continue
        count.sent += max(0, session.written - session.unsent())
        states[_state(session)] += 1


def _state(session: EchoSession) -> str:
    if session.reason is not None:
        return "closing"
    if session.stage is not None:
        return session.stage
    return "paused" if session.paused else "open"


class _Sample(NamedTuple):
    when: float
    totals: dict[str, tuple[int, int]]
    """Received and sent, by the listeners' names."""
    clients: dict[int, int]
    """Received, by the id() of each that was connected."""


class _Traffic(NamedTuple):
    rate: float
    received: int
    listener: str
    client: Client


class Reporter:
    """Writes the report; what flows in a second is what flowed since the report before, if that is a second old."""

    def __init__(self, subject: DaemonView, snapshot: Snapshot) -> None:
        self._subject = subject
        self._snapshot = snapshot
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._base = self._latest = _Sample(self._began, {}, {})

    async def report(self) -> dict[str, object]:
        """Return the report, ready for JSON. Sizes are bytes, times seconds."""
        subject = self._subject
        counts = await self._snapshot.take()
        now = self._loop.time()
        if now - self._latest.when >= _SHORTEST_SPAN:
            self._base = self._latest
            self._latest = _Sample(now, {name: (count.received, count.sent) for name, count in counts.items()}, {})
        busiest = await self._busiest(counts, now)
        loaded = subject.found().config
        listeners = [self._listener(name, count, now) for name, count in counts.items()]
        return {
            "version": echod.__version__,
            "python": platform.python_version(),
            "loop": type(self._loop).__module__.partition(".")[0],
            "pid": os.getpid(),
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "uptime_seconds": round(now - self._began, 3),
            "state": "draining" if subject.draining() else "ready",
            "listeners": listeners,
            "clients": {
                "active": sum(sum(count.states.values()) for count in counts.values()),
                "states": {state: sum(count.states[state] for count in counts.values()) for state in STATES},
                "most_traffic": [self._client(entry, now) for entry in busiest],
            },
            "log_lines_dropped": subject.log_lines_dropped(),
            "reloads": dict(subject.reloads),
            "settings": list(_changed(loaded.settings, loaded.origins)),
            "restart_needed": list(subject.restart_needed()),
        }

    def _listener(self, name: str, count: Count, now: float) -> dict[str, object]:
        subject = self._subject
        server, counters, found = subject.servers[name], count.counters, subject.found()
        received, sent = self._base.totals.get(name, (0, 0))
        span = max(now - self._base.when, _SHORTEST_SPAN)
        tls = found.tls.get(name) if server.settings.admission.tls is not None else None
        return {
            "name": name,
            "addresses": subject.addresses[name],
            "mode": server.settings.mode,
            "fault": server.settings.fault.name if server.settings.fault is not None else None,
            "proxy_protocol": server.settings.admission.proxy_trusted is not None,
            "tls": server.settings.admission.tls is not None,
            **_certificate(tls, datetime.now(UTC)),
            "max_connections": server.settings.max_connections,
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
        """Return the clients with the most traffic, and note what all have received for the next report."""
        base, fresh = self._base, self._latest.when == now
        busiest: list[_Traffic] = []
        for name, count in counts.items():
            for first in range(0, len(count.clients), _STEP):
                step = slice(first, first + _STEP)
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

    def _client(self, entry: _Traffic, now: float) -> dict[str, object]:
        rate, received, name, client = entry
        session = client.session
        return {
            "listener": name,
            "peer": client.peer,
            "client": str(client.proxied_client) if client.proxied_client is not None else None,
            "state": _state(session),
            "seconds": round(now - client.opened, 3),
            "received": received,
            "unsent": session.unsent(),
            "received_per_second": round(rate),
            "tls": session.tls.version if session.tls is not None else None,
        }


def _rate(client: Client, received: int, base: _Sample, now: float) -> float:
    """Return how many bytes a second came from a client since the base was taken, or since it was accepted."""
    before = base.clients.get(id(client))
    # An id is given again, but not while its first owner lives.
    if before is not None and client.opened < base.when:
        return (received - before) / (now - base.when)
    return received / max(now - client.opened, _SHORTEST_SPAN)


def _certificate(tls: ServerTls | None, now: datetime) -> dict[str, object]:
    """Describe the certificate that expires first, and list the warnings about all of them."""
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
    """Yield the settings that were given, and are not what they would be anyway."""
    defaults = dict(flat(Settings().model_dump()))
    for key, value in flat(settings.model_dump()):
        if key in origins and (key not in defaults or defaults[key] != value):
            yield {"key": ".".join(key), "value": value, "source": origins[key]}
