"""The ledger of a listener: its counters, and an entry per closed connection."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from echod.connection.outcome import MEANINGS, has_failed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from structlog.typing import FilteringBoundLogger

    from echod.connection.outcome import Reason
    from echod.connection.state import Delivery
    from echod.server.client import Client

    Write = Callable[[dict[str, Any]], object]

Choice = Literal["all", "nonempty", "failed", "none"]


@dataclass(slots=True)
class Counters:
    """Running totals of one listener's connections."""

    accepted: int = 0
    """Connections that became clients. Each gets one reason when it is closed."""
    accept_failures: int = 0
    """Connections closed at once because they could not become clients."""
    empty: int = 0
    """Connections that sent no byte: mostly health checks and port scans."""
    accept_pauses: int = 0
    received: int = 0
    sent: int = 0
    acked: int = 0
    discarded: int = 0
    unsent: int = 0
    unacked: int = 0
    reasons: Counter[Reason] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    """Connections that showed a fault, by the name of its profile."""

    def snapshot(self) -> Counters:
        """Return a copy that later connections do not change."""
        return replace(self, reasons=self.reasons.copy(), faults=self.faults.copy())

    def add(self, reason: Reason, delivery: Delivery, fault: str | None) -> None:
        """Count a closed connection, and the fault that it showed, if any."""
        if fault is not None:
            self.faults[fault] += 1
        self.reasons[reason] += 1
        self.empty += not delivery.received
        self.received += delivery.received
        self.sent += delivery.sent
        self.acked += delivery.acked
        self.discarded += delivery.discarded
        # Per connection: extra bytes sent to one client do not make up for bytes that another client lacks.
        self.unsent += max(0, delivery.received - delivery.sent)
        self.unacked += delivery.sent - delivery.acked


class Entry(NamedTuple):
    """One closed connection. A field is None if it does not apply."""

    peer: str
    client: str | None
    """The client that the PROXY header names."""
    seconds: float
    received: int
    """Bytes, as in the next three fields. Over TLS, all except `discarded_bytes` count plaintext."""
    sent: int
    acked: int
    discarded_bytes: int
    reason: Reason
    detail: str | None
    """The error, if the client or a system call caused the end."""
    fault: str | None
    """The fault profile that fired, however the connection ended then."""
    tls: str | None
    """The version of TLS."""
    cipher: str | None
    subject: str | None
    """The subject of the client's certificate."""
    rtt_ms: float | None
    retransmits: int | None


class Ledger:
    """Count and log the connections of one listener.

    Args:
        log: the logger, bound to the listener's name.
        connections: which closed connections are logged.
        states: whether each connection and the states of its session are logged, at level debug.
        observers: called with the entry of every connection, whether it is logged or not.
        write: logs `client_closed` with these fields. None: `log` does.

    """

    def __init__(
        self,
        log: FilteringBoundLogger,
        connections: Choice,
        observers: Sequence[Callable[[Entry], None]] = (),
        *,
        states: bool = False,
        write: Write | None = None,
    ) -> None:
        self.counters = Counters()
        self._observers = observers
        self.reconfigure(log, connections, states=states, write=write)

    def reconfigure(
        self, log: FilteringBoundLogger, connections: Choice, *, states: bool, write: Write | None = None
    ) -> None:
        """Use another logger from now on, and log other connections. Connected clients keep reporting their states."""
        self.log = log
        self._connections = connections
        self._states = states
        self._write: Write = write or (lambda fields: log.info("client_closed", **fields))

    def connect(self, client: Client) -> Callable[[str], None] | None:
        """Log a new connection; return the function that logs the states of its session, or None if it is not wanted."""
        if not self._states:
            return None
        peer = client.peer
        self.log.debug("client_connected", peer=peer)
        return partial(self._log_state, peer)

    def _log_state(self, peer: str, state: str) -> None:
        self.log.debug("client_state", peer=peer, state=state)

    def accept(self) -> None:
        """Record a connection that became a client."""
        self.counters.accepted += 1

    def pause(self, cause: str, clients: int) -> None:
        """Record a pause of accepting, or another cause of the same pause."""
        self.counters.accept_pauses += 1
        self.log.warning("accept_paused", cause=cause, clients=clients)

    def resume(self, seconds: float, clients: int) -> None:
        """Record the end of a pause."""
        self.log.info("accept_resumed", seconds=seconds, clients=clients)

    def turn_away(self, peer: object, failure: Exception) -> None:
        """Record a connection that could not become a client."""
        self.counters.accept_failures += 1
        self.log.error("accept_failed", peer=str(peer), exc_info=failure)

    def close(self, client: Client, now: float, failure: BaseException | None) -> None:
        """Record a client that has left.

        Args:
            client: the client.
            now: the loop's time.
            failure: the exception of its task, if any.

        """
        session = client.session
        reason, delivery = session.reason, session.delivery
        assert reason is not None
        assert delivery is not None
        self.counters.add(reason, delivery, session.fault)
        if failure is not None:
            self.log.error("client_failed", peer=client.peer, exc_info=failure)
            failure.__traceback__ = (
                None  # a reference cycle: its frames refer to the session, which refers to the failure
            )
        logged = self._is_logged(reason, delivery, session.fault)
        if not (logged or self._observers):
            return
        entry = _entry(client, reason, delivery, now)
        if logged:
            self._write({name: value for name, value in zip(Entry._fields, entry, strict=True) if value is not None})
        for observe in self._observers:
            observe(entry)

    def _is_logged(self, reason: Reason, delivery: Delivery, fault: str | None) -> bool:
        match self._connections:
            case "all":
                return True
            case "nonempty":
                return delivery.received > 0 or fault is not None or MEANINGS[reason].always_logged
            case "failed":
                return has_failed(reason, delivery.received, delivery.acked)
            case _:
                return False


def _entry(client: Client, reason: Reason, delivery: Delivery, now: float) -> Entry:
    session = client.session
    tls, info = session.tls, session.tcp_info
    proxied = client.proxied_client
    version, cipher, _, subject = (None, None, None, None) if tls is None else tls
    return Entry(
        client.peer,
        None if proxied is None else str(proxied),
        round(now - client.opened, 3),
        *delivery,
        reason,
        session.detail or None,
        session.fault,
        version,
        cipher,
        subject,
        None if info is None else info.rtt_ms,
        None if info is None else info.retransmits,
    )
