"""A session that shows a fault: the only part of faults that does I/O."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from echod.connection.echo import EchoSession
from echod.connection.faults.framer import LineFramer, ReadFramer
from echod.connection.faults.injector import Injector
from echod.connection.faults.shaper import Shaper
from echod.net import kernel

if TYPE_CHECKING:
    import asyncio
    from typing import Literal

    from echod.connection.faults.profile import FaultProfile
    from echod.connection.outcome import Reason
    from echod.settings.model import LimitsSettings, ShutdownSettings

# Reasons that release all held echo at once: the server stops waiting, or can send nothing more (tls).
_URGENT: frozenset[Reason] = frozenset({"idle", "quiet", "cut", "tls"})

# How often a stalled session checks whether its client has reset the connection, in seconds.
_RESET_CHECK = 1.0


class InjectedFault(Exception):  # noqa: N818  (not an error of echod)
    """Raised by a fault with `action = "raise"`."""


class FaultSession(EchoSession):
    """Echo with a fault.

    A framer divides reads into messages. An injector returns the echo of each message, or ends the echo. A shaper
    holds echo until its time.

    Contact with EchoSession, apart from the counters and flags that it reads:

    - overrides: the methods of the protocol, `begin`, `reconfigure`, `close`, `_flush`, `_send_fin`, `written`, `owed`,
      `undelivered`, `unread` and `fault`;
    - calls: `attempt`, `abort`, `lose`, `client_closed`, `unsent`, `_shut_down` and `_pause_if_unsent`.

    Args:
        sock: a connected socket.
        limits: the limits of the server.
        shutdown: the timeouts of the server's stop.
        ended: done when the connection is closed.
        profile: the fault.
        mode: whether a message is a read or a line.
        number: the connection's number on its listener. With the seed, it makes runs repeatable.

    """

    __slots__ = ("_framer", "_injector", "_loop", "_profile", "_pump_timer", "_shaper", "_timer", "_written")

    def __init__(
        self,
        sock: socket.socket,
        limits: LimitsSettings,
        shutdown: ShutdownSettings,
        ended: asyncio.Future[None],
        profile: FaultProfile,
        mode: Literal["stream", "line"],
        number: int,
    ) -> None:
        super().__init__(sock, limits, shutdown, ended)
        # With uvloop, it would keep the timeout of socket.setdefaulttimeout(), for which `_write_separately` would wait.
        sock.setblocking(False)  # noqa: FBT003  (its only parameter)
        self._profile = profile
        self._loop = ended.get_loop()
        random = profile.new_random(number)
        self._framer = LineFramer() if mode == "line" else ReadFramer(profile.settings.after_bytes or 0)
        self._injector = Injector(profile, random)
        self._shaper = Shaper(profile.settings, random, self._loop.time, limits.high_water_mark)
        self._written = 0
        self._pump_timer: asyncio.Handle | None = None
        self._timer: asyncio.Handle | None = None

    # Called by the transport

    def data_received(self, data: bytes) -> None:
        """Handle the messages in a read."""
        self.received += len(data)
        if self._injector.ended_echo:
            return
        messages, too_long = self._framer.feed(data, self.limits.max_line)
        for message in messages:
            self._handle(message)
        if too_long:
            self.close("line_too_long")

    def resume_writing(self) -> None:
        """Continue to send held echo. Without any, send FIN if it is due: the low-water mark is 0, so all is written."""
        if self._shaper.held:
            self._set_paused(paused=False)
            self._connected.set_write_buffer_limits(high=self._large)
            self._update_reading()
            self._schedule()
        elif self.reason is None and self._has_started("half_close"):
            self._set_paused(paused=False)
            self._half_close()
        else:
            super().resume_writing()
            self._update_reading()

    def eof_received(self) -> bool:
        """Handle an unfinished line, and close. A stalled session has not read the EOF, so it does not close."""
        if message := self._framer.flush():
            self._handle(message)
        self.client_closed()
        if not self._has_started("stall"):
            self.close("fault" if self._has_started("half_close") else "eof")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the final counts, and drop held echo."""
        for timer in (self._pump_timer, self._timer):
            if timer is not None:
                timer.cancel()
        self._pump_timer = self._timer = None
        super().connection_lost(exc)
        self._shaper.drain()

    # Called by the client's task, the timeouts and the drain

    def begin(self) -> None:
        """Start the timer of `after_seconds`."""
        super().begin()
        seconds = self._profile.settings.after_seconds
        if seconds is not None and self.reason is None:
            self._timer = self._loop.call_later(seconds, self.attempt, self._on_time)

    def reconfigure(self, limits: LimitsSettings, shutdown: ShutdownSettings) -> None:
        """Apply new settings. The fault stays as it is."""
        super().reconfigure(limits, shutdown)
        self._shaper.resize(limits.high_water_mark)

    def close(self, reason: Reason) -> None:
        """Close gracefully, after the held echo. An urgent reason sends held echo at once, even while closing."""
        if self._timer is not None:
            self._timer.cancel()
        released = reason in _URGENT and self._shaper.held > 0
        if released:
            self._write(self._shaper.drain())
        if self.reason is None:
            super().close(reason)
        elif released:
            super()._flush()

    def _flush(self) -> None:
        """Echo an unfinished line unless the fault has ended the echo. Send FIN after the held echo."""
        if (data := self._framer.flush()) and not self._injector.ended_echo:
            self._echo(data, shaped=False)
        if not self._shaper.held:
            super()._flush()

    @property
    def written(self) -> int:
        """Number of bytes passed to the transport."""
        return self._written

    @property
    def owed(self) -> int:
        """Number of bytes of echo for the client, held echo included."""
        return self._written + self._shaper.held

    def undelivered(self) -> int:
        """Return the number of bytes held, unsent or unacknowledged. A FIN counts as one."""
        return self._shaper.held + super().undelivered()

    def unread(self) -> bool:
        """Return whether unread data waits in the kernel. A stalled session will not read it, so False."""
        return not self._has_started("stall") and super().unread()

    @property
    def fault(self) -> str | None:
        """The name of the fault, once it has had an effect."""
        return self._profile.name if self._injector.fired else None

    # Actions

    def _handle(self, message: bytes) -> None:
        if self._injector.ended_echo:
            return
        echo = self._injector.decide(message)
        if echo is None:
            self._start_action()
        else:
            self._echo(echo.data * echo.copies, shaped=echo.shaped)
            self._start_action_if_due()

    def _on_time(self) -> None:
        self._injector.reach_time()
        self._start_action_if_due()

    def _start_action_if_due(self) -> None:
        if self._injector.is_due() and not self._connected.is_closing():
            self._start_action()

    def _start_action(self) -> None:
        self._injector.end_echo()
        match self._profile.settings.action:
            case "raise":
                try:
                    msg = f"fault {self._profile.name!r} was triggered"
                    raise InjectedFault(msg)  # noqa: TRY301  (for its traceback)
                except InjectedFault as error:
                    self.failure = error
                self.close("fault")
            case "close":
                self.close("fault")
            case "reset":
                self.abort("fault")
            case "half_close":
                self._flush()
            case "stall":
                self._update_reading()
                self._timer = self._loop.call_later(_RESET_CHECK, self.attempt, self._check_reset)
            case _:
                pass  # blackhole

    def _has_started(self, action: str) -> bool:
        return self._injector.ended_echo and self._profile.settings.action == action

    def _check_reset(self) -> None:
        """Notice the client's reset. A transport that neither reads nor writes does not."""
        if kernel.is_reset(self.sock):
            self.lose()
        else:
            self._timer = self._loop.call_later(_RESET_CHECK, self.attempt, self._check_reset)

    def _send_fin(self) -> None:
        if self.reason is None:
            self._half_close()
        else:
            super()._send_fin()

    def _half_close(self) -> None:
        """Send FIN, and continue to read."""
        if self._shut_down():
            self._update_reading()

    # Sending

    def _echo(self, data: bytes, *, shaped: bool) -> None:
        """Write echo, or hold it back if it is shaped or other echo is held: the order stays."""
        if not data:
            return
        if shaped or self._shaper.held:
            self._shaper.push(data, shaped=shaped)
            if self._shaper.full:
                self._update_reading()
            self._schedule()
        else:
            self._write(data)

    def _schedule(self) -> None:
        """Call the pump at the time of the next piece, in the loop's next iteration at the earliest.

        While writing is paused, do nothing: `resume_writing` calls this again.
        """
        if self._pump_timer is None and not self.paused:
            self._pump_timer = self._loop.call_at(self._shaper.next_due(), self.attempt, self._pump)

    def _pump(self) -> None:
        """Write the pieces that are due."""
        self._pump_timer = None
        if not self._shaper.held or self._connected.is_closing():
            return  # all was released, or the connection is lost
        was_full = self._shaper.full
        for piece in self._shaper.due_pieces():
            if piece.separate:
                self._write_separately(piece.data)
            else:
                self._write(piece.data)
            if self.paused:
                break
        if was_full and not self._shaper.full:
            self._update_reading()
        if self._shaper.held:
            self._schedule()
        elif self.reason is not None or self._has_started("half_close"):
            self._flush()

    def _write(self, data: bytes) -> None:
        """Write, unless an earlier write has failed in this iteration: asyncio logs each further write."""
        if self._connected.is_closing():
            return
        self._written += len(data)
        self._connected.write(data)
        if len(data) > self._large:
            self._pause_if_unsent()

    def _write_separately(self, data: bytes) -> None:
        """Write data as a segment of its own, even if the kernel cannot send it at once."""
        sent = 0
        if kernel.has_tcp_info(self.sock) and self.tls_layer is None and not self.unsent():
            # Linux never merges data sent with MSG_EOR with later data.
            with contextlib.suppress(OSError):  # the transport gets the same error
                sent = self.sock.send(data, socket.MSG_EOR)
            self._written += sent
        if sent < len(data):
            self._write(data[sent:])

    def _update_reading(self) -> None:
        """Pause or resume reading."""
        if self.reason is not None or self.paused or self._shaper.full or self._has_started("stall"):
            self._connected.pause_reading()
        else:
            self._connected.resume_reading()
