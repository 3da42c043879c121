"""Count latencies, and summarise them as percentiles and as a histogram."""

from __future__ import annotations

import bisect
import collections
import math
from typing import TYPE_CHECKING, NamedTuple

from hdrh.histogram import HdrHistogram

if TYPE_CHECKING:
    from collections.abc import Iterable

_NANO = 1_000_000_000
# The unit of the histogram, nanoseconds.
_UNIT = 100
_DAY = 86400 * _NANO // _UNIT
# Different latencies that are kept as they are. Above that, some of them move to the histogram with each batch.
_KEPT = 50_000
_MOVED = 100

# The most bars of the histogram, and the least ratio between the limits of two bars.
_BARS = 16
_SMALLEST_RATIO = 1.1


class Bar(NamedTuple):
    """A part of the histogram."""

    limit: float
    """Its upper limit in seconds, inclusive."""
    messages: int


class Latencies:
    """A collection of latencies, with three significant digits each.

    Recording a value in an HDR histogram takes about 1 µs, which is a lot if a message takes 10 µs. So equal values are
    counted first, since most values occur often.
    """

    def __init__(self) -> None:
        self._histogram = HdrHistogram(1, _DAY, 3)
        self._counts: collections.Counter[int] = collections.Counter()
        self._sum = 0
        self.count = 0

    def add(self, values: list[int]) -> None:
        """Add latencies in nanoseconds."""
        self.count += len(values)
        self._sum += sum(values)
        self._counts.update([value // _UNIT for value in values])
        if len(self._counts) > _KEPT:
            self._move(_MOVED + len(values))

    def _move(self, number: int) -> None:
        for _ in range(min(number, len(self._counts))):
            value, count = self._counts.popitem()
            self._histogram.record_value(min(max(value, 1), _DAY), count)

    def _moved(self) -> HdrHistogram:
        self._move(len(self._counts))
        return self._histogram

    @property
    def mean(self) -> float:
        """The mean latency in seconds."""
        return self._sum / self.count / _NANO

    @property
    def least(self) -> float:
        """The lowest latency in seconds."""
        return _seconds(self._moved().min_value)

    @property
    def most(self) -> float:
        """The highest latency in seconds."""
        return _seconds(self._moved().max_value)

    def percentiles(self, of: Iterable[float]) -> dict[float, float]:
        """Return the latency in seconds for each percentile."""
        histogram = self._moved()
        values = histogram.get_percentile_to_value_dict(list(of))
        # The histogram returns the upper end of a range of values.
        return {percent: _seconds(min(value, histogram.max_value)) for percent, value in sorted(values.items())}

    def encoded(self) -> str:
        """Return all latencies in the format of HDR histograms, in units of 100 ns."""
        return str(self._moved().encode(), "ascii")

    def bars(self) -> list[Bar]:
        """Return the histogram. The ratio between limits is constant, so that a long tail needs few bars."""
        exact = [(_seconds(item.value_iterated_to), item.count_at_value_iterated_to) for item in self._moved()]
        least, most = self.least, self.most
        number = max(1, min(_BARS, round(math.log(most / least, _SMALLEST_RATIO))))
        limits = [least * (most / least) ** (place / number) for place in range(1, number)]
        counts = [0] * number
        for value, count in exact:
            counts[bisect.bisect_left(limits, value)] += count
        return [Bar(limit, count) for limit, count in zip([*limits, most], counts, strict=True)]


def _seconds(value: int) -> float:
    return round(value * _UNIT / _NANO, 7)
