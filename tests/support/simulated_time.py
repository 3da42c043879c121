"""Simulate the time of a load generator, so that tests neither sleep nor depend on the speed of the machine."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from echod.probe.timing import Timer
from harness import PATIENCE

if TYPE_CHECKING:
    from selectors import DefaultSelector

_NANO = 1_000_000_000
_READING = 10_000
_STEP = 1_000_000


class SimulatedTime:
    """The time of one load generator: the clock, seen from the test and its server.

    Each reading of the clock takes 10 µs. A wait of the load generator takes 1 ms at most.
    """

    def __init__(self) -> None:
        self._now = 0
        self._changed = threading.Condition()

    def advance(self, nanoseconds: int) -> int:
        """Advance the clock, and return the time."""
        with self._changed:
            self._now += nanoseconds
            self._changed.notify_all()
            return self._now

    def pause(self, seconds: float) -> None:
        """Block the caller until the simulated time has passed."""
        with self._changed:
            end = self._now + int(seconds * _NANO)
            assert self._changed.wait_for(lambda: self._now >= end, PATIENCE)

    def timer(self, selector: DefaultSelector) -> Timer:
        """Return the timer for a load generator."""
        return _SimulatedTimer(selector, self)


class _SimulatedTimer(Timer):
    def __init__(self, selector: DefaultSelector, time: SimulatedTime) -> None:
        super().__init__(selector)
        self.now = lambda: time.advance(_READING)
        self._simulated = time

    def wait(self, nanoseconds: int) -> None:
        if not self._selector.select(0.001):
            self._simulated.advance(min(nanoseconds, _STEP))
