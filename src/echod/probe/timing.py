"""Time: one deadline for several blocking calls, and the clock of a measurement with a wait of nanoseconds."""

from __future__ import annotations

import errno
import select
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from selectors import DefaultSelector

_NANO = 1_000_000_000


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


class Timer:
    """Tells the time, and waits until a selector has events or some time has passed.

    Python's poll and epoll round timeouts up to milliseconds, and select(2) fails for descriptors above 1,023.

    Args:
        selector: an epoll selector on Linux. Elsewhere its own timeout is precise enough (kqueue).

    """

    def __init__(self, selector: DefaultSelector) -> None:
        self.now = time.perf_counter_ns
        """Returns the time in nanoseconds."""
        self._selector = selector
        if sys.platform != "linux":  # pragma: no cover (Linux only)
            return
        import ctypes  # noqa: PLC0415  (a quick check does not need it)
        import struct  # noqa: PLC0415  (as above)

        self._ppoll = ctypes.CDLL(None).ppoll
        # struct pollfd: a descriptor as int, the wanted and the returned events as short.
        self._descriptor = ctypes.create_string_buffer(struct.pack("ihh", selector.fileno(), select.POLLIN, 0))
        # struct timespec: seconds and nanoseconds.
        self._time = (ctypes.c_long * 2)()

    def wait(self, nanoseconds: int) -> None:
        """Wait. A signal may end the wait early."""
        if sys.platform != "linux":  # pragma: no cover (Linux only)
            self._selector.select(nanoseconds / _NANO)
            return
        self._time[:] = [*divmod(nanoseconds, _NANO)]
        self._ppoll(self._descriptor, 1, self._time, None)
