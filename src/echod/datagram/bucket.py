"""Token buckets: one per source of datagrams, one per listener. Without I/O: the caller passes the time."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Hashable

SECOND = 1_000_000_000
"""Nanoseconds. Integers keep every sum exact."""


class Rate(NamedTuple):
    """A rate as the virtual scheduling of GCRA needs it (ITU-T I.371). Both figures are nanoseconds."""

    interval: int
    """Time in which one token is added."""
    tolerance: int
    """The longest time that a bucket may be away from full and still give a token."""

    @classmethod
    def of(cls, per_second: int, burst: int) -> Self:
        """Return the rate for a number of tokens per second and the tokens of a full bucket. Rate 0 means no limit."""
        interval = -(-SECOND // per_second) if per_second else 0
        return cls(interval, (burst - 1) * interval)


class Bucket:
    """A token bucket, stored as the time at which it is full again.

    Args:
        rate: of the tokens.

    """

    __slots__ = ("_full_at", "_interval", "_tolerance", "users")

    def __init__(self, rate: Rate) -> None:
        self._interval, self._tolerance = rate
        self._full_at = 0
        self.users = 0
        """Number of flows that take tokens from it."""

    def take(self, now: int) -> bool:
        """Take a token; return False if there is none. `now` is in nanoseconds and never goes back."""
        full_at = self._full_at
        if full_at <= now:
            self._full_at = now + self._interval
            return True
        if full_at - now > self._tolerance:
            return False
        self._full_at = full_at + self._interval
        return True

    def has_token(self, now: int) -> bool:
        """Tell whether `take` would succeed."""
        return self._full_at - now <= self._tolerance

    def is_full(self, now: int) -> bool:
        """Tell whether the bucket equals a new one."""
        return self._full_at <= now

    def reconfigure(self, rate: Rate) -> None:
        """Apply another rate from now on."""
        self._interval, self._tolerance = rate

    def join(self) -> Self:
        """Count one more user, and return the bucket."""
        self.users += 1
        return self

    def leave(self) -> int:
        """Count one user less, and return the number that is left."""
        self.users -= 1
        return self.users


class Sources:
    """The buckets of all sources.

    A bucket without a flow is kept until it is full, so that a source gains nothing from a new flow. At most `capacity`
    of these are kept. The oldest goes first.

    Args:
        rate: of each source.
        capacity: number of buckets without a flow.

    """

    def __init__(self, rate: Rate, capacity: int) -> None:
        self._rate = rate
        self._capacity = capacity
        self._buckets: dict[Hashable, Bucket] = {}
        self._unused: OrderedDict[Hashable, Bucket] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of buckets."""
        return len(self._buckets)

    def reconfigure(self, rate: Rate, capacity: int) -> None:
        """Apply another rate to all buckets from now on."""
        self._rate, self._capacity = rate, capacity
        for bucket in self._buckets.values():
            bucket.reconfigure(rate)

    def join(self, source: Hashable) -> Bucket:
        """Return the bucket of a source for one more flow."""
        bucket = self._buckets.get(source)
        if bucket is None:
            bucket = self._buckets[source] = Bucket(self._rate)
        self._unused.pop(source, None)
        return bucket.join()

    def leave(self, source: Hashable, now: int) -> None:
        """Give up the bucket that `join` returned."""
        bucket = self._buckets[source]
        if not bucket.leave():
            self._unused[source] = bucket
        while self._unused:
            oldest = next(iter(self._unused))
            if len(self._unused) <= self._capacity and not self._unused[oldest].is_full(now):
                break
            del self._unused[oldest], self._buckets[oldest]
