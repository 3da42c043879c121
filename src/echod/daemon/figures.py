"""Figures of the daemon as a whole, from the counters of its listeners."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echod.server.ledger import Counters


def totals(counters: Sequence[Counters]) -> dict[str, object]:
    """Return the totals since the start, for the last line of the log."""
    faults = sum((one.faults for one in counters), Counter[str]())
    return {
        "connections": sum(one.accepted for one in counters),
        "empty": sum(one.empty for one in counters),
        "accept_pauses": sum(one.accept_pauses for one in counters),
        "accept_failures": sum(one.accept_failures for one in counters),
        "received": sum(one.received for one in counters),
        "sent": sum(one.sent for one in counters),
        "acked": sum(one.acked for one in counters),
        "discarded_bytes": sum(one.discarded for one in counters),
        **({"faults": dict(faults)} if faults else {}),
    }
