"""Memory that the parent and all workers map: the limit of each listener, and per worker a heartbeat and the clients."""

from __future__ import annotations

import mmap
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Each value is a signed integer of eight bytes, which the CPU reads and writes as a whole.
_SIZE = 8

BEAT = 0.5
"""Seconds between two heartbeats of a worker."""

# Seconds without a heartbeat after which the other workers do not wait for a worker.
_SILENCE = 2.0


class Slots:
    """The shared memory. A worker writes only its own values, and the parent writes those of workers that have ended.

    Args:
        descriptor: a file of `create`.
        workers: number of workers.
        listeners: number of listeners.

    """

    def __init__(self, descriptor: int, workers: int, listeners: int) -> None:
        self._cells = memoryview(mmap.mmap(descriptor, _size(workers, listeners))).cast("q")
        self._workers = workers
        self._end = workers * (1 + listeners)
        self.limits = self._cells[self._end :]
        """Maximum number of clients by listener, which the parent writes."""

    @staticmethod
    def create(workers: int, listeners: int) -> int:
        """Return the descriptor of a new file in memory, filled with zeros."""
        descriptor = os.memfd_create("echod")
        os.ftruncate(descriptor, _size(workers, listeners))
        return descriptor

    def beat(self, worker: int) -> None:
        """Record that this worker's loop runs."""
        self._cells[worker] = time.monotonic_ns()

    def last_beat(self, worker: int) -> int:
        """Return the last heartbeat in nanoseconds of the monotonic clock, or 0."""
        return self._cells[worker]

    def is_alive(self, worker: int) -> bool:
        """Tell whether a worker's loop has run recently."""
        return time.monotonic_ns() - self._cells[worker] < _SILENCE * 1e9

    def clients(self, listener: int) -> memoryview:
        """Return the numbers of clients of a listener, by worker."""
        first = self._workers * (1 + listener)
        return self._cells[first : first + self._workers]

    def clear(self, worker: int) -> Sequence[int]:
        """Set a worker's values to 0. Return the numbers of clients that it had, by listener."""
        self._cells[worker] = 0
        columns = range(worker + self._workers, self._end, self._workers)
        clients = [self._cells[index] for index in columns]
        for index in columns:
            self._cells[index] = 0
        return clients


def _size(workers: int, listeners: int) -> int:
    """Return the size in bytes: heartbeats, then the clients of each listener by worker, then the limits."""
    return _SIZE * (workers * (1 + listeners) + listeners)
