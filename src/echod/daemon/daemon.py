"""Run one daemon process: settings, log, loop, servers and signals, from the start to the end of the stop."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

import echod
from echod.connection.tls import TlsBuffers
from echod.daemon import logs, loop_errors
from echod.daemon.drain_status import DrainStatus
from echod.daemon.figures import totals
from echod.daemon.plan import ADMIN, ADMIN_CLOSE, Plan
from echod.daemon.reload import Reloader, take_fallible_steps
from echod.daemon.startup import socket_addresses, start_up
from echod.daemon.systemd import Notifier
from echod.datagram.guards import OwnAddresses
from echod.datagram.ledger import FlowLedger
from echod.datagram.receipt import FlowReceipt
from echod.datagram.server import UdpServer, is_local
from echod.loops import run
from echod.server.ledger import Ledger
from echod.server.receipt import Receipt
from echod.server.server import Server
from echod.settings.model import changes
from echod.text import count

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from structlog.typing import FilteringBoundLogger

    from echod.admin.http import Admin
    from echod.admin.snapshot import DaemonView
    from echod.daemon.logs import Log
    from echod.daemon.signals import Signals
    from echod.daemon.systemd import Manager
    from echod.net.addresses import InheritedAddress
    from echod.net.listeners import Listener
    from echod.settings.resources import Resources

# Added to the number of a signal that forces the stop.
_SIGNALLED = 128

# Descriptors that are kept for the log, the loop and reloads.
_RESERVED_DESCRIPTORS = 16


def serve(resources: Resources, log: Log, signals: Signals, load: Callable[[Resources], Resources]) -> int:
    """Run the daemon until a signal stops it.

    Args:
        resources: the settings and the loaded certificates.
        log: of the process.
        signals: those that have arrived already, and all further ones.
        load: reads the settings again for a reload, given those in force. It may be slow.

    Returns:
        The exit code: 0, 1 after a failure, or 128 + N if signal N forced the stop.

    Raises:
        ListenError: an address cannot be opened; none is open then.
        SettingsError: the settings do not fit the inherited sockets; no address is open then.

    """
    startup = start_up(resources, log, signals)
    listeners, settings = startup.listeners, startup.plan.settings
    admin = None
    if settings.admin.address and listeners:
        from echod.admin.http import Admin  # noqa: PLC0415  (an extra)

        admin = Admin(listeners.pop(), startup.plan.specs()[-1].address)
    return run(
        settings.loop,
        lambda: Daemon(startup.plan, startup.inherited_names, log, load, startup.descriptors, admin).run(
            listeners, signals, startup.manager
        ),
    )


class _Runnable(Protocol):
    """The verbs that a server of streams and one of datagrams share."""

    def start(self) -> None: ...
    async def shutdown(self) -> Receipt | FlowReceipt: ...
    def abort(self) -> None: ...
    async def wait_failed(self) -> BaseException: ...


class Daemon:
    """Run the servers in the loop.

    Args:
        plan: derived from the settings.
        inherited: the addresses of the inherited sockets.
        log: of the process.
        load: reads the settings again, given those in force.
        descriptors: the limit of descriptors.
        admin: the admin listener, or None.

    """

    def __init__(
        self,
        plan: Plan,
        inherited: Collection[InheritedAddress],
        log: Log,
        load: Callable[[Resources], Resources],
        descriptors: int,
        admin: Admin | None,
    ) -> None:
        self._initial = self._plan = plan
        self._inherited = inherited
        self._log = log
        self._load = load
        self._descriptors = descriptors
        own = _lowest_free_descriptor() + _RESERVED_DESCRIPTORS + (0 if admin is None else admin.max_connections)
        self._room = max(1, descriptors - own)
        self._admin = admin
        self._buffers = TlsBuffers()
        self._servers: dict[str, Server] = {}
        self._udp_servers: dict[str, UdpServer] = {}
        self._stop = asyncio.Event()
        self._stop_signal: str | None = None
        self._exit_code = 0

    async def run(self, listeners: list[Listener], signals: Signals, manager: Manager | None) -> int:
        """Serve until the stop, and return the exit code."""
        loop = asyncio.get_running_loop()
        self._notifier = Notifier(manager, self._numbers, lambda: self._logger)
        self._reloader = Reloader(
            lambda: self._load(self._plan.resources), self._apply, self._stop.is_set, self._notifier, self._log
        )
        loop.set_exception_handler(self._on_loop_exception)
        signals.attach(loop, self._on_signal, self._on_hangup)
        self._warn()
        self._create_servers(listeners)
        self._logger.info(
            "started",
            version=echod.__version__,
            pid=os.getpid(),
            loop=type(loop).__module__.partition(".")[0],
            python=sys.version.partition(" ")[0],  # the import of platform takes a millisecond
        )
        addresses_in_use = {listener.name: socket_addresses(listener) for listener in listeners}
        if self._admin is not None:
            from echod.admin.snapshot import Snapshot  # noqa: PLC0415  (used by the admin listener only)

            self._admin.start(self._view(addresses_in_use), Snapshot(self._servers), lambda: self._logger)
        watchers: list[asyncio.Task[None]] = []
        for listener in listeners:
            server = self._runnables()[listener.name]
            server.start()
            watchers.append(loop.create_task(self._watch(listener.name, server)))
            for address in addresses_in_use[listener.name]:
                self._logger.info("listening", listener=listener.name, address=address)
        if self._admin is not None:
            watchers.append(loop.create_task(self._watch(ADMIN, self._admin)))
            for address in socket_addresses(self._admin.listener):
                self._logger.info("listening", listener=ADMIN, address=address)
        self._notifier.ready()
        # The objects of the start stay. Without the freeze, each full collection would stop the loop for 20 ms.
        gc.freeze()
        gc.enable()
        await self._stop.wait()
        await self._shut_down()
        for watcher in watchers:
            watcher.cancel()
        signals.detach(loop)
        return self._exit_code

    def _create_servers(self, listeners: Sequence[Listener]) -> None:
        settings = self._plan.settings.log
        is_udp = {name: listener.is_datagram for name, listener in self._plan.listeners.items()}
        udp_sockets = [one.sock for listener in listeners if is_udp[listener.name] for one in listener.sockets]
        own = OwnAddresses([sock.getsockname()[:2] for sock in udp_sockets], is_local)
        max_connections = self._max_connections(sum(not is_udp[listener.name] for listener in listeners))
        for listener in listeners:
            name = listener.name
            logger = self._logger.bind(listener=name)
            if is_udp[name]:
                flow_ledger = FlowLedger(logger, settings.connections)
                sections = self._plan.datagram_settings(name)
                self._udp_servers[name] = UdpServer(listener.sockets, sections, flow_ledger, own)
            else:
                observers = () if self._admin is None else (self._admin.observer(name),)
                ledger = Ledger(
                    logger,
                    settings.connections,
                    observers,
                    states=settings.level == "debug",
                    write=self._log.line("client_closed", listener=name),
                )
                server_settings = self._plan.server_settings(name, max_connections, self._buffers)
                self._servers[name] = Server(listener.sockets, server_settings, ledger)

    def _runnables(self) -> dict[str, _Runnable]:
        """Return all servers by the names of their listeners."""
        return {**self._servers, **self._udp_servers}

    async def _shut_down(self) -> None:
        """Stop all listeners side by side, and log the receipt and the totals."""
        self._notifier.stopping()
        clients = sum(server.begin_stop() for server in self._servers.values())
        flows = sum(server.begin_stop() for server in self._udp_servers.values())
        servers = self._runnables()
        shutdown = self._plan.settings.shutdown
        seconds = shutdown.delay + shutdown.drain_timeout + shutdown.linger_timeout
        status = DrainStatus(self._log, self._count_clients, self._stop_signal)
        status.show(seconds)
        self._logger.info(
            "draining",
            signal=self._stop_signal,
            clients=clients,
            **({"flows": flows} if self._udp_servers else {}),
            max_seconds=0.0 if self._exit_code > _SIGNALLED else seconds,
        )
        outcomes = await asyncio.gather(*(server.shutdown() for server in servers.values()), return_exceptions=True)
        status.clear()
        receipt = asdict(Receipt.total(outcome for outcome in outcomes if isinstance(outcome, Receipt)))
        if self._udp_servers:
            of_flows = asdict(FlowReceipt.total(outcome for outcome in outcomes if isinstance(outcome, FlowReceipt)))
            receipt |= of_flows | {"seconds": max(receipt["seconds"], of_flows["seconds"])}
        self._logger.info("drained", **receipt)
        self._notifier.drained(receipt)
        failures = dict(zip(servers, outcomes, strict=True))
        if self._admin is not None:
            try:
                async with asyncio.timeout(ADMIN_CLOSE):
                    await self._admin.close()
            except Exception as error:  # noqa: BLE001  (it is logged)
                failures[ADMIN] = error
        for name, outcome in failures.items():
            if isinstance(outcome, BaseException):
                self._logger.error("stop_failed", listener=name, exc_info=outcome)
                self._exit_code = self._exit_code or 1
        counters = [server.ledger.counters for server in self._servers.values()]
        self._logger.info("stopped", **totals(counters, list(self._udp_servers.values())))

    @property
    def _logger(self) -> FilteringBoundLogger:
        return self._log.logger

    # Signals and failures

    def _on_signal(self, number: int) -> None:
        # A terminal that is closed during a drain does not force the stop.
        if number == signal.SIGQUIT or (self._stop_signal is not None and number != signal.SIGHUP):
            self._force_stop(number)
        self._stop_signal = self._stop_signal or signal.Signals(number).name
        self._stop.set()

    def _force_stop(self, number: int) -> None:
        """Reset every client. The first signal that forces the stop decides the exit code."""
        self._exit_code = self._exit_code or _SIGNALLED + number
        for server in self._runnables().values():
            server.abort()

    async def _watch(self, name: str, watched: _Runnable | Admin) -> None:
        """Stop the daemon if a task of a server or of the admin listener fails. Log that during a stop too."""
        error = await watched.wait_failed()
        self._logger.error("crashed", listener=name, exc_info=error)
        self._exit_code = self._exit_code or 1
        self._stop.set()

    def _on_loop_exception(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop_errors.report(context, self._logger)

    # Reloading

    def _on_hangup(self) -> None:
        logs.reopen(self._log)
        self._reloader.request()

    def _apply(self, resources: Resources) -> None:
        """Put other settings in force as a whole.

        Raises:
            SettingsError: as Plan.derive and take_fallible_steps; nothing has changed.
            ThreadError: as take_fallible_steps; nothing has changed.

        """
        before, plan = self._plan, Plan.derive(resources, self._inherited)
        take_fallible_steps(before, plan, self._servers, self._log)
        self._plan = plan
        max_connections = self._max_connections(len(self._servers))
        settings = plan.settings.log
        for name, server in self._servers.items():
            logger = self._logger.bind(listener=name)
            server.ledger.reconfigure(
                logger,
                settings.connections,
                states=settings.level == "debug",
                write=self._log.line("client_closed", listener=name),
            )
            # A listener that was removed from the settings keeps its own until a restart.
            if name in plan.listeners:
                server.reconfigure(plan.server_settings(name, max_connections, self._buffers))
        for name, udp_server in self._udp_servers.items():
            udp_server.ledger.reconfigure(self._logger.bind(listener=name), settings.connections)
            if name in plan.listeners:
                udp_server.reconfigure(plan.datagram_settings(name))
        changed = [".".join(key) for key in changes(before.settings, plan.settings)]
        self._logger.info("reloaded", changed=changed)
        self._warn()
        if waiting := self._restart_needed():
            self._logger.warning("restart_needed", settings=waiting)

    def _restart_needed(self) -> list[str]:
        return self._plan.restart_needed(self._initial)

    def _warn(self) -> None:
        for listener, warning in self._plan.resources.warnings(datetime.now(UTC)):
            self._logger.warning(warning.event, listener=listener, **warning.fields)
        for name in self._plan.open_reflectors():
            self._logger.warning("udp_open_reflector", listener=name, address=self._plan.listeners[name].address)

    def _max_connections(self, listeners: int) -> int:
        """Return the maximum number of clients per listener, which the limit of descriptors may lower."""
        wanted = self._plan.settings.limits.max_connections
        if wanted * listeners > self._room:
            self._logger.warning(
                "descriptor_limit",
                limit=self._descriptors,
                max_connections=wanted,
                listeners=listeners,
                room_for_clients=self._room,
            )
        return min(wanted, self._room)

    # Figures

    def _count_clients(self) -> int:
        return sum(server.clients for server in self._servers.values())

    def _numbers(self) -> str:
        servers = self._servers.values()
        clients = count(self._count_clients(), "client")
        connections = count(sum(server.ledger.counters.accepted for server in servers), "connection")
        received = count(sum(server.received for server in servers), "byte")
        if not self._udp_servers:
            return f"{clients} now, {connections} so far, {received} received"
        flows = count(sum(server.flows for server in self._udp_servers.values()), "flow")
        return f"{clients} and {flows} now, {connections} so far, {received} received"

    def _view(self, addresses_in_use: Mapping[str, Sequence[str]]) -> DaemonView:
        from echod.admin.snapshot import DaemonView  # noqa: PLC0415  (used by the admin listener only)

        return DaemonView(
            servers=self._servers,
            udp_servers=self._udp_servers,
            addresses=addresses_in_use,
            resources=lambda: self._plan.resources,
            draining=self._stop.is_set,
            restart_needed=self._restart_needed,
            reloads=self._reloader.results,
            log_lines_dropped=lambda: self._log.lost,
        )


def _lowest_free_descriptor() -> int:
    """Return the lowest free descriptor, which approximates the number of descriptors in use."""
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    return descriptor
