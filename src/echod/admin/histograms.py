"""Histograms of closed connections."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from echod.server.ledger import Entry

# Upper bounds in seconds. The ledger rounds durations to a millisecond.
_DURATIONS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 43200.0)
_ROUND_TRIPS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Distribution:
    """Count values by upper bound.

    Args:
        bounds: ascending and inclusive. A last bound at infinity is added.

    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def include(self, other: Distribution) -> None:
        """Add the values of another distribution with the same bounds."""
        self._counts = [one + another for one, another in zip(self._counts, other._counts, strict=True)]
        self._sum += other._sum

    @property
    def sum(self) -> float:
        """The sum of all values."""
        return self._sum

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """The number of values up to each bound, as Prometheus wants it: cumulative, with the bound as text."""
        return list(zip((*map(repr, self._bounds), "+Inf"), accumulate(self._counts), strict=True))


class Histograms(NamedTuple):
    """Durations and round trips of the closed connections of one listener, in seconds."""

    durations: Distribution
    round_trips: Distribution

    @classmethod
    def empty(cls) -> Histograms:
        """Return the histograms of a listener without closed connections."""
        return cls(Distribution(_DURATIONS), Distribution(_ROUND_TRIPS))

    @classmethod
    def total(cls, histograms: Iterable[Histograms]) -> Histograms:
        """Return the sums of several histograms."""
        total = cls.empty()
        for each in histograms:
            total.durations.include(each.durations)
            total.round_trips.include(each.round_trips)
        return total

    def observe(self, entry: Entry) -> None:
        """Add a closed connection."""
        self.durations.add(entry.seconds)
        if entry.rtt_ms is not None:
            self.round_trips.add(entry.rtt_ms / 1000)
