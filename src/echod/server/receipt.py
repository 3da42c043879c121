"""The receipt of a drain."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self

from echod.connection.outcome import MEANINGS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from echod.server.ledger import Counters


@dataclass(frozen=True, slots=True)
class Receipt:
    """The result of a drain. Each client is in one of `completed`, `quiet`, `cut`, `aborted` and `failed`."""

    clients: int
    """Clients connected when the stop began, or accepted since."""
    completed: int
    """Clients that closed or reset the connection themselves."""
    quiet: int
    """Clients closed because they were silent and had all their echo."""
    cut: int
    """Clients still active at the deadline. They were closed then, after the echo of everything received so far."""
    aborted: int
    """Clients closed or reset before they took all their echo."""
    failed: int
    """Clients closed because of an error: a protocol violation, a limit, a fault profile, a system call, a defect."""
    unsent_bytes: int
    """Bytes received that the kernel never took for sending."""
    unacked_bytes: int
    """Bytes sent that were not acknowledged when the connection was closed."""
    discarded_bytes: int
    """Bytes received after our FIN."""
    seconds: float

    @classmethod
    def between(cls, before: Counters, after: Counters, present: int, seconds: float) -> Self:
        """Return the receipt of a drain that began with `present` clients, from the counters before and after it."""
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
    def of_failed(cls, clients: int) -> Self:
        """Return the receipt of clients that were lost with their process."""
        nothing = dict.fromkeys(cls.__slots__, 0)
        return cls(**nothing | {"clients": clients, "failed": clients})

    @classmethod
    def total(cls, receipts: Iterable[Receipt]) -> Self:
        """Add up the receipts of servers that drained at the same time."""
        rows = [asdict(receipt) for receipt in receipts]
        seconds = max((row.pop("seconds") for row in rows), default=0.0)
        sums = Counter[str]()
        for row in rows:
            sums.update(row)
        return cls(**{name: sums[name] for name in cls.__slots__ if name != "seconds"}, seconds=seconds)
