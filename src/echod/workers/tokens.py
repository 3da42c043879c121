"""The parent's end of a limit that all workers share."""

from __future__ import annotations

import asyncio
import os


class Tokens:
    """A semaphore with a token for each client that may still connect: see `SharedLimit`.

    Use it in the running loop.

    Args:
        limit: maximum number of clients.

    """

    def __init__(self, limit: int) -> None:
        self.descriptor = os.eventfd(limit, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._limit = limit
        self._debt = 0

    def set_limit(self, limit: int) -> None:
        """Change the limit. If it is lower, tokens are taken as soon as clients return them."""
        change = limit - self._limit
        self._limit = limit
        if change > 0:
            self.give(change)
        elif change < 0:
            self._debt -= change
            self._collect()

    def give(self, tokens: int) -> None:
        """Add tokens, such as those of a worker that has died."""
        if tokens:
            os.eventfd_write(self.descriptor, tokens)

    def _collect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._debt:
                os.eventfd_read(self.descriptor)
                self._debt -= 1
        except BlockingIOError:
            loop.add_reader(self.descriptor, self._collect)
        else:
            loop.remove_reader(self.descriptor)
