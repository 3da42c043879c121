"""One client's bytes: the hot path, and the close that loses nothing."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from echod import kernel
from echod.clock import Clock

if TYPE_CHECKING:
    from typing import Self

    from echod.tls_layer import TlsFacts, TlsLayer

Reason = Literal[
    "eof",
    "reset",
    "idle",
    "stalled",
    "handshake",
    "tls",
    "proxy_header",
    "client_limit",
    "line_too_long",
    "info",
    "quiet",
    "cut",
    "aborted",
    "fault",
    "failed",
]

Stage = Literal["proxy_header", "handshake"]

# Ends for which a client is not to blame.
_NO_FAULTS = frozenset({"eof", "idle", "quiet", "cut"})

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

    - `finish`: stop reading, write out what was read, send FIN, then discard what still comes until the client has
      everything and has closed too, or `linger_timeout` passes without progress. Closing at once instead would
      answer unread input with RST, which destroys echo that is on its way.
    - `abort`: RST at once.
    - the client resets the connection.

    `ended` is done when the connection is closed; it holds an exception when that was no fault of the network's.

    Before the first byte of the client's own, a connection may have a PROXY header and a TLS handshake to come: its
    `stage`. The session has its transport already then, and can be ended in each of these ways.
    """

    __slots__ = (
        "_delivered",
        "_dropped",
        "_fin_sent",
        "_large",
        "delivery",
        "detail",
        "discarded",
        "ended",
        "eof",
        "failure",
        "framing",
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
        self._dropped = 0
        self.ended = ended
        self.transport: asyncio.Transport | None = None
        self.received = 0
        self.framing = 0
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
            if reason == "aborted":
                self.abort(reason)
            else:
                self.finish(reason)

    def data_received(self, data: bytes) -> None:
        """Echo. This method and the transport under it are all that a message costs."""
        size = len(data)
        self.received += size
        self.transport.write(data)  # type: ignore[union-attr]  # set in connection_made
        if size > self._large:
            self._weigh()

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
            self.ended.get_loop().call_soon(self._send_fin)

    def eof_received(self) -> bool:
        """Go on writing to a client that has closed its own direction."""
        self.eof = True
        self.finish("eof")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the final counts, while the socket is still open, and report the end."""
        # An error of OpenSSL's is an OSError too, and is no fault of the network's.
        if isinstance(exc, OSError) and not isinstance(exc, ssl.SSLError):
            if self.reason in {None, "eof"}:
                self.reason = "reset"
        elif exc is not None:
            self.reason, self.failure = "failed", exc
        self._settle()
        self.transport = None
        if self.ended.cancelled():  # by the end of the loop
            return
        if self.failure is not None:
            self.ended.set_exception(self.failure)
        else:
            self.ended.set_result(None)

    # What the client's life calls

    def reconfigure(self, settings: SessionSettings) -> None:
        """Go by other settings from now on."""
        self.settings = settings
        self._large = settings.write_buffer
        if self.transport is not None and self.reason is None and not self.paused:
            self.transport.set_write_buffer_limits(high=settings.write_buffer)

    def begin(self) -> None:
        """Be told that what comes from now on is the client's own."""
        self.stage = None

    def refuse(self, reason: Reason, detail: str) -> None:
        """Close a connection that has no transport yet, without reading a byte of it."""
        self.reason, self.detail = reason, detail
        self.connection_lost(None)
        self.sock.close()

    def finish(self, reason: Reason) -> None:
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
            self._send_fin()

    def abort(self, reason: Reason) -> None:
        """Reset the connection now; what the client has not got is lost, and counted."""
        if self.ended.done():
            return
        self.reason = reason
        if self.transport is None:
            return  # connection_made goes on from here
        self._dropped = self.unsent()  # asyncio's transport will have emptied its buffer when it reports the end
        kernel.reset_on_close(self.sock)
        self.transport.abort()

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
    def heard(self) -> int:
        """A number that grows whenever something comes from the client."""
        return self.received + self.framing

    @property
    def written(self) -> int:
        """How many bytes were given to the transport so far."""
        return self.received

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

    def _weigh(self) -> None:
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
        else:
            # What the client had done wrong before that stays its reason.
            self.abort("reset" if self.reason in _NO_FAULTS else cast("Reason", self.reason))

    def _shut_down(self) -> bool:
        """Close our direction; tell whether there was still a connection."""
        # By the socket, not by write_eof(): the write buffer is empty, and uvloop would send it an iteration later.
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:  # ENOTCONN: the client's reset arrived first
            return False
        self._fin_sent = True
        return True

    def _settle(self) -> None:
        self.tcp_info = kernel.tcp_info(self.sock)
        waiting = 0 if self._delivered else kernel.unacknowledged(self.sock)
        if self.tcp_info is None:  # a unix socket, or no Linux
            written = self.written if self.tls_layer is None else self.tls_layer.written
            sent = written - max(self.unsent(), self._dropped)
            # Who resets such a connection may have left anything unread, and the kernel has forgotten how much.
            acked = 0 if self.reason == "reset" else max(0, sent - waiting)
        else:
            # Not the transport's figures: asyncio's drops its buffer before it reports a reset.
            sent = max(0, self.tcp_info.acked + waiting - self._fin_sent)
            acked = min(self.tcp_info.acked, sent)
        if self.tls_layer is not None:
            sent, acked = self.tls_layer.plaintext(sent), self.tls_layer.plaintext(acked)
            self.tls_layer = None  # which has the session, and would keep it until the garbage collector comes
        self.delivery = Delivery(self.received, sent, acked, self.discarded)


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
        if not kernel.unacknowledged(self.session.sock):
            self._transport.close()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Hand the end over to the session."""
        self._timer.cancel()
        self.session.connection_lost(exc)

    def _schedule(self, seconds: float) -> None:
        self._clock.announce(seconds)
        self._timer = self._loop.call_later(seconds, self._poll)

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
            self.session.abort("reset")
        elif now >= self._expiry and not (self._clock.late and self.session.unread()):
            self._transport.close()
        else:
            self._poll_after = min(2 * self._poll_after, _LAST_POLL)
            # With nothing left to be acknowledged only the client's EOF is waited for, and that is an event.
            delay = min(self._poll_after, self._expiry - now) if left else self._expiry - now
            self._schedule(max(delay, _FIRST_POLL))
