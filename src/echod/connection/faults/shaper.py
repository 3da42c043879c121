"""A queue of echo that is delayed, slowed or sliced. Without I/O: the clock is passed in."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

    from echod.settings.model import FaultSettings

# Burst allowance of a rate, in seconds. Without a slice, it is also the length of the longest piece.
_BURST = 0.02

# How far echo may fall behind its rate, in seconds, and still catch up after the process or the client was late.
_CATCH_UP = 0.25

# Timers and clock of uvloop have a resolution of one millisecond.
_RESOLUTION = 0.001


class Piece(NamedTuple):
    """Echo to send now."""

    data: bytes
    separate: bool
    """Whether it must be sent as a segment of its own."""


@dataclass(slots=True)
class _Message:
    """The unsent rest of a message."""

    data: memoryview
    due: float
    shaped: bool


class Shaper:
    """Hold echo back and release it in order, in pieces, each at its time.

    Args:
        settings: delay, jitter, rate and slice.
        random: the source of the jitter.
        clock: returns the time in seconds.
        capacity: number of bytes above which the queue is full, until it has fallen to a quarter.

    """

    __slots__ = ("_capacity", "_clock", "_free_at", "_queue", "_random", "_settings", "full", "held")

    def __init__(self, settings: FaultSettings, random: Random, clock: Callable[[], float], capacity: int) -> None:
        self._settings = settings
        self._random = random
        self._clock = clock
        self._capacity = capacity
        self._queue: deque[_Message] = deque()
        self._free_at = 0.0
        """When the line at the given rate has sent all earlier pieces."""
        self.held = 0
        """Number of bytes in the queue."""
        self.full = False

    def resize(self, capacity: int) -> None:
        """Change the capacity. It applies from the next change of the queue."""
        self._capacity = capacity

    def push(self, data: bytes, *, shaped: bool) -> None:
        """Append a message. One that is not shaped waits only for the messages before it."""
        due = self._clock()
        if shaped:
            due += self._settings.delay + self._random.uniform(-self._settings.jitter, self._settings.jitter)
        self._queue.append(_Message(memoryview(data), due, shaped))
        self.held += len(data)
        self.full = self.full or self.held > self._capacity

    def next_due(self) -> float:
        """Return the time of the next piece. The queue must not be empty."""
        return self._next()[1]

    def due_pieces(self) -> Iterator[Piece]:
        """Remove and yield the pieces that are due.

        Stop after a slice. uvloop merges writes made in one iteration, so the next slice needs another iteration.
        """
        now = self._clock()
        while self._queue:
            size, due = self._next()
            if due - now >= _RESOLUTION:
                return
            self._free_at = max(due, now - _CATCH_UP)
            message = self._queue[0]
            data, message.data = bytes(message.data[:size]), message.data[size:]
            if not message.data:
                self._queue.popleft()
            self.held -= size
            self.full = self.full and self.held > self._capacity // 4
            separate = message.shaped and self._settings.slice is not None
            yield Piece(data, separate)
            if separate:
                return

    def drain(self) -> bytes:
        """Remove and return all held echo."""
        data = b"".join(message.data for message in self._queue)
        self._queue.clear()
        self.held = 0
        self.full = False
        return data

    def _next(self) -> tuple[int, float]:
        """Return size and time of the next piece. At a rate, its time is when its last byte would arrive."""
        message, settings = self._queue[0], self._settings
        size = len(message.data)
        if not message.shaped:
            return size, message.due
        if settings.slice is not None:
            size = min(size, settings.slice)
        if settings.rate is None:
            return size, message.due
        if settings.slice is None:
            # Reading resumes at a quarter of the capacity. Smaller pieces keep the queue from running empty before that.
            size = min(size, max(1, min(int(settings.rate * _BURST), self._capacity // 8)))
        start = max(message.due - _BURST, self._free_at)
        return size, max(message.due, start + size / settings.rate)
