"""Count clients, bytes and states over all listeners, for the status and the metrics."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, NamedTuple, Protocol

from echod.admin.histograms import Histograms
from echod.connection.state import Phase
from echod.server.ledger import Counters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from echod.connection.echo import EchoSession
    from echod.datagram.server import UdpServer
    from echod.server.client import Client
    from echod.server.server import Server
    from echod.server.settings import ServerSettings
    from echod.settings.resources import Resources

STATES = ("proxy_header", "handshake", "open", "paused", "closing")

# The states of the phases. A loop makes the transport at once, so CONNECTING has no state of its own.
_STATES = {
    Phase.CONNECTING: "open",
    Phase.PROXY_HEADER: "proxy_header",
    Phase.HANDSHAKE: "handshake",
    Phase.OPEN: "open",
    Phase.FLUSHING: "closing",
    Phase.LINGERING: "closing",
    Phase.CLOSED: "closing",
}

STEP = 250
"""Clients that are read in one step. Between two steps, the loop serves the echo."""


class ServerState(Protocol):
    """A server, or the servers of one listener in several workers."""

    @property
    def settings(self) -> ServerSettings:
        """The settings in force."""

    @property
    def accept_paused(self) -> bool:
        """Whether new clients have to wait in the backlog."""

    @property
    def stop_deadlines(self) -> tuple[float, float] | None:
        """The loop's times at which a stop ends its delay and its drain, or None before the stop."""


class WorkerState(NamedTuple):
    """One of several workers."""

    worker: int
    """Its number."""
    pid: int | None
    """None while it is being started again."""
    clients: int
    answers: bool
    """Whether it has given its figures for the last count."""


class Source(Protocol):
    """The source of counts."""

    async def take(self) -> dict[str, Count]:
        """Return the count of each listener by its name."""

    @property
    def workers(self) -> Sequence[WorkerState]:
        """The workers as of the last count. Empty if there are not several."""


class DaemonView(NamedTuple):
    """The parts of the daemon that the admin listener reads. Mappings are by listener name unless noted."""

    servers: Mapping[str, ServerState]
    udp_servers: Mapping[str, UdpServer]
    addresses: Mapping[str, Sequence[str]]
    resources: Callable[[], Resources]
    """Return the settings in force and the loaded certificates."""
    draining: Callable[[], bool]
    """Return whether a stop signal has arrived."""
    restart_needed: Callable[[], Sequence[str]]
    """Return the changed settings that take effect only at a restart."""
    reloads: Mapping[str, int]
    """Number of reloads by result, "success" or "failure"."""
    log_lines_dropped: Callable[[], int]


class Traffic(NamedTuple):
    """The traffic of one client."""

    rate: float
    """Bytes per second."""
    received: int
    """Bytes."""
    client: dict[str, object]
    """The client, ready for JSON."""


@dataclass(slots=True)
class Count:
    """The figures of one listener. Bytes are those of closed and connected clients together."""

    counters: Counters
    received: int
    sent: int
    states: Counter[str] = field(default_factory=Counter)
    clients: list[Client] = field(default_factory=list)
    """The clients that were connected when the count began."""
    traffic: list[int] = field(default_factory=list)
    """Bytes received from each of these clients."""
    busiest: list[Traffic] = field(default_factory=list)
    """Clients of workers with the most traffic."""
    paused: list[Traffic] = field(default_factory=list)
    """Paused clients of workers with the least traffic."""
    histograms: Histograms | None = None
    """Those of the workers."""

    @classmethod
    def total(cls, counts: Sequence[Count]) -> Count:
        """Return the sum of a listener's counts in several workers."""
        counters = Counters()
        for count in counts:
            for each in fields(Counters):
                setattr(counters, each.name, getattr(counters, each.name) + getattr(count.counters, each.name))
        return cls(
            counters,
            sum(count.received for count in counts),
            sum(count.sent for count in counts),
            sum((count.states for count in counts), Counter()),
            busiest=[traffic for count in counts for traffic in count.busiest],
            paused=[traffic for count in counts for traffic in count.paused],
            histograms=Histograms.total(count.histograms for count in counts if count.histograms is not None),
        )

    def add(self, clients: Sequence[Client]) -> None:
        """Add the bytes and states of some clients. A client that has closed meanwhile counts with its final figures."""
        for client in clients:
            session = client.session
            received = session.received
            self.traffic.append(received)
            self.received += received
            if session.delivery is not None:
                self.sent += session.delivery.sent
                continue
            self.sent += max(0, session.written - session.unsent())
            self.states[state_of(session)] += 1


class Snapshot:
    """Count over all listeners.

    Nothing is stored per client for this. Clients are read in steps, and the loop serves the echo in between. A client
    that closes during the count is counted once. A client that connects during the count is left to the next one. So no
    sum is ever lower than in an earlier count.
    """

    def __init__(self, servers: Mapping[str, Server]) -> None:
        self._servers = servers
        self.workers: Sequence[WorkerState] = ()
        """Empty: all clients are in this process."""
        self._sent: dict[str, int] = {}

    async def take(self) -> dict[str, Count]:
        """Return the count of each listener by its name."""
        counts: dict[str, Count] = {}
        for name, server in self._servers.items():
            counters = server.ledger.counters.snapshot()
            counts[name] = Count(counters, counters.received, counters.sent, clients=list(server.connected))
        for name, count in counts.items():
            for first in range(0, len(count.clients), STEP):
                count.add(count.clients[first : first + STEP])
                await asyncio.sleep(0)
            # The exact number of sent bytes is known only when a connection ends. Until then it may be a little too high.
            count.sent = self._sent[name] = max(count.sent, self._sent.get(name, 0))
        return counts


def state_of(session: EchoSession) -> str:
    """Return the state of a connected client, one of STATES."""
    if session.phase is Phase.OPEN and session.paused:
        return "paused"
    return _STATES[session.phase]
