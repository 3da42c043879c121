"""Watch the heartbeats of the workers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from echod.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Callable

SILENT = 3.0
"""Seconds without a heartbeat after which a worker counts as not answering."""


class Heartbeats:
    """Measure for how long each worker has been silent, by a clock that a pause of the parent does not advance.

    Such a pause usually stops the workers too: SIGSTOP to the group, the cgroup freezer, or the hypervisor.

    Args:
        last: returns the last heartbeat of a worker, in any unit.
        source: returns the time in seconds.

    """

    def __init__(self, last: Callable[[int], int], source: Callable[[], float] = time.monotonic) -> None:
        self._last = last
        self._clock = Clock(source)
        self._seen: dict[int, tuple[int, float]] = {}

    def watch(self, worker: int) -> None:
        """Watch a worker that starts now."""
        self._seen[worker] = self._last(worker), self._clock.time()

    def forget(self, worker: int) -> None:
        """Stop watching a worker that has ended."""
        self._seen.pop(worker, None)

    def look(self, interval: float) -> dict[int, float]:
        """Return for how many seconds each worker has been silent.

        Args:
            interval: seconds until the next look.

        """
        now = self._clock.time()
        for worker, (beat, _) in self._seen.items():
            if (last := self._last(worker)) != beat:
                self._seen[worker] = last, now
        self._clock.announce(interval)
        return {worker: now - since for worker, (_, since) in self._seen.items()}

    def are_recent(self) -> bool:
        """Tell whether no worker is silent, as far as the last look found out."""
        now = self._clock.time()
        return all(now - since < SILENT for _, since in self._seen.values())
