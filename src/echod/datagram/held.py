"""Answers that a fault delays. Without I/O and without a clock."""

from __future__ import annotations

import heapq
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from echod.datagram.bucket import SECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from echod.connection.faults.injector import Echo
    from echod.datagram.flows import Flow

    Send = Callable[[Flow, bytes, int, int], None]
    """Sends an answer of a flow: the payload, the number of copies, and the time."""

# Memory of all delayed answers of a listener, and of one without its payload, bytes.
_HELD_BYTES = 16 * 1024 * 1024
_OVERHEAD = 256

# Timers of uvloop have a resolution of one millisecond.
_RESOLUTION = SECOND // 1000


class Held(NamedTuple):
    """A delayed answer. It compares by its time, then by its order of arrival."""

    due: int
    number: int
    flow: Flow
    data: bytes
    copies: int
    send: Send


class HoldQueue:
    """The delayed answers of a listener, by the time at which they are due."""

    def __init__(self) -> None:
        self._heap: list[Held] = []
        self._numbers = count()
        self._bytes = 0

    def push(self, due: int, flow: Flow, echo: Echo, send: Send) -> bool:
        """Hold an answer; return False if the queue is full."""
        size = len(echo.data) + _OVERHEAD
        if self._bytes + size > _HELD_BYTES:
            return False
        self._bytes += size
        heapq.heappush(self._heap, Held(due, next(self._numbers), flow, echo.data, echo.copies, send))
        return True

    def next_due(self) -> int | None:
        """Return the time of the next answer, or None if there is none."""
        return self._heap[0].due if self._heap else None

    def pop_due(self, now: int) -> Iterator[Held]:
        """Remove and yield the answers that are due. Those of flows that have ended are among them."""
        while self._heap and self._heap[0].due - now < _RESOLUTION:
            yield self._pop()

    def pop_all(self) -> Iterator[Held]:
        """Remove and yield all answers, in the order of their times."""
        while self._heap:
            yield self._pop()

    def _pop(self) -> Held:
        held = heapq.heappop(self._heap)
        self._bytes -= len(held.data) + _OVERHEAD
        return held
