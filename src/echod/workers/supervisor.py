"""Keep the workers running, and pass orders on to them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from typing import TYPE_CHECKING, NamedTuple

from echod.server.receipt import Receipt
from echod.server.shared_quota import QuotaTable
from echod.settings.problems import Problem
from echod.workers import channel, messages
from echod.workers.channel import Channel
from echod.workers.figures import final, sums
from echod.workers.heartbeats import Heartbeats
from echod.workers.messages import Loaded
from echod.workers.process import WorkerProcess, describe
from echod.workers.restarts import Restarts
from echod.workers.slots import Slots
from echod.workers.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echod.daemon.logs import Log
    from echod.daemon.plan import Plan
    from echod.net.addresses import InheritedAddress
    from echod.server.ledger import Counters
    from echod.workers.sockets import ListenerSockets
    from echod.workers.spawner import Report, Spawner

# Seconds without a heartbeat until a worker is killed.
_STUCK = 10.0

# Seconds between two looks at the heartbeats.
_LOOK = 1.0

# Seconds for an answer. A worker that takes longer is stuck.
_ANSWER = 5.0

# Seconds for the figures of the admin listener. Figures that come later count for the next request.
_FIGURES = 1.0

# Seconds for workers that are being started when a drain begins.
_START = 2.0


class Outcome(NamedTuple):
    """The end of all workers in a stop."""

    receipt: Receipt
    counters: Sequence[Counters]
    """Those of the workers that have drained, since the start of each."""
    lost: int
    """Number of workers that ended without a receipt. Their clients count as failed."""
    has_failed: bool


class Supervisor:
    """Run the workers. Make all calls in the running loop.

    Args:
        spawner: forks them.
        workers: their number.
        listeners: their sockets, owned by this object from now on.
        limit: maximum number of clients per listener.
        inherited: the addresses of the inherited sockets.
        plan: in force.
        log: of the parent.
        give_up: called if there can be no more workers. The daemon then has to stop.

    """

    def __init__(
        self,
        spawner: Spawner,
        workers: int,
        listeners: Sequence[ListenerSockets],
        limit: int,
        inherited: Sequence[InheritedAddress],
        plan: Plan,
        log: Log,
        give_up: Callable[[], None],
    ) -> None:
        self._spawner = spawner
        self._listeners = listeners
        self._inherited = tuple(inherited)
        self._loaded = dict.fromkeys(plan.listeners, Loaded.of(plan))
        self._plan = plan
        self._log = log
        self._give_up = give_up
        self._workers = workers
        self._descriptor = Slots.create(workers, len(listeners))
        self._slots = Slots(self._descriptor, workers, len(listeners))
        for index in range(len(listeners)):
            self._slots.limits[index] = limit
        self._heartbeats = Heartbeats(self._slots.last_beat)
        self._tokens = [Tokens(limit) for _ in listeners]
        self._quota_descriptors = [QuotaTable.create(workers) for _ in listeners]
        self._quotas = [QuotaTable(descriptor, workers) for descriptor in self._quota_descriptors]
        self._processes: dict[int, WorkerProcess] = {}
        self._prepared: list[WorkerProcess] = []
        self._reports: list[asyncio.Queue[Report | None]] = [asyncio.Queue() for _ in range(workers)]
        self._ready = [asyncio.Event() for _ in range(workers)]
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._is_draining = self._is_aborting = False
        self._drained: list[messages.Drained] = []
        self._lost: list[int] = []
        self._ended: list[messages.Figures] = []
        self._has_failed = False

    def start(self) -> None:
        """Start the workers."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._spawner.sock, self._take_report)
        self._keepers = {number: loop.create_task(self._keep(number)) for number in range(self._workers)}
        self._watcher = loop.create_task(self._watch())

    @property
    def clients(self) -> int:
        """The number of connected clients."""
        return sum(sum(self._slots.clients(index)) for index in range(len(self._listeners)))

    def answers(self) -> bool:
        """Tell whether every worker has answered recently."""
        return self._heartbeats.are_recent()

    async def take_figures(self) -> dict[int, bool]:
        """Ask each worker for its figures. Return which have answered."""
        processes = list(self._processes.items())
        answered = await asyncio.gather(*(process.count(_FIGURES) for _, process in processes))
        return dict.fromkeys(range(self._workers), False) | {
            number: answer for (number, _), answer in zip(processes, answered, strict=True)
        }

    def figures(self) -> list[messages.Figures]:
        """Return the last figures of each worker, those that have ended included. So no sum falls."""
        running = (process.figures for process in self._processes.values())
        return [*self._ended, *(figures for figures in running if figures is not None)]

    def clients_of(self, worker: int) -> int:
        """Return the number of clients of a worker."""
        return sum(self._slots.clients(index)[worker] for index in range(len(self._listeners)))

    def pid_of(self, worker: int) -> int | None:
        """Return the process of a worker, or None if it has none."""
        process = self._processes.get(worker)
        return None if process is None else process.pid

    async def ready(self) -> None:
        """Wait until each worker accepts clients, or is not started again."""
        for ready in self._ready:
            await ready.wait()

    # Reloading

    async def prepare(self, plan: Plan) -> list[Problem]:
        """Have each worker check other settings. Return the problems."""
        processes = list(self._processes.items())
        answers = [process.ask(messages.Prepare(Loaded.of(plan)), messages.Prepared) for _, process in processes]
        await asyncio.wait(answers, timeout=_ANSWER)
        problems: dict[Problem, None] = {}
        self._prepared = []
        for (number, process), answer in zip(processes, answers, strict=True):
            if not answer.done():
                problems[Problem("", "", f"worker {number} does not answer")] = None
            elif prepared := answer.result():  # otherwise it has ended, and its successor gets the settings
                problems |= dict.fromkeys(prepared.problems)
                self._prepared.append(process)
        return list(problems)

    def commit(self, plan: Plan, limit: int) -> None:
        """Put the prepared settings in force, with this limit of clients per listener."""
        self._plan = plan
        self._loaded |= dict.fromkeys(plan.listeners, Loaded.of(plan))
        for index, tokens in enumerate(self._tokens):
            self._slots.limits[index] = limit
            tokens.set_limit(limit)
        for process in self._processes.values():
            if process not in self._prepared:  # it was started in between
                process.send(messages.Prepare(Loaded.of(plan)))
            process.send(messages.Commit())
        self._prepared = []

    def reopen_logs(self) -> None:
        """Have each worker open its log file again."""
        for process in self._processes.values():
            process.send(messages.Reopen())

    # Stopping

    async def begin_stop(self) -> int:
        """Begin the time that the receipt covers, and return the number of clients."""
        self._stopping.set()
        answers = {
            number: process.ask(messages.BeginStop(), messages.StopBegun) for number, process in self._processes.items()
        }
        if answers:
            await asyncio.wait(answers.values(), timeout=_ANSWER)
        begun = (answer.result() for answer in answers.values() if answer.done())
        return sum(each.clients for each in begun if each is not None)

    def abort(self) -> None:
        """Reset all clients in the stop that is running. Idempotent."""
        self._is_aborting = True
        for process in self._processes.values():
            process.send(messages.Abort())

    async def drain(self) -> Outcome:
        """Have all workers empty their queues and drain, and wait for their end.

        The parent lets go of its sockets first. So a worker's last accept and the close are one step.
        """
        await self._wait_for_starts()
        self._is_draining = True
        for listener in self._listeners:
            listener.close()
        for process in self._processes.values():
            process.send(messages.Abort() if self._is_aborting else messages.Drain())
        await asyncio.wait(self._keepers.values())
        self._watcher.cancel()
        asyncio.get_running_loop().remove_reader(self._spawner.sock)
        for keeper in self._keepers.values():
            keeper.result()  # raises the exception of a defect
        known = Receipt.total(drained.receipt for drained in self._drained)
        lost = Receipt.of_failed(sum(self._lost))
        counters = [one for drained in self._drained for one in drained.counters]
        return Outcome(Receipt.total((known, lost)), counters, len(self._lost), self._has_failed)

    async def _wait_for_starts(self) -> None:
        """Wait for workers that are being started: connections may wait in their queues."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0 if self._is_aborting else _START):
                while any(
                    not keeper.done() and number not in self._processes for number, keeper in self._keepers.items()
                ):
                    self._changed.clear()
                    await self._changed.wait()

    # Workers

    async def _keep(self, number: int) -> None:
        """Run a worker, and start it again if it dies, until the drain or until it has died too often."""
        loop = asyncio.get_running_loop()
        restarts = Restarts()
        try:
            while not self._is_draining:
                began = loop.time()
                failure = await self._run(number)
                if failure is None:
                    return
                now = loop.time()
                delay = restarts.delay(now, now - began)
                self._log.logger.error("worker_failed", worker=number, **failure, deaths=restarts.count)
                if delay is None:
                    self._log.logger.error("workers_failing")
                    self._give_up()
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._stopping.wait()
        finally:
            self._ready[number].set()
            self._changed.set()

    async def _run(self, number: int) -> dict[str, object] | None:
        """Run one process of a worker. Return its failure as fields of an event, or None if it is not to be replaced."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.suppress(OSError):  # the spawner has ended, and so its reports
            self._spawner.fork(number, theirs)
        report = await self._reports[number].get()
        if report is None:
            ours.close()
            return None
        if report.kind == "refused":
            ours.close()
            return {"error": errno.errorcode.get(report.value, str(report.value))}
        opened = await Channel.open(ours)
        if self._is_draining:  # its sockets are closed already
            await opened.close()
            await self._reports[number].get()
            return None
        process = self._begin(number, report.value, ours, opened)
        listening = asyncio.create_task(process.listen())
        if await process.ready is not None:
            self._log.logger.info("worker_ready", worker=number, pid=report.value)
            self._ready[number].set()
        await listening
        report = await self._reports[number].get()
        return self._note_end(number, process, None if report is None else report.value)

    def _begin(self, number: int, pid: int, sock: socket.socket, opened: Channel) -> WorkerProcess:
        """Give a new process its sockets and settings."""
        sockets = [descriptor for listener in self._listeners for descriptor in listener.descriptors(number)]
        with contextlib.suppress(OSError):  # it has ended already
            tokens = [each.descriptor for each in self._tokens]
            channel.send_descriptors(sock, [self._descriptor, *tokens, *self._quota_descriptors, *sockets])
        parts = tuple(
            each.part(number, None if each.name in self._plan.listeners else self._loaded[each.name])
            for each in self._listeners
        )
        process = WorkerProcess(pid, opened)
        process.send(messages.Start(number, self._workers, Loaded.of(self._plan), self._inherited, parts))
        if self._stopping.is_set():
            process.send(messages.BeginStop())
        self._processes[number] = process
        self._heartbeats.watch(number)
        self._changed.set()
        return process

    def _note_end(self, number: int, process: WorkerProcess, status: int | None) -> dict[str, object] | None:
        """Take over the clients and the receipt of a process that has ended.

        Args:
            number: of the worker.
            process: it has closed its channel.
            status: its wait status, or None if it is unknown, because the spawner has ended.

        Returns:
            As `_run`.

        """
        del self._processes[number]
        self._heartbeats.forget(number)
        clients = self._slots.clear(number)
        for tokens, lost in zip(self._tokens, clients, strict=True):
            tokens.give(lost)
        for quota in self._quotas:
            quota.clear(number)
        drained = process.drained.result()
        self._ended = sums([*self._ended, *final(process.figures, drained)])
        if self._stopping.is_set():
            if drained is not None:
                self._drained.append(drained)
            else:
                self._lost.append(sum(clients))
            self._has_failed |= drained is None or bool(status)
        if status is None or (status == 0 and self._is_draining):
            return None
        return {"pid": process.pid, **describe(status)}

    def _take_report(self) -> None:
        report = self._spawner.report()
        if report is not None:
            self._reports[report.number].put_nowait(report)
            return
        asyncio.get_running_loop().remove_reader(self._spawner.sock)
        for reports in self._reports:
            reports.put_nowait(None)
        self._log.logger.error("spawner_lost")
        self._give_up()

    async def _watch(self) -> None:
        """Kill each worker whose loop is stuck."""
        while True:
            for number, silent in self._heartbeats.look(_LOOK).items():
                if silent >= _STUCK:
                    self._log.logger.error("worker_stuck", worker=number, seconds=round(silent, 3))
                    self._spawner.kill(number)
            await asyncio.sleep(_LOOK)
