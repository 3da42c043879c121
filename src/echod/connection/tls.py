"""TLS between a TCP transport and a session, with OpenSSL working on memory: one path for both loops.

The loops' own TLS transports cannot do what an echo needs: asyncio's ends a connection at the client's close_notify,
whatever is still to be sent (RFC 8446, section 6.1, lets each direction be closed by itself).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple, cast

from echod.net import kernel, openssl, x509

if TYPE_CHECKING:
    from echod.connection.echo import EchoSession
    from echod.net.certificates import ServerName

# A read of the transport takes at most this much, and so at most so much plaintext comes out of it, with what the
# record before it had in store.
_READ = 64 * 1024
_RECORD = 16 * 1024

# Marks kept of how plaintext lies in the ciphertext, before those are dropped whose bytes have arrived.
_MARKS = 512


class TlsBuffers:
    """Memory that the TLS connections of one loop take turns with: nothing stays in it from one event to the next."""

    __slots__ = ("cipher", "plain")

    def __init__(self) -> None:
        self.cipher = memoryview(bytearray(_READ))
        self.plain = memoryview(bytearray(_READ + _RECORD))


class TlsEnd(NamedTuple):
    """The server's end of TLS: what all its connections share."""

    context: ssl.SSLContext
    buffers: TlsBuffers
    """Those of the loop."""


class TlsFacts(NamedTuple):
    """What a handshake agreed on."""

    version: str
    cipher: str
    server_name: str | None
    """The name the client asked for (SNI, RFC 6066), if it did."""
    subject: str | None
    """The subject of the client's certificate, as RFC 4514 writes it. If it is empty, an alternative name.

    None if no certificate was asked for.
    """


class TlsLayer(asyncio.BufferedProtocol, asyncio.Transport):
    """The protocol of a TCP transport, and the transport of a session; between the two, it is the server's end of TLS.

    Everything that the session writes is encrypted and given to the TCP transport at once, so the session's view of
    the write buffer and its marks is that of the ciphertext.

    Args:
        session: gets the plaintext.
        end: the server's.

    """

    __slots__ = (
        "_begun",
        "_broken",
        "_buffers",
        "_incoming",
        "_marks",
        "_object",
        "_outgoing",
        "_plain",
        "_tcp",
        "session",
        "written",
    )

    def __init__(self, session: EchoSession, end: TlsEnd) -> None:
        self.session = session
        session.tls_layer = self
        self._buffers = end.buffers
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = end.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._tcp: asyncio.Transport | None = None
        self._begun = False
        self._broken = False
        self._plain = 0
        # Ciphertext and plaintext up to the end of a write, and whether it is one write since the mark before.
        self._marks: list[tuple[int, int, bool]] = [(0, 0, False)]
        self.written = 0
        """Bytes given to the TCP transport: those of the handshake and of the records' frames too."""

    # What the TCP transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the session have its transport, though the handshake is still to come."""
        self._tcp = cast("asyncio.Transport", transport)  # uvloop's are none by inheritance
        self.session.connection_made(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  (BufferedProtocol's)
        """Lend the memory to read into."""
        return self._buffers.cipher

    def buffer_updated(self, nbytes: int) -> None:
        """Take what was read."""
        self.feed(self._buffers.cipher[:nbytes])

    def feed(self, data: memoryview | bytes) -> None:
        """Take ciphertext: go on with the handshake, or pass on what it holds."""
        self._begun = True
        self.session.overhead_bytes += len(data)
        self._incoming.write(data)
        if (self.session.stage is None or self._handshake()) and self.session.reason is None:
            size = self._decrypt()
            # What costs much for little: thousands of records of a byte, or of none. uvloop would read on up to 32
            # times before anybody else has a turn.
            if len(data) > _RECORD and 2 * size < len(data) and self._reads():
                self._transport.pause_reading()
                self.session.ended.get_loop().call_soon(self.session.attempt, self._read_on)

    def eof_received(self) -> bool:
        """Take FIN for the end, with close_notify or without."""
        if self.session.stage is not None and self._begun:
            self.session.eof = True
            self._end_handshake("the client closed the connection")
            return True
        return self.session.eof_received()

    def pause_writing(self) -> None:
        """Pass on that the write buffer is full."""
        self.session.pause_writing()

    def resume_writing(self) -> None:
        """Pass on that it has room again."""
        self.session.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass on the end."""
        self.session.connection_lost(exc)

    # What the session calls

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send; drop the data after TLS has failed, as OpenSSL encrypts nothing any more then."""
        if self._broken:
            return
        self._object.write(data)
        self._plain += len(data)
        self._flush()
        self._marks.append((self.written, self._plain, True))
        if len(self._marks) > _MARKS:
            self._prune()

    def close_notify(self) -> None:
        """Say that no more comes, behind all that was written; without effect before the handshake's end."""
        if self._object.version() is not None:
            # OpenSSL looks for the client's close_notify at once, which is not there yet, or behind data that is not
            # going to be read.
            with contextlib.suppress(ssl.SSLError):
                self._object.unwrap()
            self._flush()

    def plaintext(self, ciphertext: int) -> int:
        """Return how many bytes of plaintext lie whole in the first so many bytes that were written.

        That is what a client can make use of. In the middle of a large write, and where very many are not acknowledged, it
        may be fewer than there were, and never more.
        """
        # The first mark is never beyond what was acknowledged.
        index = bisect_right(self._marks, ciphertext, key=lambda mark: mark[0])
        start, plain, _ = self._marks[index - 1]
        if index == len(self._marks):
            return plain
        end, plain_end, single = self._marks[index]
        if not single:
            return plain
        # A large write is several records, all but the last of the full size. What is not plaintext is their frames, and
        # may be an answer of TLS itself in front of them: taken as if it were all there, no record counts too early.
        frames = (end - start) - (plain_end - plain)
        return plain + max(0, ciphertext - start - frames) // _RECORD * _RECORD

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Have another protocol take this layer's place: TLS ends here."""
        self._transport.set_protocol(protocol)

    def pause_reading(self) -> None:
        """As of the TCP transport."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """As of the TCP transport."""
        self._transport.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """As of the TCP transport."""
        self._transport.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        """As of the TCP transport."""
        return self._transport.get_write_buffer_size()

    def is_closing(self) -> bool:
        """As of the TCP transport."""
        return self._transport.is_closing()

    def close(self) -> None:
        """As of the TCP transport."""
        self._transport.close()

    def abort(self) -> None:
        """As of the TCP transport."""
        self._transport.abort()

    # How it works

    @property
    def _transport(self) -> asyncio.Transport:
        assert self._tcp is not None
        return self._tcp

    def _reads(self) -> bool:
        return self.session.reason is None and not self.session.paused and not self._transport.is_closing()

    def _read_on(self) -> None:
        if self._reads():
            self._transport.resume_reading()

    def _handshake(self) -> bool:
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return False
        except ssl.SSLError as error:
            self._broken = True
            self._flush()  # the alert, which says to the client what was wrong
            self._end_handshake(openssl.explain(error))
            return False
        self._flush()
        name, _, _ = self._object.cipher() or ("", "", 0)
        try:
            certificate = self._object.getpeercert()
        except (ValueError, ssl.SSLError) as error:  # a name or a URL in it that is not UTF-8
            self._end_handshake(f"the client's certificate cannot be decoded: {error}")
            return False
        self.session.tls = TlsFacts(
            version=self._object.version() or "",
            cipher=name,
            server_name=cast("ServerName", self._object).server_name,
            subject=x509.subject(certificate) if certificate else None,
        )
        self.session.begin()
        return True

    def _end_handshake(self, detail: str) -> None:
        self.session.detail = detail
        self.session.close("handshake")

    def _decrypt(self) -> int:
        """Pass on what can be decrypted, and return how many bytes that was."""
        plain, size = self._buffers.plain, 0
        failure, closed = None, False
        # Asked before each read: a read in vain costs an exception.
        while self._incoming.pending or self._object.pending():
            try:
                read = self._object.read(_RECORD, plain[size:])
            except ssl.SSLWantReadError:
                break
            except ssl.SSLError as error:
                failure = error
                break
            if not read:
                closed = True
                break
            size += cast("int", read)
        if failure is not None:
            # What came just before it has no echo.
            self._broken = True
            self.session.received += size
            self._flush()
            self.session.detail = openssl.explain(failure)
            self.session.close("tls")
            return size
        if size:
            self.session.data_received(bytes(plain[:size]))
        if self._outgoing.pending:  # what TLS itself had to answer
            self._flush()
        if closed:
            self.session.eof_received()
        return size

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self.written += len(data)
            self._transport.write(data)

    def _prune(self) -> None:
        """Drop the marks of what has arrived; where that is not enough, every other one."""
        # On a unix socket, what is not acknowledged is counted in buffers, and may seem to be more than there is.
        arrived = self.written - self.get_write_buffer_size() - kernel.unacknowledged(self.session.sock)
        first = bisect_right(self._marks, arrived, key=lambda mark: mark[0]) - 1
        del self._marks[: max(0, first)]
        if len(self._marks) > _MARKS // 2:
            kept = [(written, plain, False) for written, plain, _ in self._marks[2::2]]
            self._marks[1:] = kept if len(self._marks) % 2 else [*kept, self._marks[-1]]
