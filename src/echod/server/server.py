"""The server: listening sockets, the listener task, the registry of client tasks, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import structlog

from echod import embed
from echod.clock import Clock
from echod.connection.echo import EchoSession
from echod.connection.faults.profile import FaultProfile
from echod.connection.faults.session import FaultSession
from echod.connection.info import InfoSession
from echod.connection.line import LineSession
from echod.connection.state import Phase
from echod.connection.tls import TlsBuffers, TlsEnd
from echod.net import addresses, kernel
from echod.net.listeners import ListenerSpec, open_listeners
from echod.server.client import LAST_STEPS, AdmissionPolicy, Client, Quota, Timeouts, unwatch, watch
from echod.server.drain import Drain, DrainSettings
from echod.server.ledger import Ledger, Receipt

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection, Coroutine, Sequence
    from types import TracebackType
    from typing import Unpack

    from structlog.typing import FilteringBoundLogger

    from echod.embed import Options
    from echod.net.addresses import TcpAddress, UnixAddress
    from echod.net.listeners import ListeningSocket
    from echod.server.ledger import Counters, Entry
    from echod.settings.model import LimitsSettings, ListenerSettings, Settings, ShutdownSettings

Mode = Literal["stream", "line", "info"]

# Connections taken at one wake-up, so that those who are already served get their turn in between.
_BATCH = 64

# Errors of accept(2) that concern the one connection that was to be accepted, which is gone by then.
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

# The pause after an accept that failed for want of descriptors or memory: doubling, seconds.
_FIRST_PAUSE = 0.005
_LAST_PAUSE = 1.0

# Takes no event of a level that a server logs at.
_SILENCE: FilteringBoundLogger = structlog.wrap_logger(
    structlog.ReturnLogger(), [], structlog.make_filtering_bound_logger(logging.CRITICAL)
).bind()

_LONGEST_SWEEP = 1.0
_SHORTEST_SWEEP = 0.01


class ServerSettings(NamedTuple):
    """What a server takes of the settings."""

    max_connections: int
    """At this many clients it stops accepting."""
    timeouts: Timeouts
    limits: LimitsSettings
    shutdown: ShutdownSettings
    drain: DrainSettings
    max_connections_per_client: int = 0
    """Clients of one address, an IPv6 network of 64 bits being one; 0: no limit."""
    admission: AdmissionPolicy = AdmissionPolicy()
    mode: Mode = "stream"
    fault: FaultProfile | None = None

    @classmethod
    def derive(cls, settings: Settings, table: ListenerSettings, tls: TlsEnd | None, max_connections: int) -> Self:
        """Return what the server of one listener takes of the settings.

        Args:
            settings: all of them.
            table: the listener's own.
            tls: what came of its TLS settings.
            max_connections: the cap, which may be lower than that of the settings.

        """
        limits, shutdown = settings.limits, settings.shutdown
        fault = settings.faults.get(table.fault)
        trusted = None
        if table.proxy_protocol == "require":
            trusted = table.trusted_networks
        return cls(
            max_connections=max_connections,
            max_connections_per_client=limits.max_connections_per_client,
            timeouts=Timeouts(limits.idle_timeout, limits.write_timeout, limits.handshake_timeout),
            limits=limits,
            shutdown=shutdown,
            drain=DrainSettings(**shutdown.model_dump()),
            admission=AdmissionPolicy(trusted, tls),
            mode=table.mode,
            fault=None if fault is None else FaultProfile(table.fault, fault),
        )


class Server:
    """Echo to everyone who connects to some listening sockets.

    In a program of your own, `Server.listen` makes one, and `async with` runs it:

        async with echod.Server.listen("127.0.0.1:0", mode="line") as server:
            print(*server.addresses)
            ...
            receipt = await server.shutdown()

    Without `async with`, `start` it in a running loop, of asyncio or uvloop, and end it with `shutdown`, after which
    every socket is closed and every client's task awaited; `abort` makes that end at once. It belongs to that loop: a
    loop may have several servers, and each thread a loop, but all calls are made in the server's own, save for the
    reading of `addresses` and `clients`.

    The constructor is for who has listening sockets already; from then on they are the server's.

    Args:
        sockets: usually one, or one for each address family.
        settings: the limits and timeouts.
        ledger: where the clients' ends are entered.

    """

    def __init__(self, sockets: Sequence[ListeningSocket], settings: ServerSettings, ledger: Ledger) -> None:
        self.settings = settings
        self.ledger = ledger
        self._sockets = list(sockets)
        self._clients: dict[asyncio.Task[None], Client] = {}
        self._quota = Quota(settings.max_connections_per_client)
        self._room = asyncio.Event()
        self._aborted = asyncio.Event()
        self._pause = _FIRST_PAUSE
        self._paused_since: float | None = None
        self._causes = set[str]()
        # Accepted, and not yet watched by the loop: the kernel had no memory for that.
        self._unwatched: tuple[socket.socket, Any] | None = None
        self._started_stop: tuple[float, int, Counters] | None = None
        self._drain: Drain | None = None
        self._listener: asyncio.Task[None] | None = None
        self._end: asyncio.Task[Receipt] | None = None
        named = (addresses.from_sockaddr(listening.sock.getsockname()) for listening in sockets)
        self.addresses: list[TcpAddress | UnixAddress] = [address for address in named if address is not None]
        """Where it listens, or has listened, one for each socket: with the port it got where 0 was asked for."""

    @classmethod
    def listen(
        cls,
        address: str = "127.0.0.1:0",
        *,
        logger: FilteringBoundLogger | None = None,
        observe: Callable[[Entry], None] | None = None,
        **options: Unpack[Options],
    ) -> Self:
        """Open an address, and return a server for it, to be started.

        The clients wait in the backlog until then. Names are resolved, and files of TLS read, by blocking calls. Unix
        sockets should be opened before other threads make files: for the moment of bind(2) the process has another
        umask, so that the socket's file never has permissions that it should not have.

        Args:
            address: HOST:PORT, [V6]:PORT, :PORT, unix:PATH or unix:@NAME; port 0 takes a free one.
            logger: of structlog; gets the lines that the daemon would write, `client_closed` for each connection that
                sent a byte among them. None: nothing is logged.
            observe: called in the loop with the entry of every connection that has been closed.
            options: those of `echod.library.Options`; every key and its default is in docs/configuration.md.

        Raises:
            SettingsError: options are wrong; it names all of them.
            ListenError: the address cannot be opened.

        """
        found = embed.acquire(address, options)
        settings = found.loaded.settings
        table, tls = settings.listeners[embed.NAME], found.tls.get(embed.NAME)
        end = TlsEnd(tls.context, TlsBuffers()) if tls is not None else None
        specs = ListenerSpec(address, table.parsed_address, table.permissions)
        (listener,) = open_listeners([specs], settings.limits.backlog)
        log = _SILENCE if logger is None else logger.bind(listener=address)
        for _, warning in found.warnings(datetime.now(UTC)):
            log.warning(warning.event, **warning.fields)
        ledger = Ledger(log, "nonempty", () if observe is None else (observe,))
        return cls(
            listener.sockets, ServerSettings.derive(settings, table, end, settings.limits.max_connections), ledger
        )

    async def __aenter__(self) -> Self:
        """Begin to accept."""
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop gracefully, also for an exception; at once, where the task is cancelled while that goes on."""
        try:
            await self.shutdown()
        except asyncio.CancelledError:
            self.abort()
            await self.shutdown()
            raise

    def set_backlog(self, backlog: int) -> None:
        """Set the backlog of the listening sockets, except inherited ones.

        Raises:
            OSError: the kernel refused; earlier sockets have the new one already.

        """
        for listening in self._sockets:
            if not listening.inherited:
                listening.sock.listen(backlog)

    def reconfigure(self, settings: ServerSettings) -> None:
        """Take other settings from now on.

        Clients that are connected keep what they have begun with, a fault and a mode of their own above all, but for
        limits and timeouts. Nobody is dropped for a limit that has become lower.

        """
        self.settings = settings
        self._quota.limit = settings.max_connections_per_client
        for client in self._clients.values():
            client.session.attempt(client.session.reconfigure, settings.limits, settings.shutdown)
        self._room.set()

    @property
    def clients(self) -> int:
        """The number of connected clients."""
        return len(self._clients)

    @property
    def received(self) -> int:
        """The number of bytes received so far, from clients that have left and from those that are connected."""
        return self.ledger.counters.received + sum(client.session.received for client in self._clients.values())

    @property
    def connected(self) -> Collection[Client]:
        """The connected clients: a live view."""
        return self._clients.values()

    @property
    def accept_paused(self) -> bool:
        """Whether somebody has to wait in the backlog."""
        return self._paused_since is not None

    def start(self) -> None:
        """Begin to accept, in the running loop.

        Raises:
            RuntimeError: it did so before.

        """
        if self._listener is not None:
            msg = "a server is started once"
            raise RuntimeError(msg)
        self._loop = asyncio.get_running_loop()
        self._clock = Clock(self._loop.time)
        self._listener = self._loop.create_task(self._listen())
        self._sweeper = self._loop.create_task(self._sweep())

    def begin_stop(self) -> int:
        """Begin the time that the receipt is about, and return the number of clients. Idempotent.

        `shutdown` does so itself. A caller that reports the clients first calls this, so that report and receipt are
        of one moment.
        """
        if self._started_stop is None:
            now = asyncio.get_running_loop().time()
            self._started_stop = now, self.clients, self.ledger.counters.snapshot()
        return self._started_stop[1]

    async def shutdown(self) -> Receipt:
        """Stop gracefully and tell what became of the clients.

        Goes on accepting for `delay` seconds; takes in everyone who has completed the handshake, and closes the
        sockets in the same step; lets the clients finish, under the drain's timeouts; awaits every client's task.
        Not waited for is what the kernel goes on sending after the last close, nor who is in the middle of a
        handshake: a `delay` is for them.

        The stop goes on where the caller is cancelled. To call it again is to wait for the same end.
        """
        if self._listener is None:
            self.start()  # whoever has been waiting since the sockets were opened is served too
        if self._end is None:
            self.begin_stop()
            self._end = asyncio.get_running_loop().create_task(self._shut_down())
        return await asyncio.shield(self._end)

    async def _shut_down(self) -> Receipt:
        settings = self.settings.drain
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.delay):
                await self._aborted.wait()
        assert self._listener is not None
        await _cancel(self._listener)
        for listening in self._sockets:
            listening.withdraw()
        self._drain = Drain(self._clients.values(), self._accept_rest, settings)
        if self._aborted.is_set():
            self._drain.hurry()
        if not await self._drain.run():
            if waiting := self._waiting():
                self.ledger.log.warning("backlog_abandoned", clients=waiting)
            self._close_sockets()
        if self._clients:
            await asyncio.wait(self._clients, timeout=LAST_STEPS)
        for task in self._clients:
            task.cancel()
        if self._clients:
            await asyncio.wait(self._clients)
        await _cancel(self._sweeper)
        assert self._started_stop is not None
        started, present, before = self._started_stop
        return Receipt.between(before, self.ledger.counters, present, self._loop.time() - started)

    def abort(self) -> None:
        """Make a `shutdown` that is under way, or to come, end at once, resetting every client. Idempotent."""
        self._aborted.set()
        if self._drain is not None:
            self._drain.hurry()

    # Accepting

    async def _listen(self) -> None:
        """Be the listener task: have connections accepted while there is room, wait while there is none.

        Accepting itself is a plain callback. A coroutine on `sock_accept` that is cancelled in the iteration in which
        its accept has succeeded loses that connection, on every loop.
        """
        while True:
            # Its result: the seconds after which to try again, or None where only a client's leaving helps.
            self._obstacle: asyncio.Future[float | None] = self._loop.create_future()
            try:
                for listening in self._sockets:
                    self._loop.add_reader(listening.sock, self._accept, listening)
                    if self._paused_since is not None:
                        self._accept(listening)  # once the backlog is empty, there is no event
            except OSError as error:  # of epoll_ctl(2)
                self._hold_after(error)
            try:
                timeout = await self._obstacle
            finally:
                for listening in self._sockets:
                    self._loop.remove_reader(listening.sock)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._room.wait()

    def _accept(self, listening: ListeningSocket) -> None:
        gone: OSError | None = None
        admitted = False
        for number in range(_BATCH):
            if self.clients >= self.settings.max_connections:
                # Whether another client waits is certain only at the first of a wake-up; otherwise the next one shows it.
                if number:
                    self._unhold()
                else:
                    self._hold("max_connections", None)
                return
            try:
                connection, peer = self._take(listening)
            except BlockingIOError:
                self._unhold()
                return
            except OSError as error:
                if self._concerns_one_connection(error):
                    gone = error
                    continue
                if number and self._unwatched is None:
                    self._unhold()
                else:
                    self._hold_after(error)
                return
            admitted = True
            self._pause = _FIRST_PAUSE
            self._admit(connection, peer)
        # A system call filter's EPERM, or one of a security module, leaves each connection in the queue.
        if gone is not None and not admitted:
            self._hold_after(gone)

    def _take(self, listening: ListeningSocket) -> tuple[socket.socket, Any]:
        """Return an accepted connection that the loop watches. One that it cannot watch yet is kept for the next call.

        Raises:
            OSError: of accept(2) or epoll_ctl(2).

        """
        if self._unwatched is None:
            self._unwatched = listening.accept()
        watch(self._loop, self._unwatched[0])
        taken, self._unwatched = self._unwatched, None
        return taken

    def _concerns_one_connection(self, error: OSError) -> bool:
        return error.errno in _GONE and self._unwatched is None

    def _hold_after(self, error: OSError) -> None:
        """Stop accepting for a while, twice as long after each failure."""
        self._hold(errno.errorcode.get(error.errno or 0, str(error)), self._pause)
        self._pause = min(2 * self._pause, _LAST_PAUSE)

    def _hold(self, cause: str, seconds: float | None) -> None:
        """Stop accepting until a client leaves, or for some seconds. Who comes meanwhile waits in the backlog."""
        if self._obstacle.done():
            return
        if self._paused_since is None:
            self._paused_since = self._loop.time()
            self._causes.clear()
        if cause not in self._causes:
            self._causes.add(cause)
            self.ledger.counters.accept_pauses += 1
            self.ledger.log.warning("accept_paused", cause=cause, clients=self.clients)
        # Here and not where it is waited for: a client may leave in between.
        self._room.clear()
        self._obstacle.set_result(seconds)

    def _unhold(self) -> None:
        """Note that nobody waits any more. Not earlier: one in for one out is still a pause to those outside."""
        if self._paused_since is not None and not self._waiting():
            seconds = round(self._loop.time() - self._paused_since, 3)
            self._paused_since = None
            self._pause = _FIRST_PAUSE
            self.ledger.log.info("accept_resumed", seconds=seconds, clients=self.clients)

    def _accept_rest(self) -> bool:
        """Empty the backlog and close the sockets; return whether descriptors sufficed.

        Both are one step without an await, as closing resets whoever is in the backlog. The cap does not hold here:
        these clients have been let in by the kernel already. An inherited socket is only let go of: who holds it too
        keeps its backlog for the next process.
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
                # Bounded, as a system call filter's EPERM concerns every connection, and leaves it in the queue.
                if gone < _BATCH and self._concerns_one_connection(error):
                    gone += 1
                    continue
                # Without descriptors accept(2) fails before it looks at the queue, which may be empty.
                if self._unwatched is not None or kernel.waiting_connections(listening.sock):
                    return False
            self._sockets.pop().close()
        return True

    def _waiting(self) -> int:
        """Return how many connections wait to become clients, as far as the kernel tells."""
        backlog = sum(kernel.waiting_connections(listening.sock) for listening in self._sockets)
        return backlog + (self._unwatched is not None)

    def _close_sockets(self) -> None:
        for listening in self._sockets:
            listening.close()
        if self._unwatched is not None:
            self._unwatched[0].close()

    # Clients

    def _admit(self, sock: socket.socket, sockaddr: Any) -> None:
        try:
            sock.setblocking(False)  # noqa: FBT003  (its only parameter)
            client = Client(sock, sockaddr, self._loop.time(), self._clock.time(), self._new_session)
            task = _begin(self._loop, client.run(self.settings.admission, self._quota))
        except Exception as error:  # noqa: BLE001  (it is logged, and concerns this connection only)
            unwatch(self._loop, sock)
            sock.close()
            self.ledger.turn_away(sockaddr, error)
            return
        self.ledger.counters.accepted += 1
        self._clients[task] = client
        task.add_done_callback(self._depart)

    def _new_session(self, client: Client, sock: socket.socket) -> EchoSession:
        settings = self.settings
        ended: asyncio.Future[None] = self._loop.create_future()
        if settings.mode == "info":
            return InfoSession(sock, settings.limits, settings.shutdown, ended, client.describe)
        if settings.fault is not None:
            number = self.ledger.counters.accepted + 1
            return FaultSession(sock, settings.limits, settings.shutdown, ended, settings.fault, settings.mode, number)
        if settings.mode == "line":
            return LineSession(sock, settings.limits, settings.shutdown, ended)
        return EchoSession(sock, settings.limits, settings.shutdown, ended)

    def _depart(self, task: asyncio.Task[None]) -> None:
        """Strike a client off the registry. Every task's exception comes by here, so none can hide another."""
        client = self._clients.pop(task)
        try:
            if not task.cancelled():  # by the end of the loop, before the client was joined to its session
                self.ledger.close(client, self._loop.time(), task.exception())
        finally:  # an observer may fail
            self._room.set()
            if self._drain is not None:
                self._drain.client_left()

    async def _sweep(self) -> None:
        """Close who is idle and reset who is stalled: one timer for all, instead of work at each message."""
        while True:
            pause = min(_LONGEST_SWEEP, *(timeout / 4 for timeout in self.settings.timeouts if timeout))
            pause = max(_SHORTEST_SWEEP, pause)
            self._clock.announce(pause)
            await asyncio.sleep(pause)
            timeouts = self.settings.timeouts
            now = self._clock.time()
            clients: Collection[Client] = self._clients.values()
            if not timeouts.idle:
                # Of the others none can be late, and with ten thousand of them a look at each is a cost.
                clients = [one for one in clients if one.session.paused or one.session.phase < Phase.OPEN]
            for client in clients:
                client.session.attempt(_close_if_overdue, client, now, timeouts)


def _close_if_overdue(client: Client, now: float, timeouts: Timeouts) -> None:
    reason = client.overdue(now, timeouts)
    if reason == "stalled":
        client.session.abort(reason)
    elif reason is not None:
        client.session.close(reason)


if sys.version_info >= (3, 12):

    def _begin(loop: asyncio.AbstractEventLoop, life: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Return a task that has taken its first step already, which saves the loop a turn for each client."""
        return asyncio.Task(life, loop=loop, eager_start=True)

else:  # pragma: no cover  (coverage is measured on the newest version)

    def _begin(loop: asyncio.AbstractEventLoop, life: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return loop.create_task(life)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
