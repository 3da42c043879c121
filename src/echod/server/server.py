"""The server: its listening sockets, its clients, and their end."""

from __future__ import annotations

import asyncio
import contextvars
import sys
from typing import TYPE_CHECKING, Any

from echod.net import addresses
from echod.server.client import LAST_STEPS, Client
from echod.server.drain import Drain
from echod.server.listener_task import ListenerTask, unwatch
from echod.server.quota import Quota
from echod.server.receipt import Receipt
from echod.server.sessions import new_session
from echod.server.timeouts import Sweep

if TYPE_CHECKING:
    import socket
    from collections.abc import Collection, Coroutine, Sequence

    from echod.connection.echo import EchoSession
    from echod.net.addresses import TcpAddress, UnixAddress
    from echod.net.listeners import ListeningSocket
    from echod.server.ledger import Counters, Ledger
    from echod.server.settings import ServerSettings
    from echod.server.shared_limit import SharedLimit
    from echod.server.shared_quota import SharedQuota


class Server:
    """Echo to the clients of some listening sockets.

    A server has two tasks of its own, the listener task and the sweep, and one task per client. `start` it in a running
    loop and end it with `shutdown`, which closes every socket and awaits every task. `abort` resets all clients instead
    of draining them. Make all calls in the thread of that loop, except those that read `addresses` and `clients`.

    Args:
        sockets: usually one, or one per address family. The server owns them from now on.
        settings: the sections that apply to this server.
        ledger: records the closed connections.
        shared_limit: replaces `max_connections` if the listener has servers in several processes.
        shared_quota: counts the clients of each address in all of these processes.

    """

    def __init__(
        self,
        sockets: Sequence[ListeningSocket],
        settings: ServerSettings,
        ledger: Ledger,
        shared_limit: SharedLimit | None = None,
        shared_quota: SharedQuota | None = None,
    ) -> None:
        self.settings = settings
        self.ledger = ledger
        self._clients: dict[asyncio.Task[None], Client] = {}
        self._quota = shared_quota or Quota(settings.limits.max_connections_per_client)
        self._shared_limit = shared_limit
        if shared_limit is None:
            self._listener = ListenerTask(
                sockets, self._admit, self._log_pause, self._log_resumed, has_room=self._has_room
            )
        else:
            self._listener = ListenerTask(
                sockets,
                self._admit,
                self._log_pause,
                self._log_resumed,
                has_room=lambda: shared_limit.acquire(self._listener.resume),
                give_back=shared_limit.give_back,
                is_ahead=shared_limit.is_ahead,
            )
        self._sweep = Sweep(self._clients.values(), settings.limits)
        self._drain = Drain(self._clients.values(), self._listener.accept_rest)
        self._tasks: list[asyncio.Task[None]] = []
        self._stop_began: tuple[float, int, Counters] | None = None
        self._shutdown: asyncio.Task[Receipt] | None = None
        named = (addresses.from_sockaddr(listening.sock.getsockname()) for listening in sockets)
        self.addresses: list[TcpAddress | UnixAddress] = [address for address in named if address is not None]
        """The addresses of the sockets, with the actual port instead of 0. They remain after the end."""

    def __str__(self) -> str:
        """Return the addresses, the state and the number of clients."""
        state = "serving" if self._tasks else "not started"
        if self._shutdown is not None and self._is_stopping:
            state = "stopped" if self._shutdown.done() else "stopping"
        return f"{' '.join(map(str, self.addresses))} {state}, clients={self.clients}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"

    def set_backlog(self, backlog: int) -> None:
        """Set the backlog of the listening sockets, except inherited ones.

        Raises:
            OSError: the kernel refused; earlier sockets have the new one already.

        """
        self._listener.set_backlog(backlog)

    def reconfigure(self, settings: ServerSettings) -> None:
        """Apply other settings from now on.

        Connected clients get the new limits and timeouts only. A lower limit closes no client.
        """
        self.settings = settings
        self._quota.reconfigure(settings.limits.max_connections_per_client)
        self._sweep.reconfigure(settings.limits)
        for client in self._clients.values():
            client.session.attempt(client.session.reconfigure, settings.limits, settings.shutdown)
        self._listener.resume()

    @property
    def clients(self) -> int:
        """The number of connected clients."""
        return len(self._clients)

    @property
    def received(self) -> int:
        """The number of bytes received so far, from closed and connected clients."""
        return self.ledger.counters.received + sum(client.session.received for client in self._clients.values())

    @property
    def connected(self) -> Collection[Client]:
        """The connected clients: a live view."""
        return self._clients.values()

    @property
    def stop_deadlines(self) -> tuple[float, float] | None:
        """The loop's times at which a stop ends its delay and its drain, or None before the stop.

        A pause of the process extends both.
        """
        if self._stop_began is None:
            return None
        shutdown = self.settings.shutdown
        delayed = self._stop_began[0] + shutdown.delay
        return delayed, delayed + shutdown.drain_timeout + shutdown.linger_timeout

    @property
    def accept_paused(self) -> bool:
        """Whether new clients have to wait in the backlog."""
        return self._listener.is_paused

    def start(self) -> None:
        """Begin to accept, in the running loop.

        Raises:
            RuntimeError: it was called before, or this is not the server's loop.

        """
        self._check_loop()
        if self._tasks:
            msg = "a server can be started only once"
            raise RuntimeError(msg)
        self._loop = asyncio.get_running_loop()
        # All clients share these two: with many clients, a context and a bound method each counts.
        self._context = contextvars.copy_context()
        self._on_client_end = self._remove
        self._failed: asyncio.Future[BaseException] = self._loop.create_future()
        for run in (self._listener.run, self._sweep.run):
            task = self._loop.create_task(run())
            task.add_done_callback(self._on_task_end)
            self._tasks.append(task)

    async def wait_failed(self) -> BaseException:
        """Wait until a task of the server itself fails, which is a defect, and return its exception.

        The server does not serve its clients properly after that: shut it down.
        """
        return await asyncio.shield(self._failed)

    @property
    def failure(self) -> BaseException | None:
        """The exception of the first task of the server itself that failed."""
        return self._failed.result() if self._tasks and self._failed.done() else None

    def begin_stop(self) -> int:
        """Begin the time that the receipt covers, and return the number of clients. Idempotent.

        `shutdown` calls it. Call it earlier to report the clients at the same moment.

        Raises:
            RuntimeError: this is not the server's loop.

        """
        self._check_loop()
        if self._stop_began is None:
            now = asyncio.get_running_loop().time()
            self._stop_began = now, self.clients, self.ledger.counters.snapshot()
        return self._stop_began[1]

    async def shutdown(self) -> Receipt:
        """Stop gracefully and return the receipt.

        Accept for `delay` more seconds. Accept all clients that have completed the TCP handshake, and close the sockets
        in the same step. Let the clients finish, within the drain's timeouts, and await every client's task. A client
        in the middle of its handshake is refused: `delay` is for these. The kernel may send on after the last close.

        The stop goes on if the caller is cancelled. Another call waits for the same end. If the stop itself is
        cancelled, because the program cancels all its tasks, it ends at once, and another call returns the receipt.

        Raises:
            RuntimeError: this is not the server's loop.

        """
        self._check_loop()
        if not self._tasks:
            self.start()  # to serve the clients that have connected since the sockets were opened
        if self._shutdown is None or not self._is_stopping:
            self.begin_stop()
            self._shutdown = self._loop.create_task(self._shut_down())
        return await asyncio.shield(self._shutdown)

    def abort(self) -> None:
        """Reset every client in a shutdown that is running or follows, and end it at once. Idempotent.

        Raises:
            RuntimeError: this is not the server's loop.

        """
        self._check_loop()
        self._drain.abort()

    def _check_loop(self) -> None:
        """Check that the server is not started, or that its loop runs in this thread."""
        if not self._tasks:
            return
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is not self._loop:
            msg = (
                "the server belongs to another event loop: call this in that loop, from other threads with "
                "asyncio.run_coroutine_threadsafe or loop.call_soon_threadsafe"
            )
            raise RuntimeError(msg)

    @property
    def _is_stopping(self) -> bool:
        """Whether a stop runs or has finished. The program may have cancelled an earlier one."""
        return self._shutdown is not None and not self._shutdown.cancelled()

    async def _shut_down(self) -> Receipt:
        assert self._stop_began is not None
        began, present, before = self._stop_began
        listener, sweep = self._tasks
        shutdown = self.settings.shutdown
        try:
            await self._drain.delay(shutdown.delay)
            await _cancel(listener)
            self._listener.withdraw()
            if not await self._drain.run(shutdown) and (waiting := self._listener.waiting):
                self.ledger.log.warning("backlog_abandoned", clients=waiting)
        finally:  # a defect in the drain ends the clients too, and so does a program that cancels all its tasks
            await _cancel(listener)
            self._listener.close()
            if self._clients:
                await asyncio.wait(self._clients, timeout=LAST_STEPS)
            await _cancel(*self._clients, sweep)
            if self._shared_limit is not None:
                self._shared_limit.close()
        return Receipt.between(before, self.ledger.counters, present, self._loop.time() - began)

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """Note the failure of a task of the server itself. If the program has cancelled it, refuse new clients."""
        if not task.cancelled():
            if (error := task.exception()) is not None and not self._failed.done():
                self._failed.set_result(error)
        elif not self._is_stopping:
            listener, sweep = self._tasks
            if task is sweep:
                listener.cancel()  # without the sweep, new clients would have no timeouts
            else:
                self._listener.close()  # otherwise new clients would wait in the backlog for ever
                self.ledger.log.error("listener_cancelled", clients=self.clients)

    # Called by the listener task

    def _has_room(self) -> bool:
        return self.clients < self.settings.limits.max_connections

    def _log_pause(self, cause: str) -> None:
        self.ledger.pause(cause, self.clients)

    def _log_resumed(self, seconds: float) -> None:
        self.ledger.resume(seconds, self.clients)

    def _admit(self, sock: socket.socket, sockaddr: Any) -> None:
        try:
            client = Client(sock, sockaddr, self._loop.time(), self._new_session)
            task = _begin(client.run(self.settings, self._quota), self._loop, self._context)
        except Exception as error:  # noqa: BLE001  (it is logged, and concerns this connection only)
            unwatch(sock)
            sock.close()
            self.ledger.turn_away(sockaddr, error)
            if self._shared_limit is not None:
                self._shared_limit.give_back()
            return
        self.ledger.accept()
        self._clients[task] = client
        if self._shared_limit is not None:
            self._shared_limit.count(len(self._clients))
        task.add_done_callback(self._on_client_end, context=self._context)

    def _new_session(self, client: Client, sock: socket.socket) -> EchoSession:
        session = new_session(sock, self.settings, self.ledger.counters.accepted + 1, client.describe)
        if (report := self.ledger.connect(client)) is not None:
            session.report_to(report)
        return session

    def _remove(self, task: asyncio.Task[None]) -> None:
        """Remove a finished client and record it.

        This is the done callback of every client task, so each exception is handled exactly once.
        """
        client = self._clients.pop(task)
        if self._shared_limit is not None:
            self._shared_limit.count(len(self._clients))
            self._shared_limit.release()
        try:
            if not task.cancelled():  # by the end of the loop, before the client was joined to its session
                self.ledger.close(client, self._loop.time(), task.exception())
        finally:  # an observer may fail
            self._listener.resume()
            self._drain.client_left()


if sys.version_info >= (3, 12):

    def _begin(
        life: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop, context: contextvars.Context
    ) -> asyncio.Task[None]:
        """Create a task and run its first step at once, which saves the loop an iteration per client."""
        return asyncio.Task(life, loop=loop, context=context, eager_start=True)

else:  # pragma: no cover  (coverage is measured on the newest version)

    def _begin(
        life: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop, context: contextvars.Context
    ) -> asyncio.Task[None]:
        return loop.create_task(life, context=context)


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
