"""The measurement of a UDP echo: one thread and one socket, with every byte compared."""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import selectors
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from echod.probe import workloads
from echod.probe.connection import PERIOD, random_pattern
from echod.probe.errors import WrongEchoError, kind, reason
from echod.probe.latencies import Latencies
from echod.probe.timing import Deadline, Timer
from echod.probe.udp import check, icmp, sockets
from echod.probe.udp.payload import SESSION, Payloads
from echod.probe.udp.tally import Tally

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence

    from echod.probe.load import Interrupt
    from echod.probe.model import ProbeOptions
    from echod.probe.progress import Display

_NANO = 1_000_000_000
# Nanoseconds: the longest sleep, as a signal is handled after it; and the time between updates of the display.
_PATIENCE = 100_000_000
_SWEEP = 250_000_000
# Nanoseconds before a datagram is due in which the loop does not sleep, as a sleeping process wakes up late.
_WAKE = 150_000
# Nanoseconds to wait for duplicates and late echoes after the last datagram is received or lost.
_LINGER = 100_000_000
# Datagrams that are received before the next ones are sent.
_BATCH = 64
# Latencies are counted in batches, as that is cheaper.
_LATENCIES = 512


@dataclass(slots=True)
class Results:
    """The results of a measurement."""

    tally: Tally
    reached: bool = True
    """Whether the server may be there: False after an error without any echo."""
    seconds: float = 0.0
    """Time from the first datagram to the last one sent or received, or to the end of the duration if that is later."""
    send_seconds: float = 0.0
    """Time from the first datagram to the last one."""
    cpu_seconds: float = 0.0
    """CPU time of this process."""
    latencies: Latencies = field(default_factory=Latencies)
    lag: float = 0.0
    """How late a scheduled datagram was sent at most, in seconds. The cause is this process or its host."""
    receive_drops: int | None = None
    """Datagrams that the kernel dropped at the socket of this process, or None if it does not say."""
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    problem: str = ""
    """The first error."""
    signal: signal.Signals | None = None
    """The signal that ended the measurement early."""

    def add_error(self, error: OSError | WrongEchoError, problem: str) -> None:
        """Count an error, and keep the description of the first one."""
        self.errors[kind(error)] += 1
        self.problem = self.problem or problem


class Measurement:
    """Sends datagrams on schedule, receives their echoes, and counts.

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
        self._workload = workloads.choose(options)
        self._selector = selectors.DefaultSelector()
        self._timer = timer(self._selector)
        self._now = self._timer.now
        session = os.urandom(SESSION)
        pattern = random_pattern(int.from_bytes(session, "big"))
        payloads = Payloads(session, pattern, PERIOD, options.size)
        self._tally = Tally(payloads, int(options.timeout * _NANO))
        self._pending: list[int] = []
        """Latencies that are not yet counted, nanoseconds."""
        self._sample: list[int] = []
        self._began = 0
        self._last = 0
        """When the last datagram was sent, or received in time."""
        self._results = Results(self._tally)

    def run(self) -> Results:
        """Measure until each datagram is received or lost, the server is not reached, or a signal arrives."""
        try:
            sock = self._connect()
        except InterruptedError:
            pass
        except (OSError, WrongEchoError) as error:
            self._results.add_error(error, check.describe(error))
            self._results.reached = isinstance(error, TimeoutError | WrongEchoError)
        else:
            with sock:
                self._measure(sock)
        self._selector.close()
        self._results.signal = self._interrupt.signal
        return self._results

    def _connect(self) -> socket.socket:
        """Return a socket that is connected to the server. If its name has several addresses, choose by a quick check.

        Raises:
            InterruptedError: a signal has arrived.
            WrongEchoError: the server sent something else to the quick check.
            OSError: no address can be reached, or none answered the quick check (TimeoutError).

        """
        route, timeout, stopped = self._options.route, self._options.timeout, self._interrupt.is_set
        first, *more = endpoints = route.endpoints(timeout, stopped)
        chosen = check.exchange(route, endpoints, Deadline(timeout), stopped).endpoint if more else first
        return sockets.connect(route, chosen)

    def _measure(self, sock: socket.socket) -> None:
        # Keep the garbage collector from scanning the objects that exist by now.
        gc.freeze()
        self._selector.register(sock, selectors.EVENT_READ)
        cpu = time.process_time()
        self._began = self._last = self._now()
        self._loop(sock)
        self._count()
        now, results = self._now(), self._results
        # Measure at least for the duration, even if no echo arrived at its end.
        end = max(self._last, min(now, self._began + int(self._options.duration * _NANO)))
        results.seconds = ((end if self._interrupt.signal is None else now) - self._began) / _NANO
        results.cpu_seconds = time.process_time() - cpu
        results.receive_drops = sockets.receive_drops(sock)

    def _loop(self, sock: socket.socket) -> None:
        workload, tally, began = self._workload, self._tally, self._began
        stop = began + workload.duration * _NANO
        tick, quiet = began, None
        self._send(sock, [began] * workload.first())
        while self._interrupt.signal is None and self._results.reached:
            now = self._now()
            if now >= tick:
                tick = now + _SWEEP
                self._show(now)
            ending = workload.exhausted or now >= stop
            due, idle = ((), None) if ending else workload.schedule(now - began)
            self._send(sock, [began + moment for moment in due])
            answered, drained = self._receive(sock)
            # What has arrived is received, however late this process reads it.
            ended = answered + (tally.expire(now) if drained else 0)
            if ended and not ending:
                self._send(sock, [self._now()] * workload.after(ended))
            elif ending and not tally.in_flight:
                quiet = quiet or now + _LINGER
                if now >= quiet:
                    return
            if len(self._pending) >= _LATENCIES:
                self._count()
            if drained:
                moments = [tick, now + _PATIENCE, tally.expiry, quiet, None if idle is None else now + idle - _WAKE]
                wait = min(moment for moment in moments if moment is not None) - self._now()
                if wait > 0:
                    self._timer.wait(wait)

    def _send(self, sock: socket.socket, dues: Sequence[int]) -> None:
        """Send a datagram for each due time."""
        if not dues:
            return
        self._last = now = self._now()
        self._results.lag = max(self._results.lag, (now - dues[0]) / _NANO)
        self._results.send_seconds = (now - self._began) / _NANO
        for due in dues:
            datagram = self._tally.send(due, now)
            try:
                sock.send(datagram)
            except OSError as error:
                # An ICMP error for an earlier datagram has kept this one from being sent.
                if self._fail(sock, error):
                    with contextlib.suppress(OSError):
                        sock.send(datagram)

    def _receive(self, sock: socket.socket) -> tuple[int, bool]:
        """Receive a batch. Return the number of datagrams answered, and whether nothing is left to receive."""
        answered = 0
        for _ in range(_BATCH):
            try:
                datagram = sock.recv(self._options.size + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return answered, True
            except OSError as error:
                self._fail(sock, error)
                continue
            now = self._now()
            latency = self._tally.receive(datagram, now)
            if latency is not None:
                self._pending.append(latency)
                self._last = now
                answered += 1
        return answered, False

    def _fail(self, sock: socket.socket, error: OSError) -> bool:
        """Count the errors that the kernel has queued, or else this one. Return whether it had queued any.

        The datagrams are not lost before their timeout, so a closed loop does not flood a dead port.
        """
        queued = icmp.queued(sock)
        for each in queued or [icmp.from_errno(error.errno or 0)]:
            self._results.add_error(each, reason(each))
            # The kernel has learned the path MTU, and sends smaller fragments from now on.
            if not self._tally.received and each.word != "message_too_long":
                self._results.reached = False
        return bool(queued)

    def _count(self) -> None:
        self._sample = self._pending[:] or self._sample
        self._results.latencies.add(self._pending)
        self._pending.clear()

    def _show(self, now: int) -> None:
        self._count()
        self._display.show(
            seconds=(now - self._began) / _NANO,
            messages=self._tally.received,
            received=self._tally.received * self._options.size,
            errors=self._results.errors.total(),
            sample=self._sample,
            lost=self._tally.lost,
        )
