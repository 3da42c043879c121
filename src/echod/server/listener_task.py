"""The listener task: accept connections while there is room, and pause while there is none."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from typing import TYPE_CHECKING, Any

from echod.net import kernel

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable

    from echod.net.listeners import ListeningSocket

# Errors of accept(2) about the one connection that it was to return, which the kernel has dropped (accept(2)).
_GONE = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPROTO,
        errno.EPERM,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.ETIMEDOUT,
    }
)

# Seconds of the pauses after failures of accept(2): each is twice as long as the one before.
_FIRST_PAUSE = 0.005
_LAST_PAUSE = 1.0

# Seconds that a worker with many clients leaves a waiting connection to the others.
_HEAD_START = 0.002


def watch(sock: socket.socket) -> None:
    """Register an accepted socket with asyncio's selector before it has a transport.

    The transport registers its socket in a callback of its own. If that fails, the client stays connected and unread.
    The transport takes over this registration without a system call. uvloop registers in C, where a failure aborts the
    process.

    Raises:
        OSError: from epoll_ctl(2): ENOSPC or ENOMEM.

    """
    loop = asyncio.get_running_loop()
    if isinstance(loop, asyncio.SelectorEventLoop):
        loop.add_reader(sock.fileno(), lambda: None)


def unwatch(sock: socket.socket) -> None:
    """Undo `watch`. This is necessary before a socket without a transport is closed."""
    loop = asyncio.get_running_loop()
    if isinstance(loop, asyncio.SelectorEventLoop) and sock.fileno() >= 0:
        loop.remove_reader(sock.fileno())


class ListenerTask:
    """Accept connections from some listening sockets.

    Create a task of `run`. Cancel that task to stop accepting. The sockets then stay open until `close` or until
    `accept_rest` has emptied the backlog.

    Args:
        sockets: the listening sockets, which this object owns from now on.
        admit: takes each accepted connection and its peer's address; must not raise.
        paused: called with the cause of a pause, once per cause until the pause ends.
        resumed: called with the length of a pause in seconds once no connection waits any more.
        has_room: returns whether another connection may be accepted. True reserves the room.
        give_back: called if the reserved room was not used.
        is_ahead: returns whether other processes should accept from these sockets first.
        batch: maximum number of connections accepted at once, so that connected clients are served in between.
        interval: seconds between two batches. 0: accept again as soon as a connection waits.

    """

    def __init__(
        self,
        sockets: Iterable[ListeningSocket],
        admit: Callable[[socket.socket, Any], None],
        paused: Callable[[str], None],
        resumed: Callable[[float], None],
        *,
        has_room: Callable[[], bool] = lambda: True,
        give_back: Callable[[], None] = lambda: None,
        is_ahead: Callable[[], bool] = lambda: False,
        batch: int = 64,
        interval: float = 0,
    ) -> None:
        self._sockets = list(sockets)
        self._admit = admit
        self._report_pause = paused
        self._report_end = resumed
        self._has_room = has_room
        self._give_back = give_back
        self._is_ahead = is_ahead
        self._has_yielded = False
        self._batch = batch
        self._interval = interval
        self._resumed = asyncio.Event()
        self._retry_after = _FIRST_PAUSE
        self._paused_since: float | None = None
        self._causes = set[str]()
        # An accepted connection that the loop cannot watch yet, because epoll_ctl(2) failed.
        self._unwatched: tuple[socket.socket, Any] | None = None

    @property
    def is_paused(self) -> bool:
        """Whether connections have to wait in the backlog."""
        return self._paused_since is not None

    @property
    def waiting(self) -> int:
        """The number of connections that wait to be admitted, as far as the kernel reports it."""
        backlog = sum(kernel.waiting_connections(listening.sock) for listening in self._sockets)
        return backlog + (self._unwatched is not None)

    async def run(self) -> None:
        """Accept connections until cancelled.

        accept(2) is called in a callback of the loop. A coroutine that awaits `loop.sock_accept` loses the connection if
        it is cancelled in the iteration in which the accept succeeds.
        """
        self._loop = asyncio.get_running_loop()
        while True:
            # Done when accepting has to stop. Its result: seconds until the next try, or None to wait for `resume`.
            self._stopped: asyncio.Future[float | None] = self._loop.create_future()
            try:
                for listening in self._sockets:
                    self._loop.add_reader(listening.sock, self._accept, listening)
                    if self.is_paused:
                        self._accept(listening)  # an empty backlog ends the pause, without an event
            except OSError as error:  # from epoll_ctl(2)
                self._pause_after(error)
            try:
                seconds = await self._stopped
            finally:
                for listening in self._sockets:
                    self._loop.remove_reader(listening.sock)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._resumed.wait()

    def pause(self, cause: str, retry_after: float | None) -> None:
        """Stop accepting; new connections wait in the backlog.

        Args:
            cause: for the log.
            retry_after: seconds until the next try. None: only `resume` ends the wait.

        """
        if self._stopped.done():
            return
        if self._paused_since is None:
            self._paused_since = self._loop.time()
            self._causes.clear()
        if cause not in self._causes:
            self._causes.add(cause)
            self._report_pause(cause)
        self._stop_for(retry_after)

    def resume(self) -> None:
        """Try again at once: there may be room, or a descriptor, for another connection."""
        self._resumed.set()

    def accept_rest(self) -> bool:
        """Accept all pending connections and close the sockets; return whether that succeeded.

        Both are one step without an await, because closing a socket resets the connections in its backlog. The kernel
        has already accepted these clients, so there need not be room for them. An inherited socket is only closed: its
        other owner keeps the backlog for the next process.
        """
        gone = 0
        while self._sockets:
            listening = self._sockets[-1]
            try:
                if self._unwatched is not None or not listening.inherited:
                    self._admit(*self._take(listening))
                    continue
            except BlockingIOError:
                pass
            except OSError as error:
                # Bounded: EPERM from a system call filter concerns every connection, and leaves it in the queue.
                if gone < self._batch and self._is_gone(error):
                    gone += 1
                    continue
                # Without a free descriptor, accept(2) fails before it looks at the queue, which may be empty.
                if self._unwatched is not None or kernel.waiting_connections(listening.sock):
                    return False
            self._sockets.pop().close()
        return True

    def set_backlog(self, backlog: int) -> None:
        """Set the backlog of the listening sockets, except inherited ones.

        Raises:
            OSError: the kernel refused; earlier sockets have the new one already.

        """
        for listening in self._sockets:
            if not listening.inherited:
                listening.sock.listen(backlog)

    def withdraw(self) -> None:
        """Unlink the socket files so that no new client finds them. Idempotent."""
        for listening in self._sockets:
            listening.withdraw()

    def close(self) -> None:
        """Close the sockets, which resets all connections that still wait."""
        while self._sockets:
            self._sockets.pop().close()
        if self._unwatched is not None:
            self._unwatched[0].close()
            self._unwatched = None

    def _accept(self, listening: ListeningSocket) -> None:
        if self._stopped.done():  # by another socket in this iteration
            return
        try:
            self._accept_batch(listening)
        except Exception as error:  # noqa: BLE001  (a defect, which ends the task)
            self._stopped.set_exception(error)

    def _accept_batch(self, listening: ListeningSocket) -> None:
        gone: OSError | None = None
        admitted = False
        for accepted in range(self._batch):
            if self._is_ahead() and not self._has_yielded:
                # Once per connection: the others may be busy.
                self._has_yielded = True
                self._stop_for(_HEAD_START)
                return
            self._has_yielded = False
            if not self._has_room():
                self._pause_for_room(accepted)
                return
            try:
                connection, sockaddr = self._take(listening)
            except BlockingIOError:
                self._give_back()
                self._end_pause()
                return
            except OSError as error:
                self._give_back()
                if self._is_gone(error):
                    gone = error
                    continue
                if accepted and self._unwatched is None:
                    self._end_pause()
                else:
                    self._pause_after(error)
                return
            admitted = True
            self._retry_after = _FIRST_PAUSE
            self._admit(connection, sockaddr)
        if gone is not None and not admitted:
            # EPERM from a system call filter concerns every connection, and leaves it in the queue.
            self._pause_after(gone)
        elif self._interval:
            self._stop_for(self._interval)

    def _pause_for_room(self, accepted: int) -> None:
        """Pause only if this wake-up accepted nothing; otherwise the backlog may already be empty."""
        if accepted:
            self._end_pause()
        else:
            self.pause("max_connections", None)

    def _take(self, listening: ListeningSocket) -> tuple[socket.socket, Any]:
        """Return an accepted connection that the loop watches. Keep one that it cannot watch yet for the next call.

        Raises:
            OSError: from accept(2) or epoll_ctl(2).

        """
        if self._unwatched is None:
            self._unwatched = listening.accept()
        watch(self._unwatched[0])
        taken, self._unwatched = self._unwatched, None
        return taken

    def _is_gone(self, error: OSError) -> bool:
        return error.errno in _GONE and self._unwatched is None

    def _pause_after(self, error: OSError) -> None:
        self.pause(errno.errorcode.get(error.errno or 0, str(error)), self._retry_after)
        self._retry_after = min(2 * self._retry_after, _LAST_PAUSE)

    def _stop_for(self, seconds: float | None) -> None:
        # Cleared here and not before the wait: `resume` may be called in between.
        self._resumed.clear()
        self._stopped.set_result(seconds)

    def _end_pause(self) -> None:
        """Report the end of a pause once no connection waits.

        Not earlier: if one connection replaces another, new clients still have to wait.
        """
        if self._paused_since is not None and not self.waiting:
            seconds = round(self._loop.time() - self._paused_since, 3)
            self._paused_since = None
            self._retry_after = _FIRST_PAUSE
            self._report_end(seconds)
