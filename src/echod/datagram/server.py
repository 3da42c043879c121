"""The server of one UDP listener: its sockets, its flows, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import TYPE_CHECKING

from echod.datagram.bucket import SECOND
from echod.datagram.echo import DatagramEcho
from echod.datagram.receipt import FlowReceipt
from echod.datagram.registry import FlowRegistry
from echod.net import addresses, kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echod.datagram.flows import Reason
    from echod.datagram.guards import OwnAddresses
    from echod.datagram.held import Held
    from echod.datagram.ledger import Counters, FlowLedger
    from echod.datagram.settings import DatagramSettings
    from echod.net.listeners import ListeningSocket

# Bounds of the time between two sweeps, seconds.
_LONGEST_SWEEP = 1.0
_SHORTEST_SWEEP = 0.01

# Flows that a sweep looks at in one step. Each may write a line to the log.
_STEP = 50

# A drain looks for silence this many times per `quiet_period`, within these bounds in seconds.
_TICKS = 4
_SHORTEST_TICK = 0.01
_LONGEST_TICK = 0.25

# Batches that are read after the socket was sealed. It bounds the end if the kernel does not let the socket be sealed.
_LAST_BATCHES = 1024


class UdpServer:
    """Echo the datagrams of some sockets. It has the verbs of `echod.server.server.Server`.

    Args:
        sockets: usually one, or one per address family. The server owns them from now on.
        settings: the sections that apply to this server.
        ledger: records flows and refusals.
        own: the addresses of all UDP listeners of the daemon.

    """

    def __init__(
        self,
        sockets: Sequence[ListeningSocket],
        settings: DatagramSettings,
        ledger: FlowLedger,
        own: OwnAddresses,
    ) -> None:
        self.settings = settings
        self.ledger = ledger
        self.addresses = [addresses.of_socket(listening.sock) for listening in sockets]
        self._sockets = sockets
        self._is_inherited = any(listening.inherited for listening in sockets)
        self._registry = FlowRegistry(settings, own, ledger)
        self._echoes = [
            DatagramEcho(listening.sock, self._registry, time.monotonic_ns, self._schedule) for listening in sockets
        ]
        self._drops_before = [kernel.datagram_drops(listening.sock) for listening in sockets]
        self._final_drops: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0
        self._aborted = asyncio.Event()
        self._stop_began: tuple[float, int, Counters] | None = None

    @property
    def flows(self) -> int:
        """The number of flows."""
        return len(self._registry.flows)

    def counters(self) -> Counters:
        """Return the totals so far, with the flows that have not ended."""
        return self.ledger.counters.snapshot(self._registry.flows.all())

    def kernel_drops(self) -> int:
        """Return how many datagrams the kernel has dropped since the start, because the receive buffer was full."""
        if self._final_drops is not None:
            return self._final_drops
        pairs = zip(self._sockets, self._drops_before, strict=True)
        return sum(kernel.datagram_drops(listening.sock) - before & 0xFFFFFFFF for listening, before in pairs)

    @property
    def stop_deadlines(self) -> tuple[float, float] | None:
        """The loop's times at which a stop ends its delay and its drain, or None before the stop."""
        if self._stop_began is None:
            return None
        delayed = self._stop_began[0] + self.settings.shutdown.delay
        return delayed, delayed + self.settings.shutdown.drain_timeout

    def start(self) -> None:
        """Begin to answer, in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[BaseException] = self._loop.create_future()
        for echo in self._echoes:
            self._loop.add_reader(echo.sock, echo.read)
        self._sweep = self._loop.create_task(self._run_sweep())
        self._sweep.add_done_callback(self._on_sweep_end)

    def reconfigure(self, settings: DatagramSettings) -> None:
        """Apply other settings from now on. The sockets and the flows stay."""
        self.settings = settings
        self._registry.reconfigure(settings, time.monotonic_ns())

    async def wait_failed(self) -> BaseException:
        """Wait until the sweep fails, which is a defect, and return its exception."""
        return await asyncio.shield(self._failed)

    def begin_stop(self) -> int:
        """Begin the time that the receipt covers, and return the number of flows. Idempotent."""
        if self._stop_began is None:
            self._stop_began = self._loop.time(), self.flows, self.counters()
        return self._stop_began[1]

    async def shutdown(self) -> FlowReceipt:
        """Stop gracefully and return the receipt.

        Answer for `delay` more seconds. Then answer until every flow was silent for `quiet_period`, or `drain_timeout` has
        passed. In the end, answer everything that the kernel has queued, and close. An inherited socket is left after
        `delay`, and the next process reads its queue.
        """
        self.begin_stop()
        assert self._stop_began is not None
        began, present, before = self._stop_began
        shutdown = self.settings.shutdown
        try:
            await self._wait(shutdown.delay)
            if not self._is_inherited:
                await self._wait_for_silence(shutdown.quiet_period, shutdown.drain_timeout)
            for echo in self._echoes:
                self._loop.remove_reader(echo.sock)
            if not self._is_inherited:
                await self._answer_rest()
        finally:
            self._close()
        return FlowReceipt.between(before, self.ledger.counters, present, self._loop.time() - began)

    def abort(self) -> None:
        """Do not wait in a shutdown that is running or follows. Received datagrams are answered all the same."""
        self._aborted.set()

    async def _wait(self, seconds: float) -> None:
        """Wait, unless the stop is aborted."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._aborted.wait()

    async def _wait_for_silence(self, quiet_period: float, timeout: float) -> None:
        """Wait until every flow is silent, but not longer than `timeout` seconds."""
        end = self._loop.time() + timeout
        tick = min(max(quiet_period / _TICKS, _SHORTEST_TICK), _LONGEST_TICK)
        while not self._aborted.is_set() and (left := end - self._loop.time()) > 0:
            now = time.monotonic_ns()
            if all(flow.is_silent(now, round(quiet_period * SECOND)) for flow in self._registry.flows.all()):
                break
            await self._wait(min(tick, left))

    async def _answer_rest(self) -> None:
        """Let nothing more arrive, and answer the datagrams in the sockets' queues."""
        for echo in self._echoes:
            echo.seal()
        for echo in self._echoes:
            for _ in range(_LAST_BATCHES):
                if not echo.read():
                    break
                await asyncio.sleep(0)

    def _close(self) -> None:
        """Send the delayed answers, end the flows, and close the sockets."""
        now = time.monotonic_ns()
        for echo in self._echoes:
            self._loop.remove_reader(echo.sock)
        if self._timer is not None:
            self._timer.cancel()
        for held in self._registry.held.pop_all():
            _send(held, now)
        quiet_period = round(self.settings.shutdown.quiet_period * SECOND)
        for flow in self._registry.flows.all():
            self._registry.end(flow, self._last_reason(silent=flow.is_silent(now, quiet_period)), now)
        self.ledger.finish()
        self._final_drops = self.kernel_drops()
        for listening in self._sockets:
            listening.close()
        self._sweep.cancel()

    def _last_reason(self, *, silent: bool) -> Reason:
        if self._is_inherited:
            return "handed_over"
        if silent:
            return "quiet"
        return "aborted" if self._aborted.is_set() else "cut"

    async def _run_sweep(self) -> None:
        """End silent flows, and log the numbers that were held back, until cancelled."""
        while True:
            timeout = self.settings.limits.flow_timeout
            await asyncio.sleep(max(_SHORTEST_SWEEP, min(_LONGEST_SWEEP, timeout / 4)))
            self.ledger.flush(time.monotonic_ns())
            flows = self._registry.flows.all()
            for first in range(0, len(flows), _STEP):
                self._registry.end_silent(flows[first : first + _STEP], timeout, time.monotonic_ns())
                await asyncio.sleep(0)

    def _on_sweep_end(self, sweep: asyncio.Task[None]) -> None:
        if not sweep.cancelled() and (error := sweep.exception()) is not None:
            self._failed.set_result(error)

    # Delayed answers

    def _schedule(self) -> None:
        """Set the timer to the first delayed answer."""
        due = self._registry.held.next_due()
        if due is None or (self._timer is not None and self._timer_due <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._loop.call_later(max(0, due - time.monotonic_ns()) / SECOND, self._release)

    def _release(self) -> None:
        """Send the answers that are due."""
        self._timer = None
        now = time.monotonic_ns()
        for held in self._registry.held.pop_due(now):
            _send(held, now)
        self._schedule()


def _send(held: Held, now: int) -> None:
    """Send a delayed answer, unless its flow has ended, which has dropped it."""
    if held.flow.held:
        held.flow.release()
        held.send(held.flow, held.data, held.copies, now)


def is_local(host: str) -> bool:
    """Tell whether an IP address belongs to this host, by binding a socket to it.

    With the sysctl ip_nonlocal_bind, the answer is always yes.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))
        return True
    return False
