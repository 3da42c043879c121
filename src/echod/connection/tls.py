"""TLS between a TCP transport and a session: OpenSSL on memory buffers, the same for both loops.

The loops' own TLS transports cannot serve an echo. asyncio's ends a connection at the client's close_notify, even if
data is unsent, although each direction may be closed by itself (RFC 8446, section 6.1).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING, NamedTuple, cast

from echod.connection.plaintext_map import MAX_MARKS, RECORD, PlaintextMap
from echod.connection.record_counter import RecordCounter
from echod.connection.state import Phase, TlsFacts
from echod.net import kernel, openssl, x509

if TYPE_CHECKING:
    from echod.connection.echo import EchoSession
    from echod.net.certificates import ServerName

# The largest read of the transport. At most this much plaintext comes out of it, plus an earlier incomplete record.
_READ = 64 * 1024


class TlsBuffers:
    """Memory that the TLS connections of one loop share. Nothing stays in it between two events."""

    __slots__ = ("cipher", "plain")

    def __init__(self) -> None:
        self.cipher = memoryview(bytearray(_READ))
        self.plain = memoryview(bytearray(_READ + RECORD))


class TlsEnd(NamedTuple):
    """The server's side of TLS, which all its connections share."""

    context: ssl.SSLContext
    buffers: TlsBuffers
    """The buffers of the loop."""


class TlsLayer(asyncio.BufferedProtocol, asyncio.Transport):
    """The server's side of TLS for one connection: the protocol of a TCP transport, and the transport of a session.

    It encrypts everything that the session writes and passes it to the TCP transport at once. So the write buffer
    and its high-water mark count ciphertext.

    Args:
        session: gets the plaintext.
        end: the server's side of TLS.

    """

    __slots__ = (
        "_begun",
        "_broken",
        "_buffers",
        "_incoming",
        "_map",
        "_object",
        "_outgoing",
        "_records",
        "_tcp",
        "session",
        "written",
    )

    def __init__(self, session: EchoSession, end: TlsEnd) -> None:
        self.session = session
        session.use_tls(self)
        self._buffers = end.buffers
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = end.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._tcp: asyncio.Transport | None = None
        self._begun = False
        self._broken = False
        self._map = PlaintextMap()
        self._records = RecordCounter()
        self.written = 0
        """Bytes passed to the TCP transport, including the handshake and the overhead of records."""

    # The TCP transport calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Give the session its transport now, so that it can be ended during the handshake."""
        self._tcp = cast("asyncio.Transport", transport)  # uvloop's transports do not inherit from it
        if self.session.phase is Phase.CONNECTING:  # not before a PROXY header
            self.session.expect(Phase.HANDSHAKE)
        self.session.connection_made(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  (BufferedProtocol's signature)
        """Return the memory to read into."""
        return self._buffers.cipher

    def buffer_updated(self, nbytes: int) -> None:
        """Handle a read."""
        self._feed(self._buffers.cipher[:nbytes])

    def take_over(self, rest: bytes) -> None:
        """Continue after the PROXY header, with the data that was read after it."""
        self.session.expect(Phase.HANDSHAKE)
        if rest:
            self._feed(rest)

    def eof_received(self) -> bool:
        """Handle FIN, with or without a close_notify before it."""
        if self.session.phase is Phase.HANDSHAKE and self._begun:
            self.session.client_closed()
            self.session.reject("handshake", "the client closed the connection")
            return True
        if self.session.phase is Phase.OPEN and self._records.is_inside:
            self.session.client_closed()
            self.session.reject("tls", "the client closed the connection in the middle of a record")
            return True
        return self.session.eof_received()

    def pause_writing(self) -> None:
        """Tell the session that the write buffer is full."""
        self.session.pause_writing()

    def resume_writing(self) -> None:
        """Tell the session that the write buffer has room again."""
        self.session.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end."""
        self.session.connection_lost(exc)

    # The session calls these

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send. After TLS has failed, drop the data: OpenSSL encrypts nothing then."""
        if self._broken:
            return
        self._object.write(data)
        self._flush()
        self._map.add(self.written, len(data))
        if len(self._map) > MAX_MARKS:
            self._prune()

    def close_notify(self) -> None:
        """Tell the client that no more data follows. Does nothing before the end of the handshake."""
        if self._object.version() is not None:
            # OpenSSL also looks for the client's close_notify. It is missing, or after data that is never read.
            with contextlib.suppress(ssl.SSLError):
                self._object.unwrap()
            self._flush()

    def plaintext(self, ciphertext: int) -> int:
        """Return how many bytes of plaintext the first N written bytes hold. It may be less than the truth."""
        return self._map.plaintext(ciphertext)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Let another protocol take this layer's place. TLS ends with that."""
        self._transport.set_protocol(protocol)

    def pause_reading(self) -> None:
        """Call the TCP transport."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Call the TCP transport."""
        self._transport.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Call the TCP transport."""
        self._transport.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        """Call the TCP transport."""
        return self._transport.get_write_buffer_size()

    def is_closing(self) -> bool:
        """Call the TCP transport."""
        return self._transport.is_closing()

    def close(self) -> None:
        """Call the TCP transport."""
        self._transport.close()

    def abort(self) -> None:
        """Call the TCP transport."""
        self._transport.abort()

    # Internals

    @property
    def _transport(self) -> asyncio.Transport:
        assert self._tcp is not None
        return self._tcp

    def _feed(self, data: memoryview | bytes) -> None:
        """Continue the handshake, or pass on the plaintext in this ciphertext."""
        session = self.session
        self._begun = True
        session.count_overhead(len(data))
        self._records.feed(data)
        self._incoming.write(data)
        if session.phase is Phase.HANDSHAKE:
            self._handshake()
        if session.phase is not Phase.OPEN:
            return
        size = self._decrypt()
        # Thousands of records with one byte or none cost much CPU time. uvloop would read up to 32 times before other
        # connections have a turn.
        if len(data) > RECORD and 2 * size < len(data) and self._is_reading():
            self._transport.pause_reading()
            session.ended.get_loop().call_soon(session.attempt, self._read_on)

    def _is_reading(self) -> bool:
        return self.session.reason is None and not self.session.paused and not self._transport.is_closing()

    def _read_on(self) -> None:
        if self._is_reading():
            self._transport.resume_reading()

    def _handshake(self) -> None:
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError as error:
            self._broken = True
            self._flush()  # the alert, which tells the client the error
            self.session.reject("handshake", openssl.explain(error))
            return
        self._flush()
        name, _, _ = self._object.cipher() or ("", "", 0)
        try:
            certificate = self._object.getpeercert()
        except (ValueError, ssl.SSLError) as error:  # it holds a name or a URL that is not UTF-8
            self.session.reject("handshake", f"the client's certificate cannot be decoded: {error}")
            return
        self.session.established(
            TlsFacts(
                version=self._object.version() or "",
                cipher=name,
                server_name=cast("ServerName", self._object).server_name,
                subject=x509.subject(certificate) if certificate else None,
            )
        )

    def _decrypt(self) -> int:
        """Pass on the plaintext of all complete records, and return its size."""
        plain, size = self._buffers.plain, 0
        failure, closed = None, False
        # Check before each read: a read that finds no complete record costs an exception.
        while self._incoming.pending or self._object.pending():
            try:
                read = self._object.read(RECORD, plain[size:])
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:  # close_notify, after our own; before it, `read` returns 0
                closed = True
                break
            except ssl.SSLError as error:
                failure = error
                break
            if not read:
                closed = True
                break
            size += cast("int", read)
        if failure is not None:
            self._broken = True
            self.session.count_unechoed(size)
            self._flush()
            self.session.reject("tls", openssl.explain(failure))
            return size
        if size:
            self.session.data_received(bytes(plain[:size]))
        if self._outgoing.pending:  # an answer of TLS itself
            self._flush()
        if closed:
            self.session.eof_received()
        return size

    def _prune(self) -> None:
        try:
            # On a unix socket, the kernel counts buffers, so this may be less than has arrived.
            unacknowledged = kernel.unacknowledged(self.session.sock)
        except OSError:
            unacknowledged = self.written  # as far as is known, nothing has arrived
        self._map.prune(self.written - self.get_write_buffer_size() - unacknowledged)

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self.written += len(data)
            self._transport.write(data)
