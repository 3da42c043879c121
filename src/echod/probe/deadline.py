"""One deadline for several blocking calls."""

from __future__ import annotations

import errno
import select
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable


class Deadline:
    """A moment after which no call may block.

    Args:
        seconds: time from now to the deadline.
        clock: returns seconds.

    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Return the seconds left.

        Raises:
            TimeoutError: none are left.

        """
        if (left := self._end - self.clock()) <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "timed out")
        return left

    def limit(self, sock: socket.socket) -> None:
        """Make the socket's next call time out at the deadline.

        Raises:
            TimeoutError: the deadline has passed.

        """
        sock.settimeout(self.left())

    def wait_readable(self, sock: socket.socket) -> None:
        """Wait until the socket is readable.

        Raises:
            TimeoutError: the deadline has passed.

        """
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        if not poll.poll(self.left() * 1000):
            raise TimeoutError(errno.ETIMEDOUT, "timed out")
