"""The load generator: one thread and non-blocking sockets, with every byte compared.

The work between two messages is part of every latency, so it is small: a send, a receive, one comparison in C and one
number appended to a list. Everything else happens a few times per second, or in another process (`progress`).
"""

from __future__ import annotations

import collections
import contextlib
import gc
import math
import operator
import selectors
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from echod import threads
from echod.probe import workloads
from echod.probe.connection import LARGEST, Connection, Traffic, random_pattern
from echod.probe.errors import EarlyEofError, WrongEchoError, ended, kind, reason, unreachable
from echod.probe.latencies import Latencies
from echod.probe.timing import Deadline, Timer

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence
    from types import FrameType

    from echod.probe.connect import Connected, Endpoint
    from echod.probe.errors import Mismatch, ProbeError
    from echod.probe.model import ProbeOptions
    from echod.probe.progress import Display

# Threads that connect at once. More would overflow the backlog of some servers.
_OPENERS = 32

# The longest sleep of the loop, seconds and nanoseconds: a signal is handled when it wakes.
_PATIENCE = 0.1
_PATIENCE_NS = 100_000_000
# Between looks at timeouts and progress, nanoseconds.
_SWEEP = 250_000_000
# Nanoseconds before a message is due in which the loop does not sleep. A sleeping process wakes up late by about this
# time (the timer slack of Linux, and scheduling).
_WAKE = 150_000
# Latencies are counted in batches: large enough to be cheap, small enough not to delay a message.
_BATCH = 512

_NANO = 1_000_000_000
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


@dataclass(slots=True)
class Results:
    """The results of a measurement."""

    connected: int = 0
    connect_seconds: float = 0.0
    """Time of the slowest connection, including its TLS handshake."""
    tls: str | None = None
    seconds: float = 0.0
    """Time from the first message to the last echo, or to the end of the duration if that is later."""
    cpu_seconds: float = 0.0
    """CPU time of this process."""
    sent: int = 0
    received: int = 0
    """Bytes received and compared."""
    unanswered: int = 0
    """Messages that were due, without a complete echo."""
    latencies: Latencies = field(default_factory=Latencies)
    lag: float = 0.0
    """How late a scheduled message was sent at most, in seconds. The cause is this process or its host."""
    throughput: list[float] = field(default_factory=list)
    """Bytes received per second, for each second."""
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    problem: str = ""
    """The first wrong echo, or else the first error."""
    mismatch: tuple[int, Mismatch] | None = None
    """The first wrong byte, and the number of its connection."""
    signal: signal.Signals | None = None
    """The signal that ended the measurement early."""

    def add_error(self, error: ProbeError, problem: str, number: int | None = None) -> None:
        """Count an error. Keep the first one, but prefer the first wrong echo.

        Args:
            error: the error.
            problem: its description.
            number: that of the connection, if there is one.

        """
        self.errors[kind(error)] += 1
        if isinstance(error, WrongEchoError) and self.mismatch is None and number is not None:
            self.mismatch = number, error.mismatch
            self.problem = problem
        self.problem = self.problem or problem


class Interrupt:
    """Records the signal that ends the measurement."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def install(self) -> None:
        """Handle SIGINT and SIGTERM from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._record)

    def is_set(self) -> bool:
        """Tell whether a signal has arrived."""
        return self.signal is not None

    def _record(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)


class LoadGenerator:
    """Opens the connections, runs the loop that serves them, and counts.

    Args:
        options: the options of the measurement.
        interrupt: ends the measurement. The loop looks at it in each round.
        display: shows the progress.
        timer: makes the clock, which also waits.

    """

    def __init__(
        self,
        options: ProbeOptions,
        interrupt: Interrupt,
        display: Display,
        timer: Callable[[selectors.DefaultSelector], Timer] = Timer,
    ) -> None:
        self._options = options
        self._interrupt = interrupt
        self._display = display
        self._timeout = int(options.timeout * _NANO)
        self._workload = workloads.choose(options)
        self._selector = selectors.DefaultSelector()
        self._timer = timer(self._selector)
        self._now = self._timer.now
        self._pending: list[int] = []
        """Latencies that are not yet counted, nanoseconds."""
        pattern = random_pattern(options.seed)
        self._traffic = Traffic(
            pattern=pattern,
            view=memoryview(pattern),
            message_size=self._workload.message_size,
            send_size=self._workload.write_size,
            receive_size=min(max(4096, 2 * self._workload.message_size * options.pipeline), LARGEST),
            clock=self._now,
            record=self._pending.append,
        )
        self._live: dict[int, Connection] = {}
        self._turns: collections.deque[Connection] = collections.deque()
        """The connections that send scheduled messages in turn. Closed ones are removed when it is their turn."""
        self._ending = False
        self._began = 0
        self._stop: float = math.inf
        self._last = 0
        self._sample: list[int] = []
        self._marked = 0, 0
        self.results = Results()

    @property
    def connections(self) -> list[socket.socket]:
        """The sockets of the open connections."""
        return [connection.socket for connection in self._live.values()]

    def connect(self) -> None:
        """Open the connections, before the measurement starts."""
        opened: list[tuple[int, Connected]] = []
        if not (endpoints := self._endpoints()):
            return
        numbers = iter(range(self._options.connections))
        lock = threading.Lock()

        def take() -> int | None:
            with lock:
                return next(numbers, None) if self._interrupt.signal is None else None

        def work() -> None:
            while (number := take()) is not None:
                try:
                    opened.append((number, self._options.route.connect(endpoints, Deadline(self._options.timeout))))
                except OSError as error:
                    self.results.add_error(error, f"connection {number}: {unreachable(error)}")

        self._share(work, min(_OPENERS, self._options.connections))
        for number, connected in sorted(opened, key=operator.itemgetter(0)):
            self._live[number] = Connection(number, connected, self._selector, self._traffic)
            self.results.connect_seconds = max(self.results.connect_seconds, connected.seconds)
            self.results.tls = connected.tls.version if connected.tls else None
        self.results.connected = len(self._live)

    def _endpoints(self) -> list[Endpoint]:
        """Return the addresses to connect to, or none if the name cannot be resolved or a signal has arrived."""
        try:
            return self._options.route.endpoints(self._options.timeout, self._interrupt.is_set)
        except InterruptedError:
            pass
        except OSError as error:
            self.results.add_error(error, unreachable(error))
        return []

    def _share(self, work: Callable[[], None], count: int) -> None:
        """Do the work on some threads, or on as many as the system allows. A signal ends the wait for them."""
        workers: list[threading.Thread] = []
        with contextlib.suppress(threads.ThreadError):
            workers.extend(threads.start(work, "opener") for _ in range(count))
        if not workers:
            work()
        for worker in workers:
            while worker.is_alive() and self._interrupt.signal is None:
                worker.join(_PATIENCE)

    def run(self) -> Results:
        """Measure until everything is echoed, no connection is left, or a signal arrives."""
        # Keep the garbage collector from scanning the objects that exist by now.
        gc.freeze()
        cpu = time.process_time()
        self._start()
        began = self._began
        tick: float = began
        schedule, select, wait = self._workload.schedule, self._selector.select, self._timer.wait
        while self._live and self._interrupt.signal is None:
            now = self._now()
            if now >= tick:
                tick = self._tick(now)
            due, idle = schedule(now - began)
            if due:
                self._send(due, now)
            if self._workload.exhausted and not self._ending:
                self._end()
            if idle is None:
                timeout = _PATIENCE
            else:
                timeout = 0
                if idle > _WAKE:
                    wait(min(idle - _WAKE, _PATIENCE_NS))
            for key, events in select(timeout):
                self._serve(key.data, events)
            if len(self._pending) >= _BATCH:
                self._count()
        self.finish()
        self.results.cpu_seconds = time.process_time() - cpu
        return self.results

    def _start(self) -> None:
        self._began = self._last = now = self._now()
        self._marked = now, 0
        self._stop = now + self._workload.duration * _NANO
        self._turns.extend(self._live.values())
        for connection in list(self._live.values()):
            try:
                connection.send(self._workload.first(), now, now)
            except OSError as error:
                self._fail(connection, error)

    def _send(self, due: Sequence[int], now: int) -> None:
        """Send a message for each due time, each on the next connection."""
        self.results.lag = max(self.results.lag, (now - self._began - due[0]) / _NANO)
        for moment in due:
            if not self._live:
                return
            while (connection := self._turns.popleft()).ended:
                pass
            self._turns.append(connection)
            try:
                connection.send(1, self._began + moment, now)
            except OSError as error:
                self._fail(connection, error)

    def _serve(self, connection: Connection, events: int) -> None:
        """Handle the events of a connection's socket."""
        try:
            if events & _READ:
                # The selector does not see data that TLS has already read from the socket.
                while (echoes := connection.read()) is not None:
                    if self._ending:
                        self._settle(connection)
                    elif echoes and (messages := self._workload.after(echoes)):
                        now = connection.active
                        connection.send(messages, now, now)
                    if not connection.secure or connection.ended:
                        break
            if events & _WRITE and not connection.ended:
                connection.write()
                if self._ending:
                    self._settle(connection)
        except (OSError, EarlyEofError, WrongEchoError) as error:
            self._fail(connection, error)

    def _end(self) -> None:
        """Finish the connections, as no further message will be sent."""
        self._ending = True
        for connection in list(self._live.values()):
            try:
                if self._workload.cut:
                    connection.cut()
                connection.write()
                self._settle(connection)
            except OSError as error:
                self._fail(connection, error)

    def _settle(self, connection: Connection) -> None:
        """Close or half-close a connection that has nothing left to send.

        Raises:
            OSError: the connection failed.

        """
        if not connection.flushed:
            return
        if not self._options.half_close:
            if connection.echoed:
                self._close(connection)
        elif connection.eof:
            self._close(connection)
        elif not connection.shut:
            connection.shutdown(self._now())

    def _fail(self, connection: Connection, error: ProbeError) -> None:
        if not connection.received and connection.secure is None and ended(error):
            error.add_note(self._options.route.advice)
        self.results.add_error(error, f"connection {connection.number}: {reason(error)}", connection.number)
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        del self._live[connection.number]
        connection.close()
        self._last = max(self._last, connection.active)
        self.results.sent += connection.sent
        self.results.received += connection.received
        self.results.unanswered += connection.unanswered

    def finish(self) -> None:
        """Close all connections and complete the results."""
        now = self._now()
        for connection in list(self._live.values()):
            self._close(connection)
        self._count()
        self._selector.close()
        self.results.signal = self._interrupt.signal
        # Measure up to the last echo, but at least for the duration, even if no echo arrived at its end.
        end = max(self._last, min(now, self._began + int(self._options.duration * _NANO)))
        if self._interrupt.signal is not None:
            end = now
        self.results.seconds = (end - self._began) / _NANO
        self._mark(end)

    def _count(self) -> None:
        self._sample = self._pending[:] or self._sample
        self.results.latencies.add(self._pending)
        self._pending.clear()

    def _tick(self, now: int) -> float:
        """Do the work of a few times per second. Return the time of the next tick."""
        if now >= self._stop and not self._ending:
            self._end()
        for connection in list(self._live.values()):
            if connection.waiting and now - connection.active > self._timeout:
                self._fail(connection, TimeoutError("no echo came in time"))
        if now - self._marked[0] >= _NANO:
            self._mark(now)
        self._display.show(
            seconds=(now - self._began) / _NANO,
            messages=self.results.latencies.count + len(self._pending),
            received=self._received(),
            errors=self.results.errors.total(),
            sample=self._sample,
        )
        return now + _SWEEP if self._ending else min(now + _SWEEP, self._stop)

    def _mark(self, now: int) -> None:
        """Add a value to the throughput, unless the time since the last one is too short for it."""
        since, before = self._marked
        if now - since >= _NANO / 4:
            self._marked = now, self._received()
            self.results.throughput.append((self._marked[1] - before) * _NANO / (now - since))

    def _received(self) -> int:
        return self.results.received + sum(connection.received for connection in self._live.values())
