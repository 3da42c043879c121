"""Report the state of the daemon, ready for JSON."""

from __future__ import annotations

import asyncio
import os
import platform
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import echod
from echod.admin.notable import SHORTEST_SPAN, Notable
from echod.admin.snapshot import STATES
from echod.connection.outcome import MEANINGS, Reason
from echod.net.certificates import iso
from echod.settings.model import Settings, flat

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from echod.admin.history import History
    from echod.admin.snapshot import Count, DaemonView, Source
    from echod.net.certificates import ServerTls


class Reporter:
    """Write reports.

    A listener's rates are measured since the last sample of the history, a client's since the previous report. Either
    must be at least 0.9 seconds old.
    """

    def __init__(self, view: DaemonView, snapshot: Source, history: History) -> None:
        self._view = view
        self._snapshot = snapshot
        self._history = history
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._traffic = Notable(self._started)

    async def report(self) -> dict[str, object]:
        """Return a report. Sizes are in bytes, times in seconds."""
        view = self._view
        counts = await self._snapshot.take()
        self._history.add(counts)
        now = self._loop.time()
        busiest, paused = await self._traffic.take(counts, now)
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
                "paused": [traffic.client for traffic in paused],
                "most_traffic": [traffic.client for traffic in busiest],
            },
            "workers": [worker._asdict() for worker in self._snapshot.workers],
            "closed": _closed(counts.values()),
            "log_lines_dropped": view.log_lines_dropped(),
            "reloads": dict(view.reloads),
            "settings": list(_changed(config.settings, config.origins)),
            "restart_needed": list(view.restart_needed()),
        }

    def _listener(self, name: str, count: Count, now: float) -> dict[str, object]:
        server, counters = self._view.servers[name], count.counters
        # Not the sample of this report, however long ago it was taken: under load, a report takes seconds.
        since, totals = self._history.last(now - SHORTEST_SPAN)
        received, sent = totals.get(name, (0, 0))
        span = max(now - since, SHORTEST_SPAN)
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
