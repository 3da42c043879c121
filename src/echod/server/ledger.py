"""What was done, counted and logged: one line for each connection, and the receipt of a drain."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from echod.connection.outcome import MEANINGS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from structlog.typing import FilteringBoundLogger

    from echod.connection.outcome import Reason
    from echod.connection.state import Delivery
    from echod.server.client import Client

Choice = Literal["all", "nonempty", "failed", "none"]


@dataclass(slots=True)
class Counters:
    """Running totals of one listener's connections."""

    accepted: int = 0
    """Connections that became clients. Each of them gets one reason when it is closed."""
    accept_failures: int = 0
    """Connections that were accepted and closed at once, because they could not become clients."""
    empty: int = 0
    """Connections that sent no byte: health checks and port scans, for the most part."""
    accept_pauses: int = 0
    received: int = 0
    sent: int = 0
    acked: int = 0
    discarded: int = 0
    unsent: int = 0
    unacked: int = 0
    reasons: Counter[Reason] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    """Connections that showed a fault, by the profile's name."""

    def snapshot(self) -> Counters:
        """Return a copy that later entries do not change."""
        return replace(self, reasons=self.reasons.copy(), faults=self.faults.copy())

    def add(self, reason: Reason, delivery: Delivery, fault: str | None) -> None:
        """Count one connection's end, and the fault it has shown, if it has."""
        if fault is not None:
            self.faults[fault] += 1
        self.reasons[reason] += 1
        self.empty += not delivery.received
        self.received += delivery.received
        self.sent += delivery.sent
        self.acked += delivery.acked
        self.discarded += delivery.discarded
        # Connection by connection: what one sends without having received it makes up for nothing of another's.
        self.unsent += max(0, delivery.received - delivery.sent)
        self.unacked += delivery.sent - delivery.acked


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a drain did. Each client is in one of `completed`, `quiet`, `cut`, `aborted` and `failed`."""

    clients: int
    """Clients connected when the stop began, or accepted since."""
    completed: int
    """Closed, or reset, by themselves."""
    quiet: int
    """Closed because they had been silent, all their echo acknowledged."""
    cut: int
    """Still at work at the deadline, and closed then, after all they had sent by then was echoed."""
    aborted: int
    """Closed or reset with echo that they did not take."""
    failed: int
    """Closed for a violation of the protocol or a limit, by a fault profile, or because a call or this program failed."""
    unsent_bytes: int
    """Received, never taken by the kernel for sending."""
    unacked_bytes: int
    """Sent, not acknowledged when the connection was closed."""
    discarded_bytes: int
    """Received after our FIN."""
    seconds: float

    @classmethod
    def between(cls, before: Counters, after: Counters, present: int, seconds: float) -> Self:
        """Derive the receipt from the account before and after a drain that began with `present` clients."""
        outcomes = Counter[str]()
        for reason, count in (after.reasons - before.reasons).items():
            outcomes[MEANINGS[reason].outcome] += count
        return cls(
            clients=present + after.accepted - before.accepted,
            completed=outcomes["completed"],
            quiet=outcomes["quiet"],
            cut=outcomes["cut"],
            aborted=outcomes["aborted"],
            failed=outcomes["failed"],
            unsent_bytes=after.unsent - before.unsent,
            unacked_bytes=after.unacked - before.unacked,
            discarded_bytes=after.discarded - before.discarded,
            seconds=round(seconds, 3),
        )

    @classmethod
    def total(cls, receipts: Iterable[Receipt]) -> Self:
        """Add up the receipts of several servers that drained side by side."""
        rows = [asdict(receipt) for receipt in receipts]
        seconds = max((row.pop("seconds") for row in rows), default=0.0)
        sums = Counter[str]()
        for row in rows:
            sums.update(row)
        return cls(**{name: sums[name] for name in cls.__slots__ if name != "seconds"}, seconds=seconds)


class Entry(NamedTuple):
    """One connection's line: what it was, from accepted to closed. None is what it did not have."""

    peer: str
    client: str | None
    """Who the PROXY header says it is."""
    seconds: float
    received: int
    """Bytes, as the three below; over TLS those inside of it, but for what was discarded."""
    sent: int
    acked: int
    discarded_bytes: int
    reason: Reason
    detail: str | None
    """What was wrong, if the client or a system call is to blame."""
    fault: str | None
    """The profile that was set off, however the connection then ended."""
    tls: str | None
    """The version."""
    cipher: str | None
    subject: str | None
    """Of the client's certificate."""
    rtt_ms: float | None
    retransmits: int | None


class Ledger:
    """One listener's account and its lines in the log.

    Args:
        log: the logger, bound to the listener's name.
        connections: which closed connections get a line.
        observers: called with the entry of every connection, whether it gets a line or not.

    """

    def __init__(
        self, log: FilteringBoundLogger, connections: Choice, observers: Sequence[Callable[[Entry], None]] = ()
    ) -> None:
        self.log = log
        self.counters = Counters()
        self._connections = connections
        self._observers = observers

    def reconfigure(self, log: FilteringBoundLogger, connections: Choice) -> None:
        """Write to another logger from now on, and about other connections."""
        self.log = log
        self._connections = connections

    def turn_away(self, peer: object, failure: Exception) -> None:
        """Record a connection that could not become a client."""
        self.counters.accept_failures += 1
        self.log.error("accept_failed", peer=str(peer), exc_info=failure)

    def close(self, client: Client, now: float, failure: BaseException | None) -> None:
        """Enter a client that has left; the time is the loop's."""
        session = client.session
        reason, delivery = session.reason, session.delivery
        assert reason is not None
        assert delivery is not None
        self.counters.add(reason, delivery, session.fault)
        if failure is not None:
            self.log.error("client_failed", peer=client.peer, exc_info=failure)
            failure.__traceback__ = None  # its frames have the session, which has the failure
        specs = self._wants(reason, delivery, session.fault)
        if not (specs or self._observers):
            return
        entry = _entry(client, reason, delivery, now)
        if specs:
            line = {name: value for name, value in zip(Entry._fields, entry, strict=True) if value is not None}
            self.log.info("client_closed", **line)
        for observe in self._observers:
            observe(entry)

    def _wants(self, reason: Reason, delivery: Delivery, fault: str | None) -> bool:
        match self._connections:
            case "all":
                return True
            case "nonempty":
                return delivery.received > 0 or fault is not None or MEANINGS[reason].always_logged
            case "failed":
                return MEANINGS[reason].is_failure or delivery.acked < delivery.received
            case _:
                return False


def _entry(client: Client, reason: Reason, delivery: Delivery, now: float) -> Entry:
    session = client.session
    tls, info = session.tls, session.tcp_info
    behind = client.proxied_client
    version, cipher, _, subject = (None, None, None, None) if tls is None else tls
    return Entry(
        client.peer,
        None if behind is None else str(behind),
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
