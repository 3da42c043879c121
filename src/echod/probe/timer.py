"""The clock of a measurement, and a wait of nanoseconds.

Python's poll and epoll round timeouts up to milliseconds. select(2) fails for descriptors above 1,023.
"""

from __future__ import annotations

import ctypes
import select
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selectors import DefaultSelector

_NANO = 1_000_000_000


class _PollDescriptor(ctypes.Structure):
    """struct pollfd of poll(2)."""

    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


class _TimeSpec(ctypes.Structure):
    """struct timespec of ppoll(2)."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Timer:
    """Tells the time, and waits until a selector has events or some time has passed.

    Args:
        selector: an epoll selector on Linux. Elsewhere its own timeout is precise enough (kqueue).

    """

    def __init__(self, selector: DefaultSelector) -> None:
        self.now = time.perf_counter_ns
        """Returns the time in nanoseconds."""
        self._selector = selector
        if sys.platform != "linux":  # pragma: no cover (Linux only)
            return
        self._ppoll = ctypes.CDLL(None).ppoll
        self._ppoll.argtypes = (ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_void_p)
        self._descriptor = _PollDescriptor(selector.fileno(), select.POLLIN)
        self._time = _TimeSpec()

    def wait(self, nanoseconds: int) -> None:
        """Wait. A signal may end the wait early."""
        if sys.platform != "linux":  # pragma: no cover (Linux only)
            self._selector.select(nanoseconds / _NANO)
            return
        self._time.seconds, self._time.nanoseconds = divmod(nanoseconds, _NANO)
        self._ppoll(ctypes.byref(self._descriptor), 1, ctypes.byref(self._time), None)
