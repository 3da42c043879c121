"""Run an admin listener and an echo server in a thread, with the bounds and the daemon state that a test chooses."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, Self

import structlog
import uvloop

from echod.admin.http import Admin
from echod.admin.limits import DEFAULT_LIMITS, AdminLimits
from echod.admin.snapshot import DaemonView, Snapshot
from echod.net.addresses import TcpAddress
from echod.net.listeners import ListenerSpec, open_listeners
from echod.server.ledger import Ledger
from echod.server.server import Server
from harness import PATIENCE, receive
from serving import server_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, MutableMapping

    from structlog.typing import FilteringBoundLogger

    from echod.net.listeners import Listener
    from echod.server.ledger import Entry

    # Makes the loop from its class and the admin listener's sockets. The class is Any, so that it can be a base class.
    MakeLoop = Callable[[Any, Listener], asyncio.AbstractEventLoop]

LOOPS = {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.Loop}


class StartAdmin(Protocol):
    """The fixture `start_admin`."""

    def __call__(self, limits: AdminLimits = ..., make_loop: MakeLoop = ..., **view: Any) -> AdminThread: ...


class AdminThread:
    """An admin listener on a free port, with an echo server in the same loop.

    Args:
        loop_name: "asyncio" or "uvloop".
        limits: bounds of the admin listener.
        make_loop: makes the loop.
        view: fields of the `DaemonView` that differ from those of an idle daemon.

    """

    def __init__(
        self,
        loop_name: str,
        limits: AdminLimits = DEFAULT_LIMITS,
        make_loop: MakeLoop = lambda base, _: base(),
        **view: Any,
    ) -> None:
        self.events: list[MutableMapping[str, Any]] = []
        self.errors: list[dict[str, Any]] = []
        """Calls of the loop's exception handler."""
        self._view = view
        self._logger: FilteringBoundLogger = structlog.wrap_logger(None, [self._log]).bind()
        self._started: Future[None] = Future()
        self._news = threading.Condition()
        address = TcpAddress("127.0.0.1", 0)
        (listener,) = open_listeners([ListenerSpec("admin", address)], 1)
        self.address: tuple[str, int] = listener.sockets[0].sock.getsockname()
        self._admin = Admin(listener, address, limits)
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(lambda: make_loop(LOOPS[loop_name], listener),), daemon=True
        )
        self._thread.start()
        self._started.result(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def echo(self, message: bytes) -> None:
        """Connect to the echo server, and receive the echo of a message."""
        with socket.create_connection(self._echo, PATIENCE) as client:
            client.sendall(message)
            assert receive(client, len(message)) == message

    def wait_for(self, event: str) -> MutableMapping[str, Any]:
        """Wait for an event in the log, and return it."""

        def found() -> list[MutableMapping[str, Any]]:
            return [entry for entry in self.events if entry["event"] == event]

        with self._news:
            assert self._news.wait_for(found, PATIENCE), f"no {event} in the log"
        return found()[0]

    def wait_failed(self) -> BaseException:
        """Wait until the listener task of the admin listener fails, and return its exception."""
        return asyncio.run_coroutine_threadsafe(self._admin.wait_failed(), self._loop).result(PATIENCE)

    def stop(self) -> None:
        """Stop the admin listener and the server. Raise the exception of the thread, if there is one. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(PATIENCE)
            self._ended.result(0)

    def _run(self, make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        try:
            with asyncio.Runner(loop_factory=make_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:  # noqa: BLE001  (raised in the test's thread)
            (self._ended if self._started.done() else self._started).set_exception(error)
        else:
            self._ended.set_result(None)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(lambda _, context: self.errors.append(context))
        async with running_server(self._logger, self._admin.observer("echo")) as server:
            (echo,) = server.addresses
            assert isinstance(echo, TcpAddress)
            self._echo = echo.host, echo.port
            resources: Any = SimpleNamespace(tls={})
            view = DaemonView(
                servers={"echo": server},
                udp_servers={},
                addresses={"echo": [str(echo)]},
                resources=lambda: resources,
                draining=bool,
                restart_needed=list,
                reloads={"success": 0, "failure": 0},
                log_lines_dropped=int,
            )
            self._admin.start(view._replace(**self._view), Snapshot({"echo": server}), lambda: self._logger)
            self._started.set_result(None)
            await self._stop.wait()
            await self._admin.close()

    def _log(self, _: object, level: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        with self._news:
            self.events.append({**event, "level": level})
            self._news.notify_all()
        raise structlog.DropEvent


@contextlib.asynccontextmanager
async def running_server(log: FilteringBoundLogger, observe: Callable[[Entry], None]) -> AsyncIterator[Server]:
    """Run an echo server on a free port. It stops quickly."""
    (listener,) = open_listeners([ListenerSpec("echo", TcpAddress("127.0.0.1", 0))], 1000)
    settings = server_settings(shutdown={"quiet_period": 0.1, "drain_timeout": 0.2, "linger_timeout": 0.1})
    server = Server(listener.sockets, settings, Ledger(log, "none", (observe,)))
    server.start()
    try:
        yield server
    finally:
        await server.shutdown()
