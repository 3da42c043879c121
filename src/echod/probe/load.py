"""A measurement of an echo server: one thread, non-blocking sockets, every byte compared.

The path of a message is short, because what this process does between two messages is measured too: a send, a receive,
one comparison in C against the place of the pattern where the connection is, and a number appended to a list. All else
happens on a tick, or in another process (`progress`).
"""

from __future__ import annotations

import collections
import contextlib
import gc
import math
import operator
import random
import selectors
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

from echod import threads
from echod.net import kernel
from echod.probe import connect, progress, report
from echod.probe.command import Answer, Ending, Mismatch
from echod.probe.pause import Pause
from echod.probe.report import Figures

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from echod.probe.command import Order
    from echod.probe.connect import Endpoint

# The random bytes that all connections send, each from a place of its own on, round and round. The length is prime: it
# is a multiple of no message's size, so that a message which is lost, doubled or swapped is always found out.
PERIOD = 1_000_003
# What one call sends or receives at most.
_LARGEST = 262144
# More bytes than any stream sends.
_ENDLESS = 1 << 62

# Sockets connect on so many threads at once: more would overflow the backlog of some servers.
_OPENERS = 32

# The longest that the loop sleeps, seconds and nanoseconds: a signal is honoured when it wakes.
_PATIENCE = 0.1
_PATIENCE_NS = 100_000_000
# Between looks at timeouts and progress, nanoseconds.
_SWEEP = 250_000_000
# A sleeping process wakes late by about that (the timer slack of Linux, and the time to be scheduled): so long before
# a message is due, nanoseconds, the loop does not sleep any more.
_WAKE = 150_000
# So many messages that are due at once are sent before the loop looks at its sockets again.
_BURST = 64
# Latencies are counted so many at a time: large enough to be cheap, and small enough that nothing waits for it.
_BATCH = 512

_NANO = 1_000_000_000
_CLOCK = time.perf_counter_ns


def run(order: Order) -> Answer:
    """Measure, and report."""
    interrupt = Interrupt()
    interrupt.install()
    kernel.raise_descriptor_limit()
    if order.plot is not None and (problem := report.unwritable(order.plot)):
        return Answer(Ending.FAILED, problem=problem)  # now, and not when all is measured
    with progress.Display(order) as display:
        load = Load(order, interrupt, display)
        load.connect()
        figures = load.run()
    return report.answer(order, figures)


class Interrupt:
    """The signal that ends the measurement, once it has come."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def install(self) -> None:
        """Take the signals from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def is_set(self) -> bool:
        """Tell whether the signal has come."""
        return self.signal is not None

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)


class Connection:
    """One connection, and where it is in the pattern."""

    __slots__ = (
        "active",
        "boundary",
        "channel",
        "dues",
        "ended",
        "goal",
        "number",
        "place",
        "receive",
        "received",
        "send",
        "sent",
        "shut",
        "socket",
        "start",
        "tls",
        "watched",
    )

    def __init__(self, number: int, connected: connect.Connected, size: int) -> None:
        self.number = number
        self.socket = connected.socket
        self.channel = connected.channel
        self.tls = connected.tls
        self.receive = connected.channel.recv
        self.send = connected.channel.send
        self.start = number * 7919 % PERIOD
        """Its place in the pattern."""
        self.place = self.start
        """Of the next byte to be received."""
        self.goal = 0
        """All bytes that are due to be sent so far."""
        self.sent = 0
        self.received = 0
        self.boundary = size
        """The count of bytes received with which the next message is complete."""
        self.dues: collections.deque[int] = collections.deque()
        """When each message on its way was due, nanoseconds."""
        self.active = 0
        """When it last did something, or began to have something to do, nanoseconds."""
        self.watched = selectors.EVENT_READ
        self.shut = False
        """Whether its sending side is closed."""
        self.ended = False


class Load:
    """The connections, the loop that serves them, and what was counted.

    Args:
        order: what is to be measured.
        interrupt: looked at on every round of the loop.
        display: told of the progress.

    """

    def __init__(self, order: Order, interrupt: Interrupt, display: progress.Display) -> None:
        self._order = order
        self._interrupt = interrupt
        self._display = display
        self._timeout = int(order.timeout * _NANO)
        once = random.Random(order.seed).randbytes(PERIOD)  # noqa: S311  (it is no secret)
        self._pattern = once + once[:_LARGEST]
        self._view = memoryview(self._pattern)
        # What one receive and one send take at most.
        self._most, self._chunk = _LARGEST, order.size if order.stream else _LARGEST
        if not order.stream:
            self._most = min(max(4096, 2 * order.size * order.pipeline), _LARGEST)
        self._chunk = min(self._chunk, _LARGEST)

        self._selector = selectors.DefaultSelector()
        self._pause = Pause(self._selector)
        self._live: dict[int, Connection] = {}
        # The same in an order, for messages that are due on one after the other.
        self._ring: list[Connection] = []
        # Messages that may still be begun where each waits for an echo. Without an end, the clock says when to stop.
        self._quota: float = 0 if order.rate or order.stream else order.count or math.inf
        # Messages of the schedule, and which of them is next.
        self._scheduled = (order.count or math.ceil(order.rate * order.duration)) if order.rate else 0
        self._next = 0
        self._over = False
        self._began = 0
        self._last = 0
        self._latencies: list[int] = []
        self._sample: list[int] = []
        self._marked = 0, 0
        self._figures = Figures()

    def connect(self) -> None:
        """Open the connections, before the clock runs."""
        opened: list[tuple[int, connect.Connected]] = []
        if not (endpoints := self._endpoints()):
            return
        numbers = iter(range(self._order.connections))
        lock = threading.Lock()

        def take() -> int | None:
            with lock:
                return next(numbers, None) if self._interrupt.signal is None else None

        def work() -> None:
            while (number := take()) is not None:
                try:
                    deadline = time.perf_counter() + self._order.timeout
                    opened.append((number, self._order.route.connect(endpoints, deadline)))
                except OSError as error:
                    self._note(connect.kind(error), f"connection {number}: no connection: {connect.reason(error)}")

        self._share(work, min(_OPENERS, self._order.connections))
        for number, connected in sorted(opened, key=operator.itemgetter(0)):
            connected.socket.settimeout(0)
            connection = Connection(number, connected, self._order.size)
            self._selector.register(connected.socket, selectors.EVENT_READ, connection)
            self._live[number] = connection
            self._figures.connect_seconds = max(self._figures.connect_seconds, connected.seconds)
            self._figures.tls = connected.tls.version if connected.tls else None
        self._figures.connected = len(self._live)

    def _endpoints(self) -> list[Endpoint]:
        """Return where to connect to; an empty list if the name cannot be resolved or a signal has come."""
        try:
            return self._order.route.endpoints(self._order.timeout, self._interrupt.is_set)
        except InterruptedError:
            pass
        except OSError as error:
            self._note(connect.kind(error), f"no connection: {connect.reason(error)}")
        return []

    def _share(self, work: Callable[[], None], count: int) -> None:
        """Do work on several threads at once, or on fewer if the system refuses them; return early on an interrupt."""
        workers: list[threading.Thread] = []
        with contextlib.suppress(threads.ThreadError):
            workers.extend(threads.start(work, "opener") for _ in range(count))
        if not workers:
            work()
        for worker in workers:
            while worker.is_alive() and self._interrupt.signal is None:
                worker.join(_PATIENCE)

    def run(self) -> Figures:
        """Measure until all is sent and echoed, no connection is left, or a signal comes."""
        order = self._order
        # What is there by now is no garbage: the collector need not look through it in the middle of this.
        gc.freeze()
        cpu = time.process_time()
        self._began = self._last = now = sweep = _CLOCK()
        self._marked = now, 0
        stop = now + int(order.duration * _NANO) if order.duration and not order.rate else math.inf
        for connection in list(self._live.values()):
            connection.active = now
            if order.stream:
                connection.goal = _ENDLESS
                self._write(connection)
            else:
                self._begin(connection, order.pipeline, now)
        while self._live and self._interrupt.signal is None:
            now = _CLOCK()
            if now >= sweep:
                sweep = now + _SWEEP
                self._sweep(now)
            if now >= stop and not self._over:
                self._quota = 0
                self._stop_sending()
            self._serve(self._schedule(now) if order.rate else self._selector.select(_PATIENCE))
        self._finish(_CLOCK())
        self._figures.cpu_seconds = time.process_time() - cpu
        return self._figures

    def _serve(self, ready: list[tuple[selectors.SelectorKey, int]]) -> None:
        for key, events in ready:
            connection: Connection = key.data
            if connection.ended:
                continue
            if events & selectors.EVENT_READ:
                # What TLS has already taken from the socket, the selector does not see.
                while self._read(connection) and connection.tls:
                    pass
            if events & selectors.EVENT_WRITE and not connection.ended:
                self._write(connection)
        if len(self._latencies) >= _BATCH:
            self._flush()

    def _finish(self, now: int) -> None:
        for connection in list(self._live.values()):
            self._close(connection)
        self._flush()
        self._selector.close()
        self._figures.signal = self._interrupt.signal
        # Up to the last echo; but where nothing came any more, that is measured too.
        end = max(self._last, min(now, self._began + int(self._order.duration * _NANO)))
        if self._figures.signal is not None:
            end = now
        self._figures.seconds = (end - self._began) / _NANO
        self._mark(end)

    def _schedule(self, now: int) -> list[tuple[selectors.SelectorKey, int]]:
        """Send what is due, and wait for events until something else is."""
        assert self._order.rate is not None
        for _ in range(_BURST):
            if self._next == self._scheduled:
                if not self._over:
                    self._stop_sending()
                return self._selector.select(_PATIENCE)
            due = self._began + int(self._next / self._order.rate * _NANO)
            if due > now:
                if (idle := due - now - _WAKE) > 0:
                    self._pause.wait(min(idle, _PATIENCE_NS))
                break
            self._figures.lag = max(self._figures.lag, (now - due) / _NANO)
            self._ring = self._ring or list(self._live.values())
            connection = self._ring[self._next % len(self._ring)]
            self._next += 1
            if not connection.dues:
                connection.active = now
            connection.dues.append(due)
            connection.goal += self._order.size
            if not connection.watched & selectors.EVENT_WRITE:
                self._write(connection)
                if not self._live:
                    break
        return self._selector.select(0)

    def _begin(self, connection: Connection, specs: int, now: int) -> None:
        """Let a connection send so many messages more, as far as there are any left."""
        count = int(min(specs, self._quota))
        if not count:
            return
        self._quota -= count
        connection.dues.extend([now] * count)
        connection.goal += count * self._order.size
        if not connection.watched & selectors.EVENT_WRITE:
            self._write(connection)
        if not self._quota:
            self._stop_sending()

    def _stop_sending(self) -> None:
        self._over = True
        for connection in list(self._live.values()):
            if self._order.stream:
                connection.goal = connection.sent
            self._write(connection)

    def _write(self, connection: Connection) -> None:
        """Send, as much as goes now."""
        sent = connection.sent
        try:
            if left := connection.goal - sent:
                place = (connection.start + sent) % PERIOD
                taken = connection.send(self._view[place : place + min(left, self._chunk)])
                connection.sent += taken
                if taken < left:  # a large message takes its time
                    connection.active = _CLOCK()
            elif connection.tls:
                connection.tls.flush()
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail(connection, connect.kind(error), connect.reason(error))
            return
        specs = selectors.EVENT_READ
        if connection.sent < connection.goal or (connection.tls and connection.tls.unsent):
            specs |= selectors.EVENT_WRITE
        if specs != connection.watched:
            connection.watched = specs
            self._selector.modify(connection.socket, specs, connection)
        if self._over:
            self._record_delivery(connection)

    def _read(self, connection: Connection) -> bool:
        """Receive once, and tell whether there was something, and it was right."""
        try:
            data = connection.receive(self._most)
        except BlockingIOError:
            return False
        except OSError as error:
            self._fail(connection, connect.kind(error), connect.reason(error))
            return False
        now = _CLOCK()
        received = connection.received + len(data)
        if not data or received > connection.sent or not self._pattern.startswith(data, connection.place):
            self._unexpected(connection, data)
            return False
        connection.active = now
        connection.received = received
        connection.place = (connection.place + len(data)) % PERIOD
        if received >= connection.boundary and not self._order.stream:
            before = connection.boundary
            while received >= connection.boundary:
                self._latencies.append(now - connection.dues.popleft())
                connection.boundary += self._order.size
            if self._quota:
                self._begin(connection, (connection.boundary - before) // self._order.size, now)
        if self._over:
            self._record_delivery(connection)
        return not connection.ended

    def _record_delivery(self, connection: Connection) -> None:
        """See whether a connection, which is to send no new message, has still something to do."""
        if connection.ended or connection.sent < connection.goal or (connection.tls and connection.tls.unsent):
            return
        if not self._order.half_close:
            if connection.received == connection.goal:
                self._close(connection)
        elif not connection.shut:
            connection.shut = True
            connection.active = _CLOCK()
            try:
                connection.channel.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._fail(connection, connect.kind(error), connect.reason(error))
            else:
                self._write(connection)  # close_notify may have to wait

    def _unexpected(self, connection: Connection, data: bytes) -> None:
        """Deal with EOF, and with bytes that are no echo."""
        if not data:
            if connection.shut and connection.received == connection.goal:
                self._close(connection)
            else:
                missing = connection.sent - connection.received
                self._fail(connection, "early_eof", f"the server closed it, {missing} bytes of echo missing")
            return
        place = connection.place
        expected = self._pattern[place : place + min(len(data), connection.sent - connection.received)]
        mismatch = Mismatch.between(expected, data, connection.received)
        self._figures.mismatch = self._figures.mismatch or (connection.number, mismatch)
        self._fail(connection, "wrong_echo", str(mismatch))

    def _fail(self, connection: Connection, kind: str, reason: str) -> None:
        self._note(kind, f"connection {connection.number}: {reason}")
        self._close(connection)

    def _note(self, kind: str, problem: str) -> None:
        self._figures.errors[kind] += 1
        # A wrong echo is what there is to be told, whatever came before.
        if not self._figures.problem or (kind == "wrong_echo" and self._figures.errors[kind] == 1):
            self._figures.problem = problem

    def _close(self, connection: Connection) -> None:
        connection.ended = True
        del self._live[connection.number]
        self._ring.clear()
        self._selector.unregister(connection.socket)
        connection.channel.close()
        self._last = max(self._last, connection.active)
        self._figures.sent += connection.sent
        self._figures.received += connection.received
        self._figures.unanswered += len(connection.dues)

    def _flush(self) -> None:
        self._sample = self._latencies or self._sample
        self._figures.latencies.add(self._latencies)
        self._latencies = []

    def _sweep(self, now: int) -> None:
        """Do what is to be done a few times a second."""
        for connection in list(self._live.values()):
            waiting = connection.received < connection.goal or connection.shut
            if waiting and now - connection.active > self._timeout:
                self._fail(connection, "timeout", "no echo came in time")
        if now - self._marked[0] >= _NANO:
            self._mark(now)
        self._display.show(
            seconds=(now - self._began) / _NANO,
            messages=self._figures.latencies.count + len(self._latencies),
            received=self._received(),
            errors=self._figures.errors.total(),
            sample=self._sample,
        )

    def _mark(self, now: int) -> None:
        """Add a mark to the course of the throughput; one of a moment says nothing."""
        since, before = self._marked
        if now - since >= _NANO / 4:
            self._marked = now, self._received()
            self._figures.throughput.append((self._marked[1] - before) * _NANO / (now - since))

    def _received(self) -> int:
        return self._figures.received + sum(connection.received for connection in self._live.values())
