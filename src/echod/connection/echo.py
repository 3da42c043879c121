"""One client's bytes: the hot path, and the close that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from echod.clock import Clock
from echod.connection.outcome import MEANINGS
from echod.net import kernel

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from echod.connection.outcome import Reason
    from echod.connection.tls import TlsFacts, TlsLayer

Stage = Literal["proxy_header", "handshake"]

# Errors of a connected socket that report the network or the peer: RST, timeouts and the errors of ICMP messages
# (tcp(7), ip(7)). All other errors report this host.
_NETWORK_ERRORS = frozenset(
    {
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.EPIPE,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EMSGSIZE,
        errno.EACCES,
    }
)

# The poll of a lingering connection: the kernel has no event for "all is acknowledged".
_FIRST_POLL = 0.002
_LAST_POLL = 0.1


class SessionSettings(NamedTuple):
    """What a session takes of the settings."""

    write_buffer: int
    """High-water mark, bytes: above it reading pauses, to go on at a quarter of it."""
    linger_timeout: float
    """Seconds without progress after our FIN until the connection is closed."""
    max_line: int = 65536
    """Bytes of a line with its ending, in mode line."""


class Delivery(NamedTuple):
    """How far one client's echo got, in bytes; over TLS those inside of it, but for what was discarded."""

    received: int
    """Read from the client, to be echoed."""
    sent: int
    """Taken by the kernel for sending."""
    acked: int
    """Acknowledged by the client's kernel."""
    discarded: int
    """Read after our FIN, and not echoed."""


class EchoSession(asyncio.Protocol):
    """Return to one client what it sends (RFC 862).

    The session ends in one of three ways, each with one `reason`:

    - `close`: stop reading, write out what was read, send FIN, then discard what still comes until the client has
      everything and has closed too, or `linger_timeout` passes without progress. Closing at once instead would
      answer unread input with RST, which destroys echo that is on its way.
    - `abort`: RST at once.
    - the client resets the connection.

    `ended` is done when the connection is closed, whatever fails on the way. It holds an exception if a defect ended it.

    Every step that no transport calls goes through `attempt`: timers, and each client's turn in a loop over clients.

    Before the first byte of the client's own, a connection may have a PROXY header and a TLS handshake to come: its
    `stage`. The session has its transport already then, and can be ended in each of these ways.
    """

    __slots__ = (
        "_delivered",
        "_dropped",
        "_fin_sent",
        "_large",
        "_lost",
        "delivery",
        "detail",
        "discarded",
        "ended",
        "eof",
        "failure",
        "overhead_bytes",
        "paused",
        "reason",
        "received",
        "settings",
        "sock",
        "stage",
        "tcp_info",
        "tls",
        "tls_layer",
        "transport",
    )

    def __init__(self, sock: socket.socket, settings: SessionSettings, ended: asyncio.Future[None]) -> None:
        self.sock = sock
        self.settings = settings
        self._large = settings.write_buffer
        self._fin_sent = False
        self._delivered = False
        self._lost = False
        self._dropped = 0
        self.ended = ended
        self.transport: asyncio.Transport | None = None
        self.received = 0
        self.overhead_bytes = 0
        """Bytes read of a PROXY header and of TLS, whatever they hold."""
        self.discarded = 0
        self.paused = False
        self.eof = False
        self.stage: Stage | None = None
        self.reason: Reason | None = None
        self.detail = ""
        self.tls_layer: TlsLayer | None = None
        self.tls: TlsFacts | None = None
        self.failure: Exception | None = None
        self.delivery: Delivery | None = None
        self.tcp_info: kernel.TcpInfo | None = None

    def __call__(self) -> Self:
        """Be the protocol factory of oneself: a session exists before its transport."""
        return self

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start echoing, unless the session was ended while the transport was being made."""
        transport = cast("asyncio.Transport", transport)  # uvloop's are none by inheritance
        self.transport = transport
        transport.set_write_buffer_limits(high=self.settings.write_buffer)
        if (reason := self.reason) is not None:
            self.reason = None
            # asyncio and uvloop let an exception of this method leave the connection open and unread.
            self.attempt(self.abort if reason in {"aborted", "failed"} else self.close, reason)

    def data_received(self, data: bytes) -> None:
        """Echo. This method and the transport under it are all that a message costs."""
        size = len(data)
        self.received += size
        self.transport.write(data)  # type: ignore[union-attr]  # set in connection_made
        if size > self._large:
            self._pause_if_unsent()

    def pause_writing(self) -> None:
        """Stop reading from a client that does not read its echo."""
        self.paused = True
        self._connected.pause_reading()

    def resume_writing(self) -> None:
        """Read again; or, once the session is finished, send FIN: its mark is 0, so all is written."""
        self.paused = False
        if self.reason is None:
            self._connected.set_write_buffer_limits(high=self.settings.write_buffer)
            self._connected.resume_reading()
        else:
            # Not now: asyncio's transport, which is calling, would report the end twice if it were closed here.
            self.ended.get_loop().call_soon(self.attempt, self._send_fin)

    def eof_received(self) -> bool:
        """Go on writing to a client that has closed its own direction."""
        self.eof = True
        self.close("eof")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the final counts, while the socket is still open, and report the end. Idempotent."""
        if self.delivery is not None:
            return
        try:
            if exc is not None:
                self._blame(exc)
            self._record_delivery(broken=exc is not None or self._lost)
            if self.reason == "io_error" and exc is not None:
                self._explain(exc)
        except Exception as error:  # noqa: BLE001  (`ended` has to be done, and holds it)
            self.reason, self.failure = "failed", error
            self.delivery = Delivery(self.received, 0, 0, self.discarded)
        self.tls_layer = None  # a reference cycle otherwise
        self.transport = None
        if self.ended.done():  # cancelled at the end of the loop
            return
        if self.failure is not None:
            self.ended.set_exception(self.failure)
        else:
            self.ended.set_result(None)

    # What the client's life calls

    def attempt(self, step: Callable[..., object], *arguments: object) -> None:
        """Run one step for this client. If it raises, reset the client and let `ended` hold the exception."""
        try:
            step(*arguments)
        except Exception as error:  # noqa: BLE001  (it comes out of the client's task)
            self.fail(error)

    def reconfigure(self, settings: SessionSettings) -> None:
        """Go by other settings from now on."""
        self.settings = settings
        self._large = settings.write_buffer
        if self.transport is not None and self.reason is None and not self.paused:
            self.transport.set_write_buffer_limits(high=settings.write_buffer)

    def begin(self) -> None:
        """Be told that what comes from now on is the client's own."""
        self.stage = None

    def reject(self, reason: Reason, detail: str) -> None:
        """Close a connection that has no transport yet, without reading a byte of it."""
        self.reason, self.detail = reason, detail
        self.connection_lost(None)
        self.sock.close()

    def close(self, reason: Reason) -> None:
        """Begin the close that loses nothing; without effect on a session that is ending already."""
        if self.reason is not None:
            return
        self.reason = reason
        if self.transport is None:
            return  # connection_made goes on from here
        self.transport.pause_reading()
        self.conclude()

    def conclude(self) -> None:
        """Send FIN behind all that was written."""
        if self.tls_layer is not None:
            self.tls_layer.close_notify()
        if self._connected.get_write_buffer_size():
            self._connected.set_write_buffer_limits(high=0)  # resume_writing goes on from here
        else:
            self.attempt(self._send_fin)

    def abort(self, reason: Reason) -> None:
        """Reset the connection now; what the client has not got is lost, and counted."""
        if self.ended.done():
            return
        self.reason = reason
        if self.transport is None:
            return  # connection_made goes on from here
        self._dropped = self.unsent()  # asyncio's transport will have emptied its buffer when it reports the end
        self._reset_on_close()
        self.transport.abort()

    def lose(self) -> None:
        """End a session whose connection the peer or the network has ended, if no transport reports that."""
        self._lost = True
        if self.reason is None or (MEANINGS[self.reason].is_clean and MEANINGS[self.reason].outcome != "completed"):
            self.reason = "reset"
        self._dropped = self.unsent()
        self._connected.abort()

    def abandon(self) -> None:
        """Report the end of an aborted session whose transport does not: the last resort of a stop."""
        msg = "the transport did not report the end of the connection"
        self.connection_lost(RuntimeError(msg))

    def fail(self, error: Exception) -> None:
        """Reset the connection for a failure of our own, which `ended` then holds."""
        self.failure = error
        self.abort("failed")

    def end(self) -> None:
        """Stop lingering: reset a client that left echo in our write buffer, close all others.

        What the kernel holds by then it goes on sending after the close, if the client sends nothing more.
        """
        if self.unsent():
            self.abort("aborted")
        elif self.transport is not None:
            self.transport.close()

    @property
    def bytes_seen(self) -> int:
        """A number that grows whenever something comes from the client."""
        return self.received + self.overhead_bytes

    @property
    def written(self) -> int:
        """How many bytes were given to the transport so far."""
        return self.received

    @property
    def owed(self) -> int:
        """Return how many bytes of echo the client has to get in all, those still held back included."""
        return self.written

    def unsent(self) -> int:
        """Return the number of bytes written and not yet taken by the kernel."""
        return self.transport.get_write_buffer_size() if self.transport is not None else 0

    def undelivered(self) -> int:
        """Return the number of bytes written and not yet acknowledged, a FIN counting as one."""
        if self.transport is None:
            return 0
        return self.transport.get_write_buffer_size() + kernel.unacknowledged(self.sock)

    def unread(self) -> bool:
        """Return whether the client has sent something, FIN included, that this session is still to read."""
        return kernel.readable(self.sock)

    @property
    def fault(self) -> str | None:
        """The name of the fault that this session has shown, if it has."""
        return None

    # How it ends

    @property
    def _connected(self) -> asyncio.Transport:
        assert self.transport is not None
        return self.transport

    def _pause_if_unsent(self) -> None:
        """Pause reading after a read larger than the write buffer, if any of it is unsent.

        The transport keeps all of what it read in memory until the last byte is sent, and counts only what is unsent.
        """
        if not self.paused and self._connected.get_write_buffer_size():
            self._connected.set_write_buffer_limits(high=0)

    def _send_fin(self) -> None:
        if self.transport is None or self.transport.is_closing():
            return  # aborted or reset meanwhile
        if self.eof and not kernel.unacknowledged(self.sock):
            # Nothing can come any more and nothing is on its way, so the close's own FIN can destroy nothing.
            self._delivered = True
            self.transport.close()
        elif self._fin_sent or self._shut_down():
            Linger(self, self.transport)

    def _shut_down(self) -> bool:
        """Send FIN. Return False if that fails, which has ended the session then."""
        # By the socket, not by write_eof(): the write buffer is empty, and uvloop would send it an iteration later.
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            if _is_from_network(error):  # ENOTCONN: the client's reset arrived first
                self.lose()
            else:
                self.detail = _describe("shutdown", error)
                self.abort("io_error")
            return False
        self._fin_sent = True
        return True

    def _reset_on_close(self) -> None:
        with contextlib.suppress(OSError):  # the connection has to be closed all the same
            kernel.reset_on_close(self.sock)

    def _blame(self, error: Exception) -> None:
        """Derive the reason from an error that a transport reports."""
        # An error of OpenSSL's is an OSError too, and is a defect here.
        if not isinstance(error, OSError) or isinstance(error, ssl.SSLError):
            self.reason, self.failure = "failed", error
        elif _is_from_network(error):
            self._lost = True
            self.reason = self.reason or "reset"
            return
        elif self.reason is None or MEANINGS[self.reason].is_clean:
            self.reason = "io_error"
        # FIN would tell the client that it has all of its echo.
        self._reset_on_close()

    def _explain(self, error: Exception) -> None:
        """Name the system call that failed. The transports do not: echo left unsent means that it was a write."""
        assert isinstance(error, OSError)
        assert self.delivery is not None
        call = "write" if self.delivery.sent < self.written else "read"
        # Without TCP_INFO it is not known whether asyncio's transport had unsent echo.
        self.detail = _describe(call if self.tcp_info is not None else "read or write", error)

    def _record_delivery(self, *, broken: bool) -> None:
        written = self.written if self.tls_layer is None else self.tls_layer.written
        waiting = 0 if self._delivered else written
        try:
            if not self._delivered:
                waiting = kernel.unacknowledged(self.sock)
            self.tcp_info = kernel.tcp_info(self.sock)
        except (OSError, ValueError) as error:  # ValueError: the loop has closed the socket
            self.detail = self.detail or f"sent and acked are estimates: {error}"
        if self.tcp_info is None:  # a unix socket, or no Linux
            sent = written - max(self.unsent(), self._dropped)
            # A client that resets may have left anything unread, and the kernel has forgotten how much. asyncio's
            # transport has forgotten too how much it had not sent.
            acked = 0 if broken else max(0, sent - waiting)
        else:
            # Not the transport's figures: asyncio's drops its buffer before it reports a reset.
            sent = max(0, self.tcp_info.acked + waiting - self._fin_sent)
            acked = min(self.tcp_info.acked, sent)
        if self.tls_layer is not None:
            sent, acked = self.tls_layer.plaintext(sent), self.tls_layer.plaintext(acked)
        self.delivery = Delivery(self.received, sent, acked, self.discarded)
        # Decided by the acknowledgements alone. A client that has all of its echo may reset then: over TLS, one that
        # closes without waiting for our close_notify does (RFC 8446, section 6.1).
        if self.reason == "eof" and not self._delivered and acked < self.owed:
            self.reason = "reset" if self._lost else "undelivered"


def _is_from_network(error: OSError) -> bool:
    return isinstance(error, ConnectionError) or error.errno in _NETWORK_ERRORS


def _describe(call: str, error: OSError) -> str:
    return f"{call}: {errno.errorcode.get(error.errno or 0, str(error))}"


class Linger(asyncio.Protocol):
    """A connection after our FIN: takes the session's place at the transport and closes it in time.

    Discards what comes, and closes at the client's EOF with nothing unacknowledged, or when `linger_timeout` passes
    in which the number of unacknowledged bytes did not fall.
    """

    __slots__ = ("_clock", "_expiry", "_least", "_loop", "_poll_after", "_timer", "_transport", "session")

    def __init__(self, session: EchoSession, transport: asyncio.Transport) -> None:
        self.session = session
        self._transport = transport
        self._loop = session.ended.get_loop()
        self._least = kernel.unacknowledged(session.sock)
        self._clock = Clock(self._loop.time)
        self._expiry = self._clock.time() + session.settings.linger_timeout
        self._poll_after = _FIRST_POLL
        self._schedule(self._poll_after)
        transport.set_protocol(self)
        if not session.eof:
            transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Count and drop."""
        self.session.discarded += len(data)

    def eof_received(self) -> bool:
        """Close, or wait on for the acknowledgement of our last bytes."""
        self.session.eof = True
        self.session.attempt(self._close_if_acknowledged)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Hand the end over to the session."""
        self._timer.cancel()
        self.session.connection_lost(exc)

    def _schedule(self, seconds: float) -> None:
        self._clock.announce(seconds)
        self._timer = self._loop.call_later(seconds, self.session.attempt, self._poll)

    def _close_if_acknowledged(self) -> None:
        if not kernel.unacknowledged(self.session.sock):
            self._transport.close()

    def _poll(self) -> None:
        # In this order: a connection that is gone may have ended well, and what it leaves then changes no more.
        gone = self.session.eof and kernel.is_reset(self.session.sock)
        left = kernel.unacknowledged(self.session.sock)
        now = self._clock.time()
        if left < self._least:
            self._least = left
            self._expiry = now + self.session.settings.linger_timeout
        if self.session.eof and not left:
            self._transport.close()
        elif gone:
            # The transport stopped polling the socket at its EOF, so nobody else will notice.
            self.session.lose()
        elif now >= self._expiry and not (self._clock.late and self.session.unread()):
            self._transport.close()
        else:
            self._poll_after = min(2 * self._poll_after, _LAST_POLL)
            # With nothing left to be acknowledged only the client's EOF is waited for, and that is an event.
            delay = min(self._poll_after, self._expiry - now) if left else self._expiry - now
            self._schedule(max(delay, _FIRST_POLL))
