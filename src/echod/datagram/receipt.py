"""The receipt of the stop of UDP listeners."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

    from echod.datagram.ledger import Counters


@dataclass(frozen=True, slots=True)
class FlowReceipt:
    """The datagrams received since the stop began."""

    flows: int
    """Flows that were open when the stop began, or began during it."""
    datagrams_received: int
    datagrams_sent: int
    """Received datagrams that were answered. An answer that was held when the stop began counts too."""
    datagrams_unanswered: int
    """Received datagrams whose answer was dropped. Refused ones do not count as received."""
    seconds: float

    @classmethod
    def between(cls, before: Counters, after: Counters, present: int, seconds: float) -> Self:
        """Return the receipt of a stop that began with `present` flows, from the counters before and after it."""
        return cls(
            flows=present + after.flows - before.flows,
            datagrams_received=after.received_datagrams - before.received_datagrams,
            datagrams_sent=after.sent_datagrams - before.sent_datagrams,
            datagrams_unanswered=after.dropped.total() - before.dropped.total(),
            seconds=round(seconds, 3),
        )

    @classmethod
    def total(cls, receipts: Iterable[FlowReceipt]) -> Self:
        """Add up the receipts of listeners that stopped at the same time."""
        rows = [asdict(receipt) for receipt in receipts]
        seconds = max((row.pop("seconds") for row in rows), default=0.0)
        return cls(
            **{name: sum(row[name] for row in rows) for name in cls.__slots__ if name != "seconds"}, seconds=seconds
        )
