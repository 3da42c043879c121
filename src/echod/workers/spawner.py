"""The spawner: a process with one thread and no loop, which forks the workers.

A child of a process with threads and a loop inherits their locks and descriptors in any state. So the spawner is forked
first. The workers share the memory of its imports, and start in milliseconds.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import struct
import sys
import traceback
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from echod.daemon.signals import HANDLED

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

# An order: whether to fork or to kill, and the worker's number. With a fork, the worker's end of its channel is attached.
_ORDER = struct.Struct("=?I")

# A report: the kind, the worker's number, and its process, its wait status or the error number of fork(2).
_REPORT = struct.Struct("=BIi")
_KINDS: tuple[Literal["forked", "ended", "refused"], ...] = ("forked", "ended", "refused")

_FIRST_DESCRIPTOR = 3

# Seconds for the spawner to exit after its last worker.
_PATIENCE = 5.0


class Report(NamedTuple):
    """A message of the spawner."""

    kind: Literal["forked", "ended", "refused"]
    number: int
    """Of the worker."""
    value: int
    """The process if it was forked, the wait status if it has ended, the error number if fork(2) failed."""


class Spawner:
    """The parent's end. Use it as a context manager: the spawner exits after its last worker.

    Args:
        pid: of the spawner.
        sock: a socket that keeps the borders of messages.

    """

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self.sock = sock
        """Readable if there is a report, or if the spawner has ended."""

    @classmethod
    def start(cls, serve: Callable[[socket.socket], int]) -> Self:
        """Fork the spawner. The process must have one thread and no loop.

        Args:
            serve: the worker, given its end of the channel. Returns its exit code.

        Raises:
            OSError: fork(2) failed.

        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                raise
            if not pid:
                _run_and_exit(lambda: _obey(_keep_only(theirs), serve))
            ours.setblocking(False)  # noqa: FBT003  (its only parameter)
            return cls(pid, ours)

    def fork(self, number: int, channel: socket.socket) -> None:
        """Order a worker.

        Raises:
            OSError: the spawner has ended.

        """
        socket.send_fds(self.sock, [_ORDER.pack(True, number)], [channel.fileno()])  # noqa: FBT003  (a field)

    def kill(self, number: int) -> None:
        """Have a worker killed, if it has not ended."""
        with contextlib.suppress(OSError):  # the spawner has ended
            self.sock.send(_ORDER.pack(False, number))  # noqa: FBT003  (a field)

    def report(self) -> Report | None:
        """Return the next report, or None if the spawner has ended.

        Raises:
            BlockingIOError: there is no report.

        """
        try:
            data = self.sock.recv(_REPORT.size)
        except ConnectionError:
            return None
        if not data:
            return None
        kind, number, value = _REPORT.unpack(data)
        return Report(_KINDS[kind], number, value)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the spawner exit, and wait for that: it has the log open."""
        self.sock.close()
        descriptor = os.pidfd_open(self.pid)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(_PATIENCE * 1000):
            os.kill(self.pid, signal.SIGKILL)
        os.close(descriptor)
        os.waitpid(self.pid, 0)


def _run_and_exit(run: Callable[[], int]) -> None:
    """Run a function as the rest of a forked process."""
    code = 1
    try:
        code = run()
    except BaseException:  # noqa: BLE001  (nothing may return to the code that has forked)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _keep_only(kept: socket.socket) -> socket.socket:
    """Close all descriptors except the standard ones and this one."""
    os.closerange(_FIRST_DESCRIPTOR, kept.fileno())
    os.closerange(kept.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    return kept


def _obey(sock: socket.socket, serve: Callable[[socket.socket], int]) -> int:
    """Fork and reap workers until the parent has ended and so has every worker."""
    # A terminal and some supervisors signal the whole group. The parent decides for all.
    for handled in HANDLED:
        signal.signal(handled, signal.SIG_IGN)
    gc.freeze()  # a collection in a worker would write to the pages that all share
    workers: dict[int, tuple[int, int]] = {}  # by the descriptor of the process
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    has_parent = True
    while has_parent or workers:
        for descriptor, _ in poll.poll():
            if descriptor == sock.fileno():
                has_parent = _take_order(sock, serve, workers, poll)
                if not has_parent:
                    poll.unregister(sock)
            else:
                number, pid = workers.pop(descriptor)
                poll.unregister(descriptor)
                os.close(descriptor)
                _tell(sock, "ended", number, os.waitpid(pid, 0)[1])
    return 0


def _take_order(
    sock: socket.socket, serve: Callable[[socket.socket], int], workers: dict[int, tuple[int, int]], poll: select.poll
) -> bool:
    """Obey the next order; return False if the parent has ended."""
    data, descriptors, _, _ = socket.recv_fds(sock, _ORDER.size, 1)
    if not data:
        return False
    forks, number = _ORDER.unpack(data)
    if not forks:
        for alive, pid in workers.values():
            if alive == number:
                os.kill(pid, signal.SIGKILL)  # it is not reaped yet, so the number is its own
        return True
    with socket.socket(fileno=descriptors[0]) as channel:
        try:
            pid = os.fork()
        except OSError as error:
            _tell(sock, "refused", number, error.errno or 0)
            return True
        if not pid:
            _run_and_exit(lambda: serve(_keep_only(channel)))
    descriptor = os.pidfd_open(pid)
    workers[descriptor] = number, pid
    poll.register(descriptor, select.POLLIN)
    _tell(sock, "forked", number, pid)
    return True


def _tell(sock: socket.socket, kind: Literal["forked", "ended", "refused"], number: int, value: int) -> None:
    with contextlib.suppress(OSError):  # the parent has ended
        sock.send(_REPORT.pack(_KINDS.index(kind), number, value))
