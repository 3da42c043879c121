"""The limit of clients that the servers of one listener share between processes."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# Clients that a worker may have more than the worker with the fewest: a number, and a part of the fewest. Fewer would
# make workers wait for each other during a burst.
_LEAD = 4
_LEAD_PART = 16


class SharedLimit:
    """Count the clients of one listener in this worker, and share the limit and the work with the other workers.

    The limit is a semaphore: an eventfd(2) with EFD_SEMAPHORE that has a token for each client that may still connect. So the
    limit is exact without a lock. The counts are in memory that all workers map. Each worker writes only its own.

    A worker takes the token before it counts the client, and returns it after. If the worker is killed in between, the
    token is lost: the limit may become lower by one, never higher.

    Args:
        semaphore: the eventfd, non-blocking.
        counts: the number of clients of each worker, by its number.
        limit: the maximum number of clients, as a single value. After a lower one, tokens for earlier clients may be left.
        number: of this worker.
        is_alive: tells whether the worker with this number answers.
        shares_queue: whether all workers accept from the same sockets.

    """

    def __init__(
        self,
        semaphore: int,
        counts: memoryview,
        limit: memoryview,
        number: int,
        is_alive: Callable[[int], bool],
        *,
        shares_queue: bool,
    ) -> None:
        self._semaphore = semaphore
        self._counts = counts
        self._limit = limit
        self._number = number
        self._is_alive = is_alive
        self._shares_queue = shares_queue
        self._is_waiting = False

    def acquire(self, resume: Callable[[], None]) -> bool:
        """Reserve room for a client, in the running loop.

        Args:
            resume: called once there may be a token again, if there is none now.

        """
        try:
            os.eventfd_read(self._semaphore)
        except BlockingIOError:
            pass
        else:
            # Counted before the check: of several workers that take tokens at the same moment, none sees too low a sum.
            self._counts[self._number] += 1
            if sum(self._counts) <= self._limit[0]:
                return True
            self.give_back()
        if not self._is_waiting:
            self._is_waiting = True
            asyncio.get_running_loop().add_reader(self._semaphore, self._wake, resume)
        return False

    def give_back(self) -> None:
        """Give up the room that `acquire` has reserved."""
        self._counts[self._number] -= 1
        self.release()

    def release(self) -> None:
        """Return the token of a client that has left."""
        os.eventfd_write(self._semaphore, 1)

    def count(self, clients: int) -> None:
        """Set the number of clients of this worker."""
        self._counts[self._number] = clients

    def is_ahead(self) -> bool:
        """Tell whether other workers should accept the next client of a queue that all share."""
        if not self._shares_queue:
            return False
        others = [
            clients for number, clients in enumerate(self._counts) if number != self._number and self._is_alive(number)
        ]
        least = min(others, default=self._counts[self._number])
        return bool(self._counts[self._number] > least + _LEAD + least // _LEAD_PART)

    def close(self) -> None:
        """Stop waiting for a token, in the running loop."""
        if self._is_waiting:
            self._is_waiting = False
            asyncio.get_running_loop().remove_reader(self._semaphore)

    def _wake(self, resume: Callable[[], None]) -> None:
        # Not watched any longer: another cause of a pause may keep this worker from taking the token.
        self.close()
        resume()
