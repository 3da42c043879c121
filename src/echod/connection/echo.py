"""The session: echo one client's bytes, then close without losing any.

How it works:

A session is the protocol of one transport. `data_received` counts the bytes, writes them and makes one comparison.
Nothing else runs per message: no task, no timer, no clock. The timeouts, the status page and the drain read the
session's counters and its `phase` when they need them.

Backpressure: above the high-water mark, the transport calls `pause_writing`, and the session stops reading.

A connection ends in one of these ways. Each has one `reason`; `connection.outcome` has its meaning.

- `close` loses nothing. The session stops reading, writes the rest of its echo (FLUSHING) and sends FIN. Then a
  `Linger` takes its place at the transport (LINGERING). It discards input until the client has everything. Without
  it, close(2) would answer unread input with RST, and RST destroys echo that is on its way.
- `abort` resets the connection at once.
- `reject` refuses a client: with a graceful close, or at once if there is no transport yet.
- The client or the network ends the connection. The transport reports that.

`connection_lost` asks the kernel how much arrived, and then completes `ended`, even if that fails. If a defect ended
the connection, `ended` holds the exception.

The transport calls some steps, and their exceptions end the connection. All other steps go through `attempt`: timers,
and each client's turn in a loop over clients.

A PROXY header or a TLS handshake may come first. `HeaderReader` and `TlsLayer` stand before the session then. They
call its methods; the session alone changes its `phase`. A session has its transport from the start, so it can be
ended in each of these phases.

Other modes and faults override these hooks: `data_received`, `begin`, `_flush`, `written`, `owed`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Protocol, cast

from echod.clock import Clock
from echod.connection.errors import describe, is_defect, is_from_network
from echod.connection.linger import Linger
from echod.connection.outcome import MEANINGS
from echod.connection.state import Delivery, Phase
from echod.net import kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from echod.connection.outcome import Reason
    from echod.connection.state import TlsFacts
    from echod.settings.model import LimitsSettings, ShutdownSettings


class SecureTransport(Protocol):
    """The part of an encrypting transport that a session uses, besides the methods of every transport."""

    @property
    def written(self) -> int:
        """The number of bytes of ciphertext written so far."""

    def close_notify(self) -> None:
        """Tell the client that no more data follows."""

    def plaintext(self, ciphertext: int) -> int:
        """Return how much plaintext the first N bytes of ciphertext hold."""


class EchoSession(asyncio.Protocol):
    """Echo everything that one client sends (RFC 862).

    Args:
        sock: a connected socket.
        limits: the limits of the server.
        shutdown: the timeouts of the server's stop.
        ended: a future that the session completes when the connection is closed.

    """

    __slots__ = (
        "_delivered",
        "_dropped",
        "_fin_sent",
        "_large",
        "_report",
        "delivery",
        "detail",
        "discarded",
        "ended",
        "eof",
        "failure",
        "limits",
        "overhead_bytes",
        "paused",
        "phase",
        "reason",
        "received",
        "shutdown",
        "sock",
        "tcp_info",
        "tls",
        "tls_layer",
        "transport",
    )

    def __init__(
        self, sock: socket.socket, limits: LimitsSettings, shutdown: ShutdownSettings, ended: asyncio.Future[None]
    ) -> None:
        self.sock = sock
        self.limits = limits
        self.shutdown = shutdown
        self.ended = ended
        self.phase = Phase.CONNECTING
        self.reason: Reason | None = None
        """Set as soon as the session begins to end."""
        self.detail = ""
        self.failure: Exception | None = None
        self.transport: asyncio.Transport | None = None
        self.tls_layer: SecureTransport | None = None
        self.tls: TlsFacts | None = None
        self.received = 0
        self.discarded = 0
        self.overhead_bytes = 0
        """Bytes of the PROXY header and of TLS."""
        self.paused = False
        """Whether the write buffer is above its high-water mark, so that reading is paused."""
        self.eof = False
        """Whether the client has closed its direction."""
        self.delivery: Delivery | None = None
        self.tcp_info: kernel.TcpInfo | None = None
        self._large = limits.high_water_mark
        self._report: Callable[[str], object] = _ignore
        self._fin_sent = False
        self._delivered = False
        self._dropped = 0

    # The transport calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Open the session, unless it was ended while the loop made the transport."""
        transport = cast("asyncio.Transport", transport)  # uvloop's transports do not inherit from it
        self.transport = transport
        try:
            transport.set_write_buffer_limits(high=self._large)
            if self.phase is Phase.CONNECTING:
                self.begin()
            elif self.phase is Phase.FLUSHING:
                self._stop_reading()
            elif self.phase is Phase.CLOSED:
                self._reset()
        except Exception as error:  # noqa: BLE001  (asyncio and uvloop would keep the connection open and unread)
            self.fail(error)

    def _open(self) -> None:
        self.phase = Phase.OPEN
        self._report("open")

    def data_received(self, data: bytes) -> None:
        """Echo. A message costs nothing besides this method and the transport's work."""
        size = len(data)
        self.received += size
        self.transport.write(data)  # type: ignore[union-attr]  # set in connection_made
        if size > self._large:
            self._pause_if_unsent()

    def pause_writing(self) -> None:
        """Stop reading from a client that does not read its echo."""
        self._set_paused(paused=True)
        self._connected.pause_reading()

    def resume_writing(self) -> None:
        """Read again. While closing, send FIN: the high-water mark is 0 then, so everything is written."""
        self._set_paused(paused=False)
        if self.reason is None:
            self._connected.set_write_buffer_limits(high=self._large)
            self._connected.resume_reading()
        else:
            # Later: asyncio's transport, which is calling, would report the end twice if it were closed here.
            self.ended.get_loop().call_soon(self.attempt, self._send_fin)

    def _set_paused(self, *, paused: bool) -> None:
        self.paused = paused
        if self.reason is None:  # otherwise it has stopped reading for good
            self._report("paused" if paused else "resumed")

    def eof_received(self) -> bool:
        """Close after the echo: a client that has closed its direction still reads."""
        self.client_closed()
        self.close("eof")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the final counts while the socket is still open, and complete `ended`. Idempotent."""
        if self.delivery is not None:
            return
        self.phase = Phase.CLOSED
        try:
            if exc is not None:
                self._derive_reason(exc)
            unsent = self._record_delivery(broken=exc is not None)
            if self.reason == "io_error" and exc is not None:
                self._explain(exc, unsent=unsent)
        except Exception as error:  # noqa: BLE001  (`ended` must be completed, and holds the error)
            self.reason, self.failure = "failed", error
            self.delivery = Delivery(self.received, 0, 0, self.discarded)
        self.tls_layer = None  # breaks a reference cycle
        self.transport = None
        if self.ended.done():  # cancelled when the loop was stopped
            return
        if self.failure is not None:
            self.ended.set_exception(self.failure)
        else:
            self.ended.set_result(None)

    # The PROXY header, TLS and the linger report to the session by these

    def use_tls(self, layer: SecureTransport) -> None:
        """Let this layer translate the kernel's counts of ciphertext."""
        self.tls_layer = layer

    def expect(self, phase: Phase) -> None:
        """Wait for a PROXY header or a TLS handshake before the payload."""
        if self.phase < Phase.FLUSHING:
            self.phase = phase
            self._report(phase.name.lower())

    def established(self, facts: TlsFacts) -> None:
        """Record the result of the TLS handshake; further data is payload."""
        self.tls = facts
        self.begin()

    def begin(self) -> None:
        """Mark the preamble as done; further data is payload."""
        if self.phase < Phase.OPEN:
            self._open()

    def take_over(self, rest: bytes) -> None:
        """Continue after the PROXY header, with the data that was read after it."""
        self.begin()
        if rest:
            self.data_received(rest)

    def client_closed(self) -> None:
        """Record that the client closed its direction."""
        self.eof = True
        self._report("half_closed")

    def count_overhead(self, size: int) -> None:
        """Count bytes of a PROXY header or of TLS."""
        self.overhead_bytes += size

    def count_unechoed(self, size: int) -> None:
        """Count payload that was received and cannot be echoed, because TLS has failed."""
        self.received += size

    def count_discarded(self, size: int) -> None:
        """Count bytes that are not echoed by design."""
        self.discarded += size

    def lose(self) -> None:
        """Record that the client or the network ended the connection, if no transport reports it."""
        if self.reason is None or (MEANINGS[self.reason].is_clean and MEANINGS[self.reason].outcome != "completed"):
            self.reason = "reset"
        transport = self._connected
        self.connection_lost(ConnectionResetError())
        transport.abort()

    # The server, the client's task, the timeouts and the drain call these

    def report_to(self, report: Callable[[str], object]) -> None:
        """Call this function with the name of each state that the session enters."""
        self._report = report

    def attempt(self, step: Callable[..., object], *arguments: object) -> None:
        """Run one step for this client. If it raises, reset the connection; see `fail`."""
        try:
            step(*arguments)
        except Exception as error:  # noqa: BLE001  (the client's task raises it)
            self.fail(error)

    def reconfigure(self, limits: LimitsSettings, shutdown: ShutdownSettings) -> None:
        """Apply other settings from now on."""
        self.limits, self.shutdown = limits, shutdown
        self._large = limits.high_water_mark
        if self.transport is not None and self.reason is None and not self.paused:
            self.transport.set_write_buffer_limits(high=self._large)

    def close(self, reason: Reason) -> None:
        """Close without losing echo. Does nothing if the session is already ending."""
        if self.reason is not None:
            return
        self.reason, self.phase = reason, Phase.FLUSHING
        self._report("flushing")
        if self.transport is not None:  # else connection_made continues
            self._stop_reading()

    def abort(self, reason: Reason) -> None:
        """Reset the connection now. Echo that the client does not have is lost, and counted."""
        if self.ended.done():
            return
        self.reason, self.phase = reason, Phase.CLOSED
        if self.transport is not None:  # else connection_made continues
            self._reset()

    def reject(self, reason: Reason, detail: str = "") -> None:
        """Refuse the client, and record why. Does nothing if the session is already ending."""
        if self.transport is None:
            self.reason, self.detail = reason, detail
            self.connection_lost(None)
            self.sock.close()
        elif self.reason is None:
            self.detail = detail
            self.close(reason)

    def fail(self, error: Exception) -> None:
        """Reset the connection because of a failure on this host. If it is a defect, `ended` then holds it.

        A failed system call, such as epoll_ctl(2) of asyncio's transport, is not a defect, and nor is a lack of memory.
        """
        if is_defect(error):
            self.failure = error
            self.abort("failed")
        else:
            self.detail = describe("system call", error)
            self.abort("io_error")

    def stop_lingering(self) -> None:
        """Close now. If the write buffer still has echo, reset the connection instead.

        After close(2), the kernel sends its own buffer, unless the client sends more.
        """
        if self.unsent():
            self.abort("aborted")
        elif self.transport is not None:
            self.transport.close()

    def renew_ended(self) -> None:
        """Replace `ended` after it was cancelled together with the task that awaited it."""
        self.ended = self.ended.get_loop().create_future()

    def abandon(self) -> None:
        """End an aborted session if its transport does not report the end. This is the last resort of a stop."""
        msg = "the transport did not report the end of the connection"
        self.connection_lost(RuntimeError(msg))

    @property
    def bytes_seen(self) -> int:
        """A number that grows with everything that the client sends."""
        return self.received + self.overhead_bytes

    @property
    def written(self) -> int:
        """The number of bytes that the session has written to its transport."""
        return self.received

    @property
    def owed(self) -> int:
        """The number of bytes of echo that the client must get in all, including held echo."""
        return self.written

    def unsent(self) -> int:
        """Return the number of bytes in the write buffer, which the kernel has not taken yet."""
        return self.transport.get_write_buffer_size() if self.transport is not None else 0

    def undelivered(self) -> int:
        """Return the number of bytes written and not acknowledged. FIN counts as one."""
        if self.transport is None:
            return 0
        return self.transport.get_write_buffer_size() + self.unacknowledged()

    def unacknowledged(self) -> int:
        """Return the number of bytes in the kernel that are not acknowledged. FIN counts as one.

        If the kernel refuses the figure, it is 1 while the connection exists. Then a close waits for its timeout.
        """
        try:
            return kernel.unacknowledged(self.sock)
        except OSError:
            return int(not kernel.is_reset(self.sock))

    def unread(self) -> bool:
        """Return whether the kernel has input for this session: bytes, FIN or RST."""
        return kernel.readable(self.sock)

    @property
    def fault(self) -> str | None:
        """The name of the fault that this session has shown."""
        return None

    # Ending

    @property
    def _connected(self) -> asyncio.Transport:
        assert self.transport is not None
        return self.transport

    def _pause_if_unsent(self) -> None:
        """Pause reading after a read larger than the write buffer if any of it is unsent.

        The transport keeps the whole read in memory until its last byte is sent, but counts only the unsent bytes.
        """
        if not self.paused and self._connected.get_write_buffer_size():
            self._connected.set_write_buffer_limits(high=0)

    def _stop_reading(self) -> None:
        self._connected.pause_reading()
        self._flush()

    def _flush(self) -> None:
        """Send FIN as soon as everything is written. A session that holds echo back writes it first."""
        if self.tls_layer is not None:
            self.tls_layer.close_notify()
        if self._connected.get_write_buffer_size():
            self._connected.set_write_buffer_limits(high=0)  # resume_writing continues
        else:
            self.attempt(self._send_fin)

    def _send_fin(self) -> None:
        if self.transport is None or self.transport.is_closing():
            return  # aborted or reset in the meantime
        if self.eof and self._has_arrived():
            # No input can follow and nothing is on its way, so close(2) may send FIN: it can destroy nothing.
            self._delivered = True
            self.phase = Phase.CLOSED
            self.transport.close()
        elif self._fin_sent or self._shut_down():
            self.phase = Phase.LINGERING
            self._report("lingering")
            Linger(self, self.transport, Clock(self.ended.get_loop().time))

    def _has_arrived(self) -> bool:
        """Return whether the client has acknowledged all of its echo, and keep the TCP_INFO that says so.

        Over TLS, our close_notify may still be on its way. The kernel goes on sending it after close(2).
        """
        try:
            info = kernel.tcp_info(self.sock)
        except OSError:
            info = None
        if info is None:
            return not self.unacknowledged()
        if self._arrived(info.acked) < self.written:
            return False
        self.tcp_info = info
        return True

    def _arrived(self, size: int) -> int:
        """Return how many bytes of echo the first N bytes of the TCP connection hold."""
        return size if self.tls_layer is None else self.tls_layer.plaintext(size)

    def _shut_down(self) -> bool:
        """Send FIN. Return False if that fails, which ends the session."""
        # shutdown(2) instead of write_eof(): the write buffer is empty, and uvloop would send FIN one iteration later.
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            if is_from_network(error):  # ENOTCONN: the client's reset arrived first
                self.lose()
            else:
                self.detail = describe("shutdown", error)
                self.abort("io_error")
            return False
        self._fin_sent = True
        return True

    def _reset(self) -> None:
        self._dropped = self.unsent()  # asyncio's transport has emptied its buffer when it reports the end
        self._reset_on_close()
        self._connected.abort()

    def _reset_on_close(self) -> None:
        with contextlib.suppress(OSError):  # the connection must be closed in any case
            kernel.reset_on_close(self.sock)

    def _derive_reason(self, error: Exception) -> None:
        """Derive the reason from an error that a transport reports."""
        if is_defect(error):
            self.reason, self.failure = "failed", error
        elif is_from_network(error):
            self.reason = self.reason or "reset"
        elif self.reason is None or MEANINGS[self.reason].is_clean:
            self.reason = "io_error"
        # FIN would tell the client that its echo is complete. A host that is unreachable now may be back soon.
        self._reset_on_close()

    def _explain(self, error: Exception, *, unsent: bool) -> None:
        """Name the failed system call. The transports do not: if anything is unsent, it was a write."""
        if self.transport is None:
            call = "system call"  # of the loop, while it made the transport
        elif self.tcp_info is None:
            call = "read or write"  # it is unknown whether asyncio's transport had unsent echo
        else:
            call = "write" if unsent else "read"
        self.detail = describe(call, error)

    def _count(self) -> int | None:
        """Take the kernel's counters of one moment. Return the unacknowledged bytes, or None if they are unknown."""
        if self._delivered and self.tcp_info is not None:
            return 0
        waiting = 0 if self._delivered else None
        failure: Exception | None = None
        try:
            if waiting is None:
                waiting = kernel.unacknowledged(self.sock)
        except (OSError, ValueError) as error:  # ValueError: the loop has closed the socket
            failure = error
        try:
            self.tcp_info = kernel.tcp_info(self.sock)
            # An acknowledgement between the two calls would be in both figures.
            while waiting and waiting != (now := kernel.unacknowledged(self.sock)):
                waiting = now
                self.tcp_info = kernel.tcp_info(self.sock)
        except (OSError, ValueError) as error:
            failure = failure or error
        if failure is not None:
            self.detail = self.detail or f"sent and acked are estimates: {failure}"
        return waiting

    def _record_delivery(self, *, broken: bool) -> bool:
        """Take the final figures. Return whether the kernel has not taken everything that was written."""
        written = self.written if self.tls_layer is None else self.tls_layer.written
        unacknowledged = self._count()
        if self.tcp_info is None or unacknowledged is None:
            sent = written - max(self.unsent(), self._dropped)
        else:
            # Not the transport's counts: asyncio's transport drops its buffer before it reports a reset.
            sent = max(0, self.tcp_info.acked + unacknowledged - self._fin_sent)
        if self.tcp_info is None:  # a unix socket, or another system than Linux
            # After a reset the kernel does not know how much the client had not read, and asyncio's transport does
            # not know how much it had not sent.
            acked = 0 if broken or unacknowledged is None else max(0, sent - unacknowledged)
        else:
            acked = min(self.tcp_info.acked, sent)
        self.delivery = Delivery(self.received, self._arrived(sent), self._arrived(acked), self.discarded)
        # The acknowledgements alone decide. A client that has all of its echo may reset: over TLS, a client that does
        # not wait for our close_notify does (RFC 8446, section 6.1).
        if self.reason in {"eof", "info"} and not self._delivered and self.delivery.acked < self.owed:
            self.reason = "reset" if broken else "undelivered"
        return sent < written


def _ignore(state: str) -> None:
    """Report a state to nothing. The log is not at level debug."""
