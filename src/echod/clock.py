"""A clock for timeouts, which a pause of this process does not run out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# Lateness of a look that is a busy loop's and not a pause of the process, seconds.
_TOLERANCE = 0.25


class Clock:
    """Measure time as one periodic look at the clients sees it.

    A process may be paused: by SIGSTOP, by the cgroup freezer, or with its virtual machine. To its clients it is the
    process that is silent then. So each look announces the next one, and the time between the two counts only up to
    the announced moment and a small tolerance. After a pause, a client still has nearly all of its time.

    Each user has a clock of its own, because the announcements are about the looks of one user.

    Args:
        source: returns the time in seconds; usually the loop's.

    """

    __slots__ = ("_counted", "_limit", "_since", "_source")

    def __init__(self, source: Callable[[], float]) -> None:
        self._source = source
        self._counted = self._since = source()
        self._limit = math.inf

    def time(self) -> float:
        """Return the time in seconds. It never goes back."""
        return self._counted + min(self._source() - self._since, self._limit)

    @property
    def late(self) -> bool:
        """Whether the announced moment passed so long ago that the process must have been paused."""
        return self._source() - self._since > self._limit

    def announce(self, seconds: float) -> None:
        """Announce the next look."""
        now = self._source()
        self._counted += min(now - self._since, self._limit)
        self._since = now
        self._limit = seconds + _TOLERANCE
