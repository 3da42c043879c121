"""A client of a simulation: it does as it is told, and counts its own bytes."""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
from typing import TYPE_CHECKING, Literal

import echo_model
from harness import reset

if TYPE_CHECKING:
    from scenario import Listener

_READ = 65536

Ending = Literal["notify", "notify_fin", "fin"]
"""How a client closes its direction over TLS: close_notify, close_notify and FIN, or FIN alone. Otherwise it is FIN."""


class Client:
    """A client with a connected socket, which is not blocking from now on.

    Args:
        number: distinguishes the clients; each sends its own part of the pattern.
        listener: the listener that it has connected to.
        sock: the socket.
        tls: the client's context, or None.
        preamble: bytes before the handshake, such as a PROXY header.
        read_size: the most bytes of one read.

    """

    def __init__(
        self,
        number: int,
        listener: Listener,
        sock: socket.socket,
        tls: ssl.SSLContext | None,
        preamble: bytes,
        read_size: int = _READ,
    ) -> None:
        sock.setblocking(False)
        own = sock.getsockname()
        self.name = own[0] if isinstance(own, tuple) else f"unix:@{own[1:].decode()}"
        """Its address in the log, without a port."""
        self.number = number
        self.listener = listener
        self.sock = sock
        self.source = ""
        """The source in the PROXY header."""
        self.end = ""
        """Why it ended: eof, reset, truncated, tls_error, left, or "" as long as it has not."""
        self.misbehaves = False
        """Whether it does anything that lets the daemon end the connection early, or lose echo."""
        self.late = False
        """Whether it connected after the signal to stop."""
        self.reading = True
        self.endless = False
        self.queued = 0
        """Bytes of payload that it sends, as in the next two fields."""
        self.sent = 0
        self.got = 0
        self.wrong = False
        self.reply = bytearray()
        """The echo, if it is not a prefix of the payload."""
        self.certificate: bytes | None = None
        """The server's certificate."""
        self.oldest_certificate = 0
        """The number of swaps of the server's certificate before it connected."""
        self.is_raw = bool(listener.tls) and tls is None
        """Whether it does not speak TLS to a listener with TLS."""
        self.finishing: Ending | None = None
        self._notified = False
        self._finished = False
        self._was_reset = False
        self._chunk = _READ
        self._offset = 7919 * number
        self._read_size = read_size
        self._urgent: set[int] = set()
        self._garbage = b""
        self._wire = bytearray(preamble)
        self._is_prefix = echo_model.is_prefix(listener)
        self._tls: ssl.SSLObject | None = None
        self._established = tls is None
        if tls is not None:
            self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self._tls = tls.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
            self._handshake()

    def __str__(self) -> str:
        counts = f"queued={self.queued} sent={self.sent} got={self.got}"
        return f"client {self.number} ({self.name}) at {self.listener.name}: {self.end or 'open'}, {counts}"

    # What the steps tell it

    def send(self, size: int, chunk: int) -> None:
        """Send more payload, in writes of at most `chunk` bytes."""
        if self.finishing is None:
            # Megabytes in writes of a byte would take minutes.
            self._chunk = max(chunk, self._chunk) if self.sent < self.queued else chunk
            self.queued += size

    def send_urgent(self) -> None:
        """Send the next byte as urgent data."""
        if self.finishing is None and self._tls is None and not self.listener.unix:
            self._urgent.add(self.queued)
            self.queued += 1

    def send_garbage(self, data: bytes) -> None:
        """Send bytes past TLS, after the payload so far."""
        self.misbehaves = True
        self._garbage += data

    def finish(self, ending: Ending) -> None:
        """Close the own direction after the payload, and read until the end."""
        self.endless = False
        self.reading = True
        self.finishing = self.finishing or ending
        self._finish_if_sent()

    def leave(self, *, by_reset: bool) -> None:
        """Close the socket now, with RST or whatever the kernel sends."""
        if not self.end:
            self.misbehaves = True
            self.end = "left"
            if by_reset:
                reset(self.sock)
            else:
                self.sock.close()

    def payload(self, size: int) -> bytes:
        """Return the first bytes that it sends."""
        return echo_model.pattern(self._offset, size)

    # The world calls these

    @property
    def is_satisfied(self) -> bool:
        """Whether nothing more can happen without another step, if the echo is complete."""
        if self.end:
            return True
        return self._established and not self._wants_to_write and (not self.reading or self.got >= self.sent)

    @property
    def _wants_to_write(self) -> bool:
        pending = self.sent < self.queued or self.endless or bool(self._garbage)
        return bool(self._wire) or (self._established and pending and not self._finished)

    @property
    def events(self) -> int:
        """The events of its socket that it waits for."""
        if self.end:
            return 0
        read = selectors.EVENT_READ if self.reading or not self._established else 0
        return read | (selectors.EVENT_WRITE if self._wants_to_write and not self._was_reset else 0)

    def handle(self, events: int) -> None:
        """Read and write as far as possible without blocking."""
        if events & selectors.EVENT_READ:
            self._read()
        if events & selectors.EVENT_WRITE and not self.end:
            self._write()
        if not self.end:
            self._finish_if_sent()

    # Writing

    def _write(self) -> None:
        try:
            if not self._wire:
                self._write_payload()
            if self._wire:
                del self._wire[: self.sock.send(self._wire)]
        except BlockingIOError:
            pass
        except OSError:
            self._was_reset = True  # what has arrived is read first

    def _write_payload(self) -> None:
        if self.endless and self.sent == self.queued:
            self.queued += self._chunk
        size = min(self._chunk, self.queued - self.sent)
        if not size:
            self._wire += self._garbage
            self._garbage = b""
            return
        data = echo_model.pattern(self._offset + self.sent, size)
        if self._tls is not None:
            self.sent += self._tls.write(data[:16384])
            self._wire += self._outgoing.read()
        elif self.sent in self._urgent:
            self.sent += self.sock.send(data[:1], socket.MSG_OOB)
        else:
            end = min((place for place in self._urgent if self.sent < place), default=self.queued)
            self.sent += self.sock.send(data[: end - self.sent])

    def _finish_if_sent(self) -> None:
        if self.finishing is None or self._finished or self._wants_to_write or not self._established:
            return
        if self._tls is not None and self.finishing != "fin" and not self._notified:
            self._decrypt()  # unwrap fails on data that is not read
            if self.end:
                return
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            self._notified = True
            self._wire += self._outgoing.read()
            self._write()
            if self._wire:
                return  # it is called again
        self._finished = True
        if self._tls is None or self.finishing != "notify":
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)

    # Reading

    def _read(self) -> None:
        try:
            data = self.sock.recv(self._read_size)
        except BlockingIOError:
            return
        except OSError:
            self._close("reset")
            return
        if not data and self._was_reset:
            self._close("reset")
        elif self._tls is not None:
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()
            if not self._established:
                self._handshake()
            if self._established and not self.end:
                self._decrypt()
        elif data:
            self._take(data)
        else:
            self._close("eof")

    def _handshake(self) -> None:
        assert self._tls is not None
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            self._close("tls_error")
            return
        else:
            self._established = True
            self.certificate = self._tls.getpeercert(binary_form=True)
        self._wire += self._outgoing.read()

    def _decrypt(self) -> None:
        assert self._tls is not None
        try:
            while data := self._tls.read(_READ):
                self._take(data)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._close("eof")
            return
        except ssl.SSLEOFError:
            self._close("truncated")
            return
        except ssl.SSLError:
            self._close("tls_error")
            return
        else:
            self._close("eof")
            return
        self._wire += self._outgoing.read()  # an answer of TLS itself

    def _take(self, data: bytes) -> None:
        if self._is_prefix:
            self.wrong = self.wrong or data != echo_model.pattern(self._offset + self.got, len(data))
        else:
            self.reply += data
        self.got += len(data)

    def _close(self, end: str) -> None:
        self.end = "reset" if self._was_reset else end
        self.sock.close()
