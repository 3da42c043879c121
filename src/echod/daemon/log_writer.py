"""Write lines to a descriptor from a thread, so that no reader of the log can hold up the echo."""

from __future__ import annotations

import os
import select
import stat
import threading
import time
from typing import TYPE_CHECKING

from echod import threads

if TYPE_CHECKING:
    from collections.abc import Callable

# Lines of at most this many bytes wait to be written. As many again may be in the write under way.
_QUEUE_BYTES = 1024 * 1024

# Seconds to wait before lines are taken from the queue. Under load, many lines then share one write and one wake-up.
_GATHER = 0.005

CLOSE_TIMEOUT = 1.0


class LogWriter:
    """Write lines to a descriptor, from a thread of its own.

    `write` never waits. While the descriptor accepts nothing, a mebibyte of lines is kept, and further lines are
    dropped. A line that cannot be written (a closed pipe, a full disk) is dropped too. When lines flow again, one more
    line says how many were dropped.

    Args:
        descriptor: the destination, blocking or not.
        notice: renders the line that says how many lines were dropped.
        at_end: called from the thread after the last write.
        is_shared: whether other processes write lines to the same destination.

    Raises:
        ThreadError: the thread cannot be started.

    """

    def __init__(
        self,
        descriptor: int,
        notice: Callable[[int], bytes],
        at_end: Callable[[], object] = int,
        *,
        is_shared: bool = False,
    ) -> None:
        self._is_shared = is_shared
        self._descriptor = descriptor
        self._notice = notice
        self._at_end = at_end
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._lines: list[bytes] = []
        self._size = 0
        self._dropped = 0
        self.lost = 0
        """Number of lines dropped so far."""
        self._torn = False
        self._closing = False
        self._thread = threads.start(self._run, "log")

    def write(self, line: bytes) -> None:
        """Queue one line, newline included, or drop it."""
        with self._lock:
            if self._size + len(line) > _QUEUE_BYTES:
                self._dropped += 1
                self.lost += 1
                return
            self._lines.append(line)
            self._size += len(line)
            first = len(self._lines) == 1
        if first:
            self._wake.set()

    @property
    def is_regular_file(self) -> bool:
        """Whether the destination is a regular file, so that each write ends soon."""
        return stat.S_ISREG(os.fstat(self._descriptor).st_mode)

    def writes_to(self, descriptor: int) -> bool:
        """Tell whether a descriptor refers to the destination."""
        return os.path.samestat(os.fstat(descriptor), os.fstat(self._descriptor))

    def redirect(self, descriptor: int) -> None:
        """Write to another file from now on, queued lines included, and take over its descriptor."""
        os.dup2(descriptor, self._descriptor, inheritable=False)
        os.close(descriptor)
        self._torn = False  # the line that was cut short is in the other file

    def end(self) -> None:
        """Let the thread write the queued lines and end, without waiting for it."""
        self._closing = True
        self._wake.set()

    @property
    def ended(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Write the queued lines. Give up after `timeout` seconds."""
        self.end()
        self._thread.join(timeout)

    def _run(self) -> None:
        closing = False
        while not closing:
            self._wake.wait()
            if not self._closing:
                time.sleep(_GATHER)
            self._wake.clear()
            # After the event is cleared, or the wake-up of close() could be lost. Before the lines are taken, or some
            # could stay in the queue.
            closing = self._closing
            with self._lock:
                lines, self._lines, self._size = self._lines, [], 0
                dropped, self._dropped = self._dropped, 0
            lost = self._write_lines(lines)
            dropped += lost
            if lost:
                with self._lock:
                    self.lost += lost
            if dropped and (lost or self._write_lines([self._notice(dropped)])):
                with self._lock:
                    self._dropped += dropped
        self._at_end()

    def _write_lines(self, lines: list[bytes]) -> int:
        """Write lines, and return the number of lines that were not completely written."""
        if self._torn:
            lines = [b"\n", *lines]  # ends the line that an error has cut short
        text = b"".join(lines)
        data = rest = memoryview(text)
        # Larger writes of several processes to a pipe may be mixed (pipe(7)).
        atomic = select.PIPE_BUF if self._is_shared and not self.is_regular_file else len(text)
        try:
            while rest:
                end = _end_of_lines(text, len(data) - len(rest), atomic)
                rest = rest[self._write_some(rest[:end]) :]
        except OSError:
            written = len(data) - len(rest)
            whole = 0
            while written >= len(lines[whole]):
                written -= len(lines[whole])
                whole += 1
            lost = len(lines) - whole - (self._torn and not whole)
            self._torn = written > 0 or (self._torn and not whole)
            return lost
        self._torn = False
        return 0

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # another process that shares the descriptor made it non-blocking
            poll = select.poll()
            poll.register(self._descriptor, select.POLLOUT)
            poll.poll()
            return 0


def _end_of_lines(text: bytes, start: int, size: int) -> int:
    """Return the length of the complete lines from `start` on that fit into `size`, or else that of the first line."""
    if len(text) - start <= size:
        return len(text) - start
    last = text.rfind(b"\n", start, start + size)
    return (text.index(b"\n", start) if last < 0 else last) + 1 - start
