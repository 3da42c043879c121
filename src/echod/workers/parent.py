"""The parent: settings, sockets, signals and the service manager of a daemon with several workers. It serves no client."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import echod
from echod.connection.tls import TlsBuffers
from echod.daemon import logs, loop_errors
from echod.daemon.drain_status import DrainStatus
from echod.daemon.figures import totals
from echod.daemon.plan import ADMIN, ADMIN_CLOSE, Plan
from echod.daemon.reload import LOOKS, Reloader, take_fallible_steps
from echod.daemon.startup import socket_addresses, start_up
from echod.daemon.systemd import Notifier
from echod.loops import run
from echod.settings.model import changes
from echod.settings.problems import SettingsError
from echod.text import count
from echod.workers.sockets import ListenerSockets
from echod.workers.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from echod.admin.http import Admin
    from echod.daemon.logs import Log
    from echod.daemon.signals import Signals
    from echod.daemon.startup import Startup
    from echod.server.settings import ServerSettings
    from echod.settings.resources import Resources
    from echod.workers.spawner import Spawner

# Added to the number of a signal that forces the stop.
_SIGNALLED = 128

# Descriptors of a worker that are not clients: the log, the loop, the channel and reloads.
_RESERVED_DESCRIPTORS = 32


def serve(
    resources: Resources,
    log: Log,
    signals: Signals,
    load: Callable[[Resources], Resources],
    spawner: Spawner,
    workers: int,
) -> int:
    """Run the daemon until a signal stops it.

    Args:
        resources: the settings and the loaded certificates.
        log: of the parent.
        signals: those that have arrived already, and all further ones.
        load: reads the settings again for a reload, given those in force. It may be slow.
        spawner: forks the workers.
        workers: their number, at least 2.

    Returns:
        The exit code: 0, 1 after a failure, or 128 + N if signal N forced the stop.

    Raises:
        ListenError: an address cannot be opened; none is open then.
        SettingsError: the settings do not fit the inherited sockets; no address is open then.

    """
    startup = start_up(resources, log, signals, share_ports=True)
    settings = startup.plan.settings
    admin = None
    if settings.admin.address and startup.listeners:
        from echod.admin.http import Admin  # noqa: PLC0415  (an extra)

        admin = Admin(startup.listeners.pop(), startup.plan.specs()[-1].address)
    sockets = [
        ListenerSockets.open(
            listener, startup.plan.listeners[listener.name].parsed_address, workers, settings.limits.backlog
        )
        for listener in startup.listeners
    ]
    return run(settings.loop, lambda: Parent(startup, sockets, log, load, spawner, workers, admin).run(signals))


class Parent:
    """Supervise the workers.

    Args:
        startup: the plan and the open listeners.
        sockets: those of each listener.
        log: of this process.
        load: reads the settings again, given those in force.
        spawner: forks the workers.
        workers: their number.
        admin: the admin listener, or None.

    """

    def __init__(
        self,
        startup: Startup,
        sockets: list[ListenerSockets],
        log: Log,
        load: Callable[[Resources], Resources],
        spawner: Spawner,
        workers: int,
        admin: Admin | None,
    ) -> None:
        self._startup = startup
        self._admin = admin
        self._buffers = TlsBuffers()
        self._deadlines: tuple[float, float] | None = None
        self._plan = startup.plan
        self._sockets = sockets
        self._log = log
        self._load = load
        self._spawner = spawner
        self._workers = workers
        self._stop = asyncio.Event()
        self._aborted = asyncio.Event()
        self._stop_signal: str | None = None
        self._exit_code = 0

    async def run(self, signals: Signals) -> int:
        """Supervise until the stop, and return the exit code."""
        self._loop = loop = asyncio.get_running_loop()
        self._supervisor = Supervisor(
            self._spawner,
            self._workers,
            self._sockets,
            self._max_connections(),
            list(self._startup.inherited_names),
            self._plan,
            self._log,
            self._on_failure,
        )
        self._notifier = Notifier(self._startup.manager, self._numbers, lambda: self._logger, self._supervisor.answers)
        self._reloader = Reloader(self._load_and_prepare, self._apply, self._stop.is_set, self._notifier, self._log)
        loop.set_exception_handler(lambda _, context: loop_errors.report(context, self._logger))
        signals.attach(loop, self._on_signal, self._on_hangup)
        self._warn()
        self._logger.info(
            "started",
            version=echod.__version__,
            pid=os.getpid(),
            loop=type(loop).__module__.partition(".")[0],
            python=sys.version.partition(" ")[0],
            workers=self._workers,
        )
        self._supervisor.start()
        watcher = None if self._admin is None else loop.create_task(self._run_admin(self._admin))
        ready = loop.create_task(self._announce())
        gc.freeze()
        gc.enable()
        await self._stop.wait()
        ready.cancel()
        await self._shut_down()
        if watcher is not None:
            watcher.cancel()
        signals.detach(loop)
        return self._exit_code

    async def _announce(self) -> None:
        """Say that the daemon listens once all workers accept."""
        await self._supervisor.ready()
        for listener in self._startup.listeners:
            for address in socket_addresses(listener):
                self._logger.info("listening", listener=listener.name, address=address)
        if self._admin is not None:
            for address in socket_addresses(self._admin.listener):
                self._logger.info("listening", listener=ADMIN, address=address)
        self._notifier.ready()

    async def _run_admin(self, admin: Admin) -> None:
        """Run the admin listener. If a task of it fails, stop the daemon."""
        from echod.admin.snapshot import DaemonView  # noqa: PLC0415  (used by the admin listener only)
        from echod.workers.view import ListenerState, WorkersSource  # noqa: PLC0415  (as above)

        names = [sockets.name for sockets in self._sockets]
        source = WorkersSource(self._supervisor, names)
        view = DaemonView(
            servers={
                name: ListenerState(name, partial(self._server_settings, name), source, lambda: self._deadlines)
                for name in names
            },
            udp_servers={},
            addresses={listener.name: socket_addresses(listener) for listener in self._startup.listeners},
            resources=lambda: self._plan.resources,
            draining=self._stop.is_set,
            restart_needed=self._restart_needed,
            reloads=self._reloader.results,
            log_lines_dropped=lambda: self._log.lost + source.log_lines_dropped,
        )
        admin.start(view, source, lambda: self._logger)
        error = await admin.wait_failed()
        self._logger.error("crashed", listener=ADMIN, exc_info=error)
        self._exit_code = self._exit_code or 1
        self._stop.set()

    async def _close_admin(self, admin: Admin) -> None:
        try:
            async with asyncio.timeout(ADMIN_CLOSE):
                await admin.close()
        except Exception:
            self._logger.exception("stop_failed", listener=ADMIN)
            self._exit_code = self._exit_code or 1

    async def _shut_down(self) -> None:
        """Stop all workers, and log the receipt and the totals."""
        self._notifier.stopping()
        clients = await self._supervisor.begin_stop()
        shutdown = self._plan.settings.shutdown
        seconds = shutdown.delay + shutdown.drain_timeout + shutdown.linger_timeout
        begun = self._loop.time()
        self._deadlines = begun + shutdown.delay, begun + seconds
        status = DrainStatus(self._log, lambda: self._supervisor.clients, self._stop_signal)
        status.show(seconds)
        self._logger.info(
            "draining",
            signal=self._stop_signal,
            clients=clients,
            max_seconds=0.0 if self._exit_code > _SIGNALLED else seconds,
        )
        await asyncio.wait([self._loop.create_task(self._aborted.wait())], timeout=shutdown.delay)
        outcome = await self._supervisor.drain()
        status.clear()
        receipt = asdict(outcome.receipt) | ({"workers_lost": outcome.lost} if outcome.lost else {})
        self._logger.info("drained", **receipt)
        self._notifier.drained(receipt)
        if self._admin is not None:
            await self._close_admin(self._admin)
        if outcome.has_failed:
            self._exit_code = self._exit_code or 1
        self._logger.info("stopped", **totals(outcome.counters))

    @property
    def _logger(self) -> FilteringBoundLogger:
        return self._log.logger

    # Signals and failures

    def _on_signal(self, number: int) -> None:
        # A terminal that is closed during a drain does not force the stop.
        if number == signal.SIGQUIT or (self._stop_signal is not None and number != signal.SIGHUP):
            # The first signal that forces the stop decides the exit code.
            self._exit_code = self._exit_code or _SIGNALLED + number
            self._supervisor.abort()
            self._aborted.set()
        self._stop_signal = self._stop_signal or signal.Signals(number).name
        self._stop.set()

    def _on_failure(self) -> None:
        self._exit_code = self._exit_code or 1
        self._stop.set()

    # Reloading

    def _on_hangup(self) -> None:
        logs.reopen(self._log)
        self._supervisor.reopen_logs()
        self._reloader.request()

    def _load_and_prepare(self) -> Resources:
        """Read the settings, and have all workers check them. Called in a thread.

        Raises:
            SettingsError: the settings cannot be read, or a worker cannot use them.

        """
        resources = self._load(self._plan.resources)
        plan = Plan.derive(resources, self._startup.inherited_names)
        prepared = asyncio.run_coroutine_threadsafe(self._supervisor.prepare(plan), self._loop)
        if problems := prepared.result(LOOKS):
            raise SettingsError(problems)
        return resources

    def _apply(self, resources: Resources) -> None:
        """Put other settings in force as a whole, in all workers.

        Raises:
            SettingsError: as Plan.derive and take_fallible_steps; nothing has changed.
            ThreadError: as take_fallible_steps; nothing has changed.

        """
        before, plan = self._plan, Plan.derive(resources, self._startup.inherited_names)
        take_fallible_steps(before, plan, {sockets.name: sockets for sockets in self._sockets}, self._log)
        self._plan = plan
        self._supervisor.commit(plan, self._max_connections())
        changed = [".".join(key) for key in changes(before.settings, plan.settings)]
        self._logger.info("reloaded", changed=changed)
        self._warn()
        if waiting := self._restart_needed():
            self._logger.warning("restart_needed", settings=waiting)

    def _restart_needed(self) -> list[str]:
        return self._plan.restart_needed(self._startup.plan)

    def _server_settings(self, name: str) -> ServerSettings:
        """Return the settings of a listener. One that was removed keeps its own until a restart."""
        plan = self._plan if name in self._plan.listeners else self._startup.plan
        return plan.server_settings(name, self._limit, self._buffers)

    def _warn(self) -> None:
        for listener, warning in self._plan.resources.warnings(datetime.now(UTC)):
            self._logger.warning(warning.event, listener=listener, **warning.fields)

    def _max_connections(self) -> int:
        """Return the maximum number of clients per listener, which the limit of descriptors may lower."""
        wanted, listeners = self._plan.settings.limits.max_connections, len(self._sockets)
        own = _RESERVED_DESCRIPTORS + sum(len(sockets.descriptors(0)) for sockets in self._sockets)
        room = max(1, self._startup.descriptors - own) * self._workers
        if wanted * listeners > room:
            self._logger.warning(
                "descriptor_limit",
                limit=self._startup.descriptors,
                max_connections=wanted,
                listeners=listeners,
                room_for_clients=room,
            )
        self._limit = min(wanted, room)
        return self._limit

    def _numbers(self) -> str:
        return f"{count(self._supervisor.clients, 'client')} now, {self._workers} workers"
