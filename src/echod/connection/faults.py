"""Sessions that misbehave on purpose. A listener without a fault never sees this module's classes."""

from __future__ import annotations

import contextlib
import random
import socket
from collections import deque
from typing import TYPE_CHECKING, Literal, NamedTuple

from echod.connection.echo import EchoSession
from echod.connection.line import whole_lines
from echod.net import kernel

if TYPE_CHECKING:
    import asyncio
    from typing import Self

    from echod.connection.outcome import Reason
    from echod.settings.model import FaultSettings, LimitsSettings, ShutdownSettings

Action = Literal["raise", "close", "reset", "half_close", "stall", "blackhole", "corrupt", "duplicate", "truncate"]

# Those that spoil one message; after each of the others there is no echo any more.
_SPOILING = frozenset({"corrupt", "duplicate", "truncate"})

# Reasons that release all held echo at once. The server does not wait for it any longer, and after "tls" it can send
# nothing more.
_HASTY: frozenset[Reason] = frozenset({"idle", "quiet", "cut", "tls"})

# What a rate lets through at once after a silence, in seconds of it; without a slice, that is also its longest piece.
_BURST = 0.02

# How far behind its rate a session may fall, when it or its client is late, and still make up for it, seconds.
_CATCH_UP = 0.25

# uvloop's timers and clock are exact to this, seconds.
_PRECISION = 0.001

# How often a stalled session, which does not read, is asked whether its client has reset it, seconds.
_WATCH = 1.0


class InjectedFault(Exception):  # noqa: N818  (it is no error of echod's)
    """Raised in a session because a fault profile says so."""


class Fault(NamedTuple):
    """A fault profile: when it is set off (all of the first four have to hold), and what it does then."""

    name: str
    trigger: bytes | None = None
    """The message equals this."""
    after_bytes: int = 0
    """It lies behind so many bytes of messages."""
    after_seconds: float | None = None
    """It comes so many seconds after the session's beginning."""
    probability: float | None = None
    """Chance has it so."""
    seed: int | None = None
    """Of chance. None: it is another one each time."""
    action: Action | None = None
    """None: the shaping applies to the messages for which all holds; with an action, to all."""
    delay: float = 0
    """Seconds by which echo is held back."""
    jitter: float = 0
    """Seconds by which `delay` differs at most, up or down."""
    rate: int | None = None
    """Bytes a second."""
    slice: int | None = None
    """Bytes a write."""

    @classmethod
    def derive(cls, name: str, settings: FaultSettings) -> Self:
        """Return the profile of a fault's settings."""
        return cls(
            name=name,
            trigger=settings.trigger_bytes,
            after_bytes=settings.after_bytes or 0,
            after_seconds=settings.after_seconds,
            probability=settings.probability,
            seed=settings.seed,
            action=settings.action,
            delay=settings.delay,
            jitter=settings.jitter,
            rate=settings.rate,
            slice=settings.slice,
        )

    @property
    def silences(self) -> bool:
        """Whether there is no echo any more once this is set off."""
        return self.action is not None and self.action not in _SPOILING

    @property
    def strikes_at_a_moment(self) -> bool:
        """Whether it is set off without a message: there is a moment to wait for, and nothing else."""
        timed = self.after_bytes > 0 or self.after_seconds is not None
        return self.silences and timed and self.trigger is None and self.probability is None

    @property
    def shapes(self) -> bool:
        """Whether it has echo delayed, slowed or sliced."""
        return bool(self.delay or self.rate or self.slice)


class _Held:
    """Echo that is held back."""

    __slots__ = ("data", "due", "shaped")

    def __init__(self, data: bytes, due: float, *, shaped: bool) -> None:
        self.data = memoryview(data)
        self.due = due
        self.shaped = shaped


class FaultSession(EchoSession):
    """A session that shows a fault. A message is what one read returned.

    Args:
        sock: connected.
        limits: the limits of the server.
        shutdown: the timeouts of its stop.
        ended: done at the end.
        fault: the profile.
        number: the connection's on its listener: with the profile's seed, it makes a run that can be repeated.

    """

    __slots__ = (
        "_alarm",
        "_crowded",
        "_due",
        "_fault",
        "_free_at",
        "_half_closing",
        "_held",
        "_loop",
        "_passed",
        "_pump_timer",
        "_queue",
        "_random",
        "_silent",
        "_stalled",
        "_struck",
        "_written",
    )

    def __init__(
        self,
        sock: socket.socket,
        limits: LimitsSettings,
        shutdown: ShutdownSettings,
        ended: asyncio.Future[None],
        fault: Fault,
        number: int,
    ) -> None:
        super().__init__(sock, limits, shutdown, ended)
        self._fault = fault
        self._loop = ended.get_loop()
        self._random = random.Random(None if fault.seed is None else f"{fault.seed} {number}")  # noqa: S311
        self._due = not fault.after_seconds
        self._struck = False
        self._silent = False
        self._stalled = False
        self._half_closing = False
        self._passed = 0
        self._written = 0
        self._queue: deque[_Held] = deque()
        self._held = 0
        self._crowded = False
        self._free_at = 0.0
        self._pump_timer: asyncio.Handle | None = None
        self._alarm: asyncio.Handle | None = None

    # What the transport calls

    def data_received(self, data: bytes) -> None:
        """Take a message, or two: up to the place from which on the fault may be set off, and behind it."""
        self.received += len(data)
        left = self._fault.after_bytes - self._passed
        if 0 < left < len(data):
            self._take(data[:left])
            self._take(data[left:])
        else:
            self._take(data)

    def pause_writing(self) -> None:
        """Write nothing more to a client that does not read its echo, and stop reading."""
        self.paused = True
        self._gate()

    def resume_writing(self) -> None:
        """Go on writing, and reading if nothing else stands against it; or send FIN: its mark is 0, so all is written."""
        if self._queue:
            self.paused = False
            self._connected.set_write_buffer_limits(high=self.limits.write_buffer)
            self._gate()
            self._schedule()
        elif self.reason is None and self._half_closing:
            self.paused = False
            self._half_close()
        else:
            super().resume_writing()
            self._gate()

    def eof_received(self) -> bool:
        """Go on writing to a client that has closed its own direction; a stalled session has not seen it."""
        self.client_closed()
        if not self._stalled:
            self.close("fault" if self._half_closing else "eof")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop what is held back, and report the end."""
        for timer in (self._pump_timer, self._alarm):
            if timer is not None:
                timer.cancel()
        self._pump_timer = self._alarm = None
        super().connection_lost(exc)
        self._queue.clear()
        self._held = 0

    # What the client's life calls

    def begin(self) -> None:
        """Count the seconds from now on."""
        super().begin()
        if self._fault.after_seconds is not None and self.reason is None:
            self._alarm = self._loop.call_later(self._fault.after_seconds, self.attempt, self._on_time)

    def close(self, reason: Reason) -> None:
        """Begin the close that loses nothing, or hurry one that has begun and holds echo back.

        What is held back is sent in its own time, but at once where it is the server that does not wait any longer.
        """
        waiting = bool(self._queue)
        if self._alarm is not None:
            self._alarm.cancel()
        if reason in _HASTY:
            self._release()
        if self.reason is None:
            super().close(reason)
        elif waiting and not self._queue:
            super()._flush()

    def _flush(self) -> None:
        """Send FIN behind all that was written, unless there is more to write: then the pump goes on from here."""
        if not self._queue:
            super()._flush()

    @property
    def written(self) -> int:
        """How many bytes were given to the transport so far."""
        return self._written

    @property
    def owed(self) -> int:
        """Return how many bytes of echo the client has to get in all, those still held back included."""
        return self._written + self._held

    def undelivered(self) -> int:
        """Return the number of bytes held back, or written and not yet acknowledged, a FIN counting as one."""
        return self._held + super().undelivered()

    def unread(self) -> bool:
        """Return whether there is something this session is still to read; a stalled one reads nothing."""
        return not self._stalled and super().unread()

    @property
    def fault(self) -> str | None:
        """The profile's name, once it has been set off."""
        return self._fault.name if self._struck else None

    # Setting it off

    def _take(self, message: bytes) -> None:
        fault = self._fault
        before = self._passed
        self._passed += len(message)
        if self._silent:
            return
        holds = before >= fault.after_bytes and self._due and fault.trigger in {None, message}
        # Drawn for each message, so that the n-th has the n-th number whatever else has to hold.
        if fault.probability is not None and self._random.random() >= fault.probability:
            holds = False
        if holds and fault.silences:
            self._strike()
            return
        self._struck = self._struck or holds
        if holds:
            message = self._spoil(message)
        self._echo(message, shaped=fault.shapes and (holds or fault.action is not None))
        if fault.strikes_at_a_moment:
            self._look_at_the_moment()

    def _on_time(self) -> None:
        self._due = True
        if self._fault.strikes_at_a_moment:
            self._look_at_the_moment()

    def _look_at_the_moment(self) -> None:
        came = self._due and self._passed >= self._fault.after_bytes
        if came and not self._silent and self.reason is None and not self._connected.is_closing():
            self._strike()

    def _spoil(self, message: bytes) -> bytes:
        match self._fault.action:
            case "corrupt":
                bit = self._random.randrange(8 * len(message))
                spoilt = bytearray(message)
                spoilt[bit // 8] ^= 1 << bit % 8
                return bytes(spoilt)
            case "duplicate":
                return message * 2
            case "truncate":
                return message[: len(message) // 2]
            case _:
                return message

    def _strike(self) -> None:
        self._struck = self._silent = True
        match self._fault.action:
            case "raise":
                try:
                    msg = f"fault {self._fault.name!r} was set off"
                    raise InjectedFault(msg)  # noqa: TRY301  (it is the traceback that is wanted)
                except InjectedFault as error:
                    self.failure = error
                self.close("fault")
            case "close":
                self.close("fault")
            case "reset":
                self.abort("fault")
            case "half_close":
                self._half_closing = True
                self._flush()
            case "stall":
                self._stalled = True
                self._gate()
                self._alarm = self._loop.call_later(_WATCH, self.attempt, self._watch)
            case _:
                pass  # blackhole

    def _watch(self) -> None:
        """Notice the client's reset, which the transport of a session that neither reads nor writes does not."""
        if kernel.is_reset(self.sock):
            self.lose()
        else:
            self._alarm = self._loop.call_later(_WATCH, self.attempt, self._watch)

    def _send_fin(self) -> None:
        if self.reason is None:
            self._half_close()
        else:
            super()._send_fin()

    def _half_close(self) -> None:
        """Send FIN, and go on reading."""
        if self._shut_down():
            self._gate()

    # Holding echo back

    def _echo(self, data: bytes, *, shaped: bool) -> None:
        """Write, or hold back; nothing overtakes what is held back."""
        if not data:
            return
        if not (shaped or self._queue):
            self._write(data)
            return
        self._struck = True
        due = self._loop.time()
        if shaped:
            due += self._fault.delay + self._random.uniform(-self._fault.jitter, self._fault.jitter)
        self._queue.append(_Held(data, due, shaped=shaped))
        self._held += len(data)
        if self._held > self.limits.write_buffer:
            self._crowded = True
            self._gate()
        self._schedule()

    def _schedule(self) -> None:
        """Have the pump called when the next piece is due, and not before the loop's next iteration."""
        if self._pump_timer is not None:
            return
        _, at = self._next()
        if at - self._loop.time() < _PRECISION:
            self._pump_timer = self._loop.call_soon(self.attempt, self._pump)
        else:
            self._pump_timer = self._loop.call_at(at, self.attempt, self._pump)

    def _next(self) -> tuple[int, float]:
        """Return the size of the next piece, and its time: with a rate, when the last of its bytes would have come."""
        held, fault = self._queue[0], self._fault
        size = len(held.data)
        if not held.shaped:
            return size, held.due
        if fault.slice is not None:
            size = min(size, fault.slice)
        if fault.rate is None:
            return size, held.due
        if fault.slice is None:
            # Nor so much that the queue is empty before there is more to put into it.
            size = min(size, max(1, min(int(fault.rate * _BURST), self.limits.write_buffer // 8)))
        return size, max(held.due, max(held.due - _BURST, self._free_at) + size / fault.rate)

    def _pump(self) -> None:
        """Write what is due; of slices only one, as uvloop joins the writes of an iteration."""
        self._pump_timer = None
        if not self._queue or self._connected.is_closing():
            return  # released, or lost
        now = self._loop.time()
        while self._queue and not self.paused:
            size, at = self._next()
            held = self._queue[0]
            if at - now >= _PRECISION:
                break
            self._free_at = max(at, now - _CATCH_UP)
            piece, held.data = bytes(held.data[:size]), held.data[size:]
            if not held.data:
                self._queue.popleft()
            self._held -= size
            if self._fault.slice is not None and held.shaped:
                self._write_by_itself(piece)
                break
            self._write(piece)
        if self._crowded and self._held <= self.limits.write_buffer // 4:
            self._crowded = False
            self._gate()
        if self._queue:
            if not self.paused:  # else resume_writing goes on from here
                self._schedule()
        elif self.reason is not None or self._half_closing:
            self._flush()

    def _release(self) -> None:
        """Write all that is held back, now."""
        if self._queue:
            data = b"".join(held.data for held in self._queue)
            self._queue.clear()
            self._held = 0
            self._crowded = False
            self._write(data)

    def _write(self, data: bytes) -> None:
        """Write, unless an earlier write of the same iteration has failed: asyncio logs each further one."""
        if self._connected.is_closing():
            return
        self._written += len(data)
        self._connected.write(data)
        if len(data) > self._large:
            self._pause_if_unsent()

    def _write_by_itself(self, data: bytes) -> None:
        """Write what is to be a segment of its own, also where the kernel has to wait with it."""
        sent = 0
        if kernel.has_tcp_info(self.sock) and self.tls_layer is None and not self.unsent():
            # On Linux, what is sent with this flag is never joined with what follows.
            with contextlib.suppress(OSError):  # the transport will meet it too
                sent = self.sock.send(data, socket.MSG_EOR)
            self._written += sent
        if sent < len(data):
            self._write(data[sent:])

    def _gate(self) -> None:
        """Read, unless something stands against it."""
        if self.reason is not None or self.paused or self._crowded or self._stalled:
            self._connected.pause_reading()
        else:
            self._connected.resume_reading()


class FaultLineSession(FaultSession):
    """A session in mode line that shows a fault. A message is a line with its ending, or an unfinished one at the end."""

    __slots__ = ("_tail",)

    def __init__(
        self,
        sock: socket.socket,
        limits: LimitsSettings,
        shutdown: ShutdownSettings,
        ended: asyncio.Future[None],
        fault: Fault,
        number: int,
    ) -> None:
        super().__init__(sock, limits, shutdown, ended, fault, number)
        self._tail = bytearray()

    def data_received(self, data: bytes) -> None:
        """Take the lines that are whole, one by one."""
        self.received += len(data)
        if self._silent:
            return
        whole, too_long = whole_lines(self._tail, data, self.limits.max_line)
        start = 0
        while end := whole.find(b"\n", start) + 1:
            self._take(whole[start:end])
            start = end
        if too_long:
            self.close("line_too_long")

    def eof_received(self) -> bool:
        """Take the unfinished line for the last message."""
        if tail := bytes(self._tail):
            self._tail.clear()
            self._take(tail)
        return super().eof_received()

    def _flush(self) -> None:
        """Echo the unfinished line as it is, and send FIN; or neither, if the fault has ended the echo."""
        if self._tail and not self._silent:
            self._echo(bytes(self._tail), shaped=False)
        self._tail.clear()
        super()._flush()
