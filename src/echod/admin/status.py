"""Report the state of the daemon, ready for JSON."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
import platform
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import echod
from echod.admin.snapshot import STATES, STEP, state_of
from echod.connection.outcome import MEANINGS, Reason
from echod.net import kernel
from echod.net.certificates import iso
from echod.settings.model import Settings, flat

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from echod.admin.history import History
    from echod.admin.snapshot import Count, DaemonView, Snapshot
    from echod.connection.echo import EchoSession
    from echod.net.certificates import ServerTls
    from echod.net.kernel import TcpInfo
    from echod.server.client import Client

# Clients per list in a report.
_TOP = 10

# The shortest time in seconds over which a rate is measured.
_SHORTEST_SPAN = 0.9


class _Sample(NamedTuple):
    time: float
    clients: dict[int, int]
    """Bytes received, by the id() of each connected client."""


class _Traffic(NamedTuple):
    rate: float
    received: int
    listener: str
    client: Client


class Reporter:
    """Write reports.

    A listener's rates are measured since the last sample of the history, a client's since the previous report. Either
    must be at least 0.9 seconds old.
    """

    def __init__(self, view: DaemonView, snapshot: Snapshot, history: History) -> None:
        self._view = view
        self._snapshot = snapshot
        self._history = history
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._base = self._latest = _Sample(self._started, {})

    async def report(self) -> dict[str, object]:
        """Return a report. Sizes are in bytes, times in seconds."""
        view = self._view
        counts = await self._snapshot.take()
        self._history.add(counts)
        now = self._loop.time()
        if now - self._latest.time >= _SHORTEST_SPAN:
            self._base = self._latest
            self._latest = _Sample(now, {})
        busiest, paused = await self._notable(counts, now)
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
            "stop": self._stop(now),
            "listeners": listeners,
            "udp_listeners": [self._udp_listener(name) for name in view.udp_servers],
            "clients": {
                "active": sum(sum(count.states.values()) for count in counts.values()),
                "states": {state: sum(count.states[state] for count in counts.values()) for state in STATES},
                "paused": [_client(entry, now) for entry in paused],
                "most_traffic": [_client(entry, now) for entry in busiest],
            },
            "closed": _closed(counts.values()),
            "log_lines_dropped": view.log_lines_dropped(),
            "reloads": dict(view.reloads),
            "settings": list(_changed(config.settings, config.origins)),
            "restart_needed": list(view.restart_needed()),
        }

    def _listener(self, name: str, count: Count, now: float) -> dict[str, object]:
        server, counters = self._view.servers[name], count.counters
        # Not the sample of this report, however long ago it was taken: under load, a report takes seconds.
        since, totals = self._history.last(now - _SHORTEST_SPAN)
        received, sent = totals.get(name, (0, 0))
        span = max(now - since, _SHORTEST_SPAN)
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

    def _udp_listener(self, name: str) -> dict[str, object]:
        server = self._view.udp_servers[name]
        counters = server.counters()
        return {
            "name": name,
            "addresses": self._view.addresses[name],
            "fault": server.settings.listener.fault or None,
            "max_flows": server.settings.limits.max_flows,
            "flows": server.flows,
            "flows_so_far": counters.flows,
            "received_datagrams": counters.received_datagrams,
            "received": counters.received,
            "sent_datagrams": counters.sent_datagrams,
            "sent": counters.sent,
            "refused": dict(counters.refused),
            "dropped": dict(counters.dropped),
            "kernel_drops": server.kernel_drops(),
            "closed": dict(counters.reasons),
        }

    def _stop(self, now: float) -> dict[str, float] | None:
        """Describe the stop, if one has begun: the seconds in which clients are still accepted, and those to its end."""
        deadlines = [server.stop_deadlines for server in self._view.servers.values()]
        deadlines += [server.stop_deadlines for server in self._view.udp_servers.values()]
        begun = [each for each in deadlines if each is not None]
        if not begun:
            return None
        accepting, draining = (round(max(0.0, max(times) - now), 1) for times in zip(*begun, strict=True))
        return {"accepting_seconds_left": accepting, "seconds_left": draining}

    async def _notable(self, counts: Mapping[str, Count], now: float) -> tuple[list[_Traffic], list[_Traffic]]:
        """Return the clients with the most traffic, and the paused clients with the least.

        If the latest sample is new, store each client's bytes in it.
        """
        base, fresh = self._base, self._latest.time == now
        busiest: list[_Traffic] = []
        paused: list[_Traffic] = []
        for name, count in counts.items():
            for first in range(0, len(count.clients), STEP):
                step = slice(first, first + STEP)
                clients, traffic = count.clients[step], count.traffic[step]
                if fresh:
                    self._latest.clients.update(zip(map(id, clients), traffic, strict=True))
                entries = [
                    _Traffic(_rate(client, received, base, now), received, name, client)
                    for client, received in zip(clients, traffic, strict=True)
                    if received
                ]
                stuck = (entry for entry in entries if state_of(entry.client.session) == "paused")
                busiest = heapq.nlargest(_TOP, itertools.chain(busiest, entries), key=lambda entry: entry[:2])
                paused = heapq.nsmallest(_TOP, itertools.chain(paused, stuck), key=lambda entry: entry[:2])
                await asyncio.sleep(0)
        return busiest, paused


def _client(entry: _Traffic, now: float) -> dict[str, object]:
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


def _closed(counts: Iterable[Count]) -> dict[Reason, dict[str, object]]:
    """Return the number of closed connections by reason, most first, and the side that caused it."""
    sums = sum((count.counters.reasons for count in counts), Counter[Reason]())
    return {reason: {"connections": number, "caused_by": _side(reason)} for reason, number in sums.most_common()}


def _side(reason: Reason) -> str | None:
    """Return the side that caused an end for this reason, "client" or "echod", or None if nothing went wrong."""
    meaning = MEANINGS[reason]
    if meaning.is_clean:
        return None
    return "client" if meaning.peer_to_blame else "echod"


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
