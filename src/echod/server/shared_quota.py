"""The limit of clients per address that the servers of one listener share between processes."""

from __future__ import annotations

import mmap
import os
import threading
from collections import Counter

from echod.server.quota import network

# Entries of a worker's table. Pages without an entry take no memory.
_CAPACITY = 2**17

# A key may be in any of this many entries from its hash on. So all of them are rarely taken.
_WINDOW = 16

# Values of eight bytes: first all keys, then all counts.
_SIZE = 8 * 2 * _CAPACITY

# Tries to count a client while other workers count clients of the same address.
_TRIES = 100


class QuotaTable:
    """The clients of each address in each worker. A worker writes only its own part, and reads all of them.

    Args:
        descriptor: a file of `create`.
        workers: number of workers.

    """

    def __init__(self, descriptor: int, workers: int) -> None:
        self._map = mmap.mmap(descriptor, _SIZE * workers)
        self._cells = memoryview(self._map).cast("q")
        self._workers = workers

    @staticmethod
    def create(workers: int) -> int:
        """Return the descriptor of a new file in memory, filled with zeros."""
        descriptor = os.memfd_create("echod")
        os.ftruncate(descriptor, _SIZE * workers)
        return descriptor

    def total(self, key: int) -> int:
        """Return the number of clients in all workers."""
        total = 0
        for worker in range(self._workers):
            if (place := self._find(worker, key)) is not None:
                total += self._cells[place + _CAPACITY]
        return total

    def write(self, worker: int, key: int, clients: int) -> None:
        """Set the number of clients in one worker. Without a free entry, it stays unknown to the others."""
        place = self._find(worker, key)
        if place is None:
            first = self._first(worker, key)
            counts = self._cells[first + _CAPACITY : first + _CAPACITY + _WINDOW].tolist()
            if 0 not in counts:
                return
            place = first + counts.index(0)
            self._cells[place] = key
        self._cells[place + _CAPACITY] = clients

    def clear(self, worker: int) -> None:
        """Remove the clients of one worker."""
        self._map.madvise(mmap.MADV_REMOVE, _SIZE * worker, _SIZE)

    def _find(self, worker: int, key: int) -> int | None:
        first = self._first(worker, key)
        keys = self._cells[first : first + _WINDOW].tolist()
        return first + keys.index(key) if key in keys else None

    @staticmethod
    def _first(worker: int, key: int) -> int:
        return worker * 2 * _CAPACITY + key % (_CAPACITY - _WINDOW)


class SharedQuota:
    """Count the clients of each address in all workers, up to a limit. 0 means no limit.

    There is no lock that a stopped worker could hold. A worker counts the client first, and then reads the counts of all workers.
    Above the limit, it takes the client back. If that makes room, another worker did the same, and it tries again.
    So there are never more clients than the limit.

    Args:
        limit: maximum number of clients per address.
        table: of all workers.
        worker: the number of this one.

    """

    def __init__(self, limit: int, table: QuotaTable, worker: int) -> None:
        self._limit = limit
        self._table = table
        self._worker = worker
        self._clients = Counter[int]()
        self._barrier = threading.Lock()

    def reconfigure(self, limit: int) -> None:
        """Apply another limit from now on. Without a limit, the table is not used."""
        if limit and not self._limit:
            self._table.clear(self._worker)
            for key, clients in self._clients.items():
                self._table.write(self._worker, key, clients)
        self._limit = limit

    def acquire(self, host: str) -> bool:
        """Count a client; return False if its IP address has reached the limit."""
        key = _key(host)
        if self._limit and not self._has_counted(key, self._clients[key]):
            return False
        self._clients[key] += 1
        return True

    def release(self, host: str) -> None:
        """Stop counting a client that `acquire` has counted."""
        key = _key(host)
        self._clients[key] -= 1
        if self._limit:
            self._table.write(self._worker, key, self._clients[key])
        if not self._clients[key]:
            del self._clients[key]

    def _has_counted(self, key: int, clients: int) -> bool:
        for _ in range(_TRIES):
            self._table.write(self._worker, key, clients + 1)
            with self._barrier:  # a memory barrier: the other workers see the count before theirs are read
                pass
            if self._table.total(key) <= self._limit:
                return True
            self._table.write(self._worker, key, clients)
            if self._table.total(key) >= self._limit:
                break
        return False


def _key(host: str) -> int:
    """Return the hash of an address's network, which is the same in all workers and unpredictable for clients."""
    # The hash of a text depends on a secret of the process that has forked the workers. That of a number does not.
    return hash(str(network(host))) or 1
