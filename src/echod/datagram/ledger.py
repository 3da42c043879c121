"""The ledger of a UDP listener: its counters, a line per flow, and at most one line a second per cause of a refusal."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from echod.datagram.bucket import SECOND

if TYPE_CHECKING:
    from collections.abc import Iterable

    from structlog.typing import FilteringBoundLogger

    from echod.datagram.flows import Flow, Reason
    from echod.datagram.guards import Cause

Choice = Literal["all", "nonempty", "failed", "none"]

DropCause = Literal["would_block", "error", "fault", "hold_limit", "ended"]
"""The reasons for a received datagram without an answer."""

# Reasons of flows whose peer may have been cut off.
_FAILURES: frozenset[Reason] = frozenset({"cut", "aborted", "refused"})


@dataclass(slots=True)
class Counters:
    """Running totals of one UDP listener. The figures of a flow are added when it ends."""

    flows: int = 0
    """Flows that have begun."""
    received_datagrams: int = 0
    received: int = 0
    sent_datagrams: int = 0
    sent: int = 0
    copies: int = 0
    receive_errors: int = 0
    refused: Counter[Cause] = field(default_factory=Counter)
    """Counted at once, as the next one is."""
    dropped: Counter[DropCause] = field(default_factory=Counter)
    reasons: Counter[Reason] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def snapshot(self, flows: Iterable[Flow]) -> Counters:
        """Return a copy that includes the figures of flows that have not ended."""
        copy = replace(
            self,
            refused=self.refused.copy(),
            dropped=self.dropped.copy(),
            reasons=self.reasons.copy(),
            faults=self.faults.copy(),
        )
        for flow in flows:
            copy.add(flow)
        return copy

    def add(self, flow: Flow) -> None:
        """Add the figures of a flow."""
        self.received_datagrams += flow.received_datagrams
        self.received += flow.received
        self.sent_datagrams += flow.sent_datagrams
        self.sent += flow.sent
        self.copies += flow.copies


class Event(NamedTuple):
    """A kind of event that a peer can cause at any rate."""

    name: str
    cause: str


class Limiter:
    """Pass on an event at most once a second for each cause, with the number of events since the last one."""

    def __init__(self) -> None:
        self._logged: dict[Event, int] = {}
        self._pending = Counter[Event]()

    def count(self, event: Event, now: int) -> int:
        """Count an event. Return the number to log now, or 0."""
        self._pending[event] += 1
        last = self._logged.get(event)
        if last is not None and now - last < SECOND:
            return 0
        self._logged[event] = now
        return self._pending.pop(event)

    def due(self, now: int) -> list[tuple[Event, int]]:
        """Return the events that were held back for a second, with their numbers."""
        due = [event for event in self._pending if now - self._logged[event] >= SECOND]
        self._logged |= dict.fromkeys(due, now)
        return [(event, self._pending.pop(event)) for event in due]

    def rest(self) -> list[tuple[Event, int]]:
        """Return all events that were held back."""
        rest = list(self._pending.items())
        self._pending.clear()
        return rest


class FlowLedger:
    """Count and log the flows of one listener.

    Args:
        log: the logger, bound to the listener's name.
        connections: which flows are logged.

    """

    def __init__(self, log: FilteringBoundLogger, connections: Choice) -> None:
        self.log = log
        self.counters = Counters()
        self._connections = connections
        self._limiter = Limiter()

    def reconfigure(self, log: FilteringBoundLogger, connections: Choice) -> None:
        """Use another logger from now on, and log other flows."""
        self.log = log
        self._connections = connections

    def open(self) -> None:
        """Count a flow that begins."""
        self.counters.flows += 1

    def refuse(self, cause: Cause, peer: str, now: int) -> None:
        """Count a datagram that is refused."""
        self.counters.refused[cause] += 1
        self._limit(Event("datagrams_refused", cause), now, peer=peer)

    def drop(self, flow: Flow, cause: DropCause, now: int, error: OSError | None = None) -> None:
        """Count a received datagram that gets no answer. A fault drops on purpose, so it is not logged."""
        flow.drop()
        self.counters.dropped[cause] += 1
        if cause != "fault":
            fields = {} if error is None else {"error": error.strerror or str(error)}
            self._limit(Event("datagrams_dropped", cause), now, peer=flow.names[0], **fields)

    def fail_to_receive(self, error: OSError, now: int) -> None:
        """Count a failure of recvfrom(2)."""
        self.counters.receive_errors += 1
        self._limit(Event("receive_failed", error.strerror or str(error)), now)

    def close(self, flow: Flow, reason: Reason, now: int) -> None:
        """Count a flow that has ended, and log it if `log.connections` asks for it."""
        counters = self.counters
        counters.add(flow)
        counters.reasons[reason] += 1
        fault = flow.fault.profile.name if flow.fault is not None and flow.fault.fired else None
        if fault is not None:
            counters.faults[fault] += 1
        if not self._is_logged(flow, reason):
            return
        peer, local = flow.names
        self.log.info(
            "flow_closed",
            peer=peer,
            local=local,
            seconds=round((now - flow.opened) / SECOND, 3),
            received_datagrams=flow.received_datagrams,
            received=flow.received,
            sent_datagrams=flow.sent_datagrams,
            sent=flow.sent,
            refused=flow.refused,
            dropped=flow.dropped,
            reason=reason,
            **({"copies": flow.copies} if flow.copies else {}),
            **({"fault": fault} if fault is not None else {}),
        )

    def flush(self, now: int) -> None:
        """Log the numbers that were held back for a second."""
        self._log_counts(self._limiter.due(now))

    def finish(self) -> None:
        """Log all numbers that were held back."""
        self._log_counts(self._limiter.rest())

    def _limit(self, event: Event, now: int, **fields: object) -> None:
        if datagrams := self._limiter.count(event, now):
            self.log.warning(event.name, cause=event.cause, datagrams=datagrams, **fields)

    def _log_counts(self, counts: Iterable[tuple[Event, int]]) -> None:
        for event, datagrams in counts:
            self.log.warning(event.name, cause=event.cause, datagrams=datagrams)

    def _is_logged(self, flow: Flow, reason: Reason) -> bool:
        match self._connections:
            case "all":
                return True
            case "nonempty":
                return flow.received_datagrams > 0
            case "failed":
                return reason in _FAILURES or flow.dropped > 0 or flow.refused > 0
            case _:
                return False
