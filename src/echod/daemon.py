"""One process: settings, log, loop, servers and signals, put together and taken apart."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import signal
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import echod
from echod import addresses, kernel
from echod.drain import DrainSettings
from echod.faults import Fault
from echod.ledger import Ledger, Receipt
from echod.listeners import open_listeners
from echod.logs import STDERR
from echod.server import Server, ServerSettings
from echod.session import EchoSession, SessionSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from echod.listeners import Listener
    from echod.settings import ListenerSettings, Settings
    from echod.signals import StopSignals
    from echod.sources import Loaded

# Descriptors that are no client's: the log, the loop's own, and some to spare.
_RESERVED_DESCRIPTORS = 16


def serve(loaded: Loaded, log: FilteringBoundLogger, signals: StopSignals) -> int:
    """Be the daemon, until a signal.

    Returns:
        The exit code: 0, or 128 + N after a second signal N.

    Raises:
        ListenError: some address cannot be opened; then none is.

    """
    settings = loaded.settings
    for variable in loaded.unknown_variables:
        log.warning("unknown_variable", variable=variable)
    descriptors = kernel.raise_descriptor_limit()
    wanted = [(name, addresses.parse(table.address)) for name, table in settings.all_listeners().items()]
    listeners = open_listeners(wanted, settings.limits.backlog)
    with asyncio.Runner(loop_factory=loop_factory(settings.loop)) as runner:
        return runner.run(_Daemon(settings, log, descriptors).run(listeners, signals))


def has_uvloop() -> bool:
    """Tell whether uvloop is installed."""
    return importlib.util.find_spec("uvloop") is not None


def loop_factory(choice: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes the loop of a choice: uvloop, asyncio, or auto.

    Raises:
        ImportError: uvloop was chosen and is not installed.

    """
    if choice == "asyncio" or (choice == "auto" and not has_uvloop()):
        return asyncio.SelectorEventLoop
    import uvloop  # noqa: PLC0415  (an optional dependency)

    return uvloop.new_event_loop


class _Daemon:
    """What runs inside the loop."""

    def __init__(self, settings: Settings, log: FilteringBoundLogger, descriptors: int) -> None:
        self._settings = settings
        self._log = log
        self._descriptors = descriptors
        self._servers: list[Server] = []
        self._stop = asyncio.Event()
        self._signals: list[int] = []

    async def run(self, listeners: list[Listener], signals: StopSignals) -> int:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_exception)
        signals.attach(loop, self._on_signal)
        max_connections = self._cap(len(listeners))
        tables = self._settings.all_listeners()
        for listener in listeners:
            server_settings = self._server_settings(tables[listener.name], max_connections)
            ledger = Ledger(self._log.bind(listener=listener.name), self._settings.log.connections)
            self._servers.append(Server(listener.sockets, server_settings, ledger))
        self._log.info(
            "started",
            version=echod.__version__,
            pid=os.getpid(),
            loop=type(loop).__module__.partition(".")[0],
            python=platform.python_version(),
        )
        for listener, server in zip(listeners, self._servers, strict=True):
            server.start()
            for sock in listener.sockets:
                address = addresses.from_sockaddr(sock.getsockname())
                self._log.info("listening", listener=listener.name, address=address)
        await self._stop.wait()
        clients = sum(server.clients for server in self._servers)
        self._log.info("draining", signal=signal.Signals(self._signals[0]).name, clients=clients)
        receipts = await asyncio.gather(*(server.shutdown() for server in self._servers))
        self._log.info("drained", **asdict(Receipt.total(receipts)))
        self._log.info("stopped", **self._totals())
        signals.detach(loop)
        return 128 + self._signals[1] if len(self._signals) > 1 else 0

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        self._stop.set()
        if len(self._signals) == 2:
            for server in self._servers:
                server.abort()

    def _on_loop_exception(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        session, error = context.get("protocol"), context.get("exception")
        if isinstance(session, EchoSession) and isinstance(error, Exception):
            session.fail(error)  # it comes out of the client's task, and is logged there
        else:
            self._log.error("loop_error", message=context["message"], exc_info=error)

    def _cap(self, listeners: int) -> int:
        """Return the most clients a listener may have, which the descriptors bound too."""
        wanted = self._settings.limits.max_connections
        # The lowest free descriptor tells, but for a hole or two, how many are in use.
        lowest_free = os.dup(STDERR)
        os.close(lowest_free)
        room = max(1, self._descriptors - lowest_free - _RESERVED_DESCRIPTORS)
        if wanted * listeners > room:
            self._log.warning(
                "descriptor_limit",
                limit=self._descriptors,
                max_connections=wanted,
                listeners=listeners,
                room_for_clients=room,
            )
        return min(wanted, room)

    def _server_settings(self, table: ListenerSettings, max_connections: int) -> ServerSettings:
        limits, shutdown = self._settings.limits, self._settings.shutdown
        fault = self._settings.faults.get(table.fault)
        return ServerSettings(
            max_connections=max_connections,
            idle_timeout=limits.idle_timeout,
            write_timeout=limits.write_timeout,
            session=SessionSettings(limits.write_buffer, shutdown.linger_timeout),
            drain=DrainSettings(**shutdown.model_dump()),
            fault=None if fault is None else Fault(table.fault, fault.trigger.encode()),
        )

    def _totals(self) -> dict[str, int]:
        """Return what was done since the start, for the last line of the log."""
        accounts = [server.ledger.account for server in self._servers]
        return {
            "connections": sum(account.accepted for account in accounts),
            "empty": sum(account.empty for account in accounts),
            "accept_pauses": sum(account.accept_pauses for account in accounts),
            "received": sum(account.received for account in accounts),
            "sent": sum(account.sent for account in accounts),
            "acked": sum(account.acked for account in accounts),
            "discarded_bytes": sum(account.discarded for account in accounts),
        }
