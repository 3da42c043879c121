"""A worker: the servers of all listeners in one process, which obeys the parent."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from typing import TYPE_CHECKING

from echod.admin.histograms import Histograms
from echod.admin.notable import Notable
from echod.admin.snapshot import Snapshot
from echod.connection.tls import TlsBuffers
from echod.daemon import logs, loop_errors
from echod.daemon.plan import Plan
from echod.loops import run as run_in_loop
from echod.net import kernel
from echod.net.listeners import ListeningSocket
from echod.server.ledger import Ledger
from echod.server.receipt import Receipt
from echod.server.server import Server
from echod.server.shared_limit import SharedLimit
from echod.server.shared_quota import QuotaTable, SharedQuota
from echod.settings.problems import SettingsError
from echod.settings.resources import acquire
from echod.workers import channel as channels
from echod.workers import messages
from echod.workers.channel import Channel
from echod.workers.slots import BEAT, Slots

if TYPE_CHECKING:
    from echod.daemon.logs import Log
    from echod.server.settings import ServerSettings
    from echod.settings.problems import Problem


def run(sock: socket.socket) -> int:
    """Serve until the parent orders a stop or ends.

    Args:
        sock: this worker's end of the channel.

    Returns:
        The exit code: 0, or 1 after a failure.

    """
    try:
        descriptors = channels.receive_descriptors(sock)
        start = channels.receive_first(sock)
    except (EOFError, ConnectionError):
        return 0
    assert isinstance(start, messages.Start)
    kernel.raise_descriptor_limit()
    settings = start.loaded.config.settings
    log = logs.Log(settings.log, start.number, is_shared=True)
    try:
        log.capture()
        worker = Worker(start, descriptors, log)
        return run_in_loop(settings.loop, lambda: worker.run(sock))
    except Exception:
        log.logger.exception("crashed")
        return 1
    finally:
        log.close()


class Worker:
    """The servers of one worker.

    Args:
        start: the first message.
        descriptors: as in `Start`.
        log: of this process.

    Raises:
        SettingsError: the settings cannot be put in force.

    """

    def __init__(self, start: messages.Start, descriptors: list[int], log: Log) -> None:
        self._start = start
        self._log = log
        self._number = start.number
        self._plan = plan = self._derive(start.loaded)
        self._plans = {
            part.name: plan if part.removed_from is None else self._derive(part.removed_from)
            for part in start.listeners
        }
        self._prepared: Plan | None = None
        slots, *rest = descriptors
        count = len(start.listeners)
        self._slots = Slots(slots, start.workers, count)
        self._semaphores, self._quotas, sockets = rest[:count], rest[count : 2 * count], iter(rest[2 * count :])
        os.close(slots)
        self._sockets = {
            part.name: [
                ListeningSocket(socket.socket(fileno=next(sockets)), inherited=part.is_inherited)
                for _ in range(part.sockets)
            ]
            for part in start.listeners
        }
        self._buffers = TlsBuffers()
        self._servers: dict[str, Server] = {}
        self._histograms: dict[str, Histograms] = {}
        self._stop = asyncio.Event()
        self._exit_code = 0

    async def run(self, sock: socket.socket) -> int:
        """Serve until the stop, and return the exit code."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: loop_errors.report(context, self._log.logger))
        self._channel = await Channel.open(sock)
        log = self._plan.settings.log
        for index, part in enumerate(self._start.listeners):
            histograms = self._histograms[part.name] = Histograms.empty()
            observers = (histograms.observe,) if self._plan.settings.admin.address else ()
            logger = self._log.logger.bind(listener=part.name)
            ledger = Ledger(
                logger,
                log.connections,
                observers,
                states=log.level == "debug",
                write=self._log.line("client_closed", listener=part.name),
            )
            limit = SharedLimit(
                self._semaphores[index],
                self._slots.clients(index),
                self._slots.limits[index : index + 1],
                self._number,
                self._slots.is_alive,
                shares_queue=part.is_shared,
            )
            settings = self._settings(part.name)
            table = QuotaTable(self._quotas[index], self._start.workers)
            quota = SharedQuota(settings.limits.max_connections_per_client, table, self._number)
            self._servers[part.name] = Server(self._sockets[part.name], settings, ledger, limit, quota)
        self._snapshot = Snapshot(self._servers)
        self._notable = Notable(loop.time())
        self._beat(loop)
        obeying = loop.create_task(self._obey())
        watchers: list[asyncio.Task[None]] = []
        for name, server in self._servers.items():
            server.start()
            watchers.append(loop.create_task(self._watch(name, server)))
        self._channel.send(messages.Ready())
        gc.freeze()
        gc.enable()
        await self._stop.wait()
        await self._drain()
        self._channel.end()
        await obeying
        for watcher in watchers:
            watcher.cancel()
        self._timer.cancel()
        await self._channel.close()
        return self._exit_code

    async def _drain(self) -> None:
        servers = self._servers.values()
        outcomes = await asyncio.gather(*(server.shutdown() for server in servers), return_exceptions=True)
        for name, outcome in zip(self._servers, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                self._log.logger.error("stop_failed", listener=name, exc_info=outcome)
                self._exit_code = 1
        receipt = Receipt.total(outcome for outcome in outcomes if isinstance(outcome, Receipt))
        self._channel.send(messages.Drained(receipt, tuple(server.ledger.counters for server in servers)))

    async def _obey(self) -> None:
        """Obey the parent until it has ended."""
        try:
            while (message := await self._channel.receive()) is not None:
                self._act(message)
        except Exception:
            # Such as a log file that cannot be opened any more. The parent starts a worker with the new settings.
            self._log.logger.exception("crashed")
            self._exit_code = 1
        else:
            if self._stop.is_set():
                return
            self._log.logger.error("parent_lost")
            self._exit_code = 1
        self._stop.set()

    def _act(self, message: object) -> None:
        match message:
            case messages.Prepare(loaded):
                self._channel.send(messages.Prepared(self._prepare(loaded)))
            case messages.Commit():
                self._commit()
            case messages.Reopen():
                logs.reopen(self._log)
            case messages.BeginStop():
                clients = sum(server.begin_stop() for server in self._servers.values())
                self._channel.send(messages.StopBegun(clients))
            case messages.TakeFigures():
                self._counting = asyncio.create_task(self._count())
            case messages.Drain():
                self._stop.set()
            case _:  # messages.Abort
                for server in self._servers.values():
                    server.abort()
                self._stop.set()

    async def _count(self) -> None:
        """Send the figures for the admin listener. The parent asks again only after the answer."""
        counts = await self._snapshot.take()
        busiest, paused = await self._notable.take(counts, asyncio.get_running_loop().time())
        for name, count in counts.items():
            count.busiest = [traffic for traffic in busiest if traffic.client["listener"] == name]
            count.paused = [traffic for traffic in paused if traffic.client["listener"] == name]
            count.histograms = self._histograms[name]
            count.clients, count.traffic = [], []
        pauses = tuple(server.accept_paused for server in self._servers.values())
        self._channel.send(messages.Figures(tuple(counts.values()), pauses, self._log.lost))

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        self._slots.beat(self._number)
        self._timer: asyncio.TimerHandle = loop.call_later(BEAT, self._beat, loop)

    async def _watch(self, name: str, server: Server) -> None:
        """Stop the worker if a task of a server fails. The parent starts another."""
        error = await server.wait_failed()
        self._log.logger.error("crashed", listener=name, exc_info=error)
        self._exit_code = 1
        self._stop.set()

    # Settings

    def _derive(self, loaded: messages.Loaded) -> Plan:
        resources = acquire(loaded.config, read=loaded.files.__getitem__)
        return Plan.derive(resources, self._start.inherited)

    def _settings(self, name: str) -> ServerSettings:
        plan = self._plans[name]
        settings = plan.server_settings(name, plan.settings.limits.max_connections, self._buffers)
        # The parent waits for the delay. Until it orders the drain, accepting goes on.
        return settings._replace(shutdown=settings.shutdown.model_copy(update={"delay": 0.0}))

    def _prepare(self, loaded: messages.Loaded) -> tuple[Problem, ...]:
        """Load other settings. Return the problems."""
        try:
            self._prepared = self._derive(loaded)
        except SettingsError as error:
            return tuple(error.problems)
        return ()

    def _commit(self) -> None:
        """Put the prepared settings in force.

        Raises:
            OSError: the log file cannot be opened.
            ThreadError: the log's thread cannot be started.

        """
        assert self._prepared is not None
        settings = self._prepared.settings.log
        self._log.change(settings)
        self._plans |= dict.fromkeys(self._prepared.listeners, self._prepared)
        for name, server in self._servers.items():
            logger = self._log.logger.bind(listener=name)
            server.ledger.reconfigure(
                logger,
                settings.connections,
                states=settings.level == "debug",
                write=self._log.line("client_closed", listener=name),
            )
            if name in self._prepared.listeners:
                server.reconfigure(self._settings(name))
        self._prepared = None
