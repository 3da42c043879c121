"""Issue certificates for a test run, and connect clients that trust them."""

from __future__ import annotations

import contextlib
import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Self

import trustme

if TYPE_CHECKING:
    import socket
    from pathlib import Path
    from types import TracebackType

    from harness import Daemon


_RECORD = 16384


class TlsSocket:
    """The subset of the socket interface that the tests use, over TLS.

    A half-close sends close_notify, and FIN without close_notify is an error. ssl.SSLSocket cannot be used, because it
    drops data that arrives after a half-close.

    Args:
        sock: a connected socket with a timeout for the handshake.
        context: the client's context.
        name: the server's name.

    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, name: str) -> None:
        self.sock = sock
        self._incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = context.wrap_bio(self._incoming, self.outgoing, server_hostname=name)
        self._unsent = b""
        self._size = 0
        self._ready = b""
        self.fileno, self.getsockname, self.setblocking = sock.fileno, sock.getsockname, sock.setblocking
        self.close, self.setsockopt = sock.close, sock.setsockopt
        while True:
            try:
                self.object.do_handshake()
            except ssl.SSLWantReadError:
                sock.sendall(self.outgoing.read())
                if not self._fill():
                    raise
                continue
            break
        sock.sendall(self.outgoing.read())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, data: bytes | memoryview) -> int:
        """Send a record. After BlockingIOError, call again with the same bytes to continue."""
        if not self._unsent:
            self._size = self.object.write(data[:_RECORD])
        self._flush()
        return self._size

    def recv(self, size: int) -> bytes:
        """Receive data, or nothing after close_notify."""
        if self._unsent:
            with contextlib.suppress(BlockingIOError):
                self._flush()
        if self._ready:
            data, self._ready = self._ready, b""
            return data
        while True:
            try:
                return self.object.read(size)
            except ssl.SSLWantReadError:
                if not self._fill():
                    raise ssl.SSLEOFError from None
            except ssl.SSLZeroReturnError:  # the server's close_notify, in reply to ours
                return b""

    def shutdown(self, _: int) -> None:
        """Send close_notify. Received data is read first, because unwrap fails on it."""
        with contextlib.suppress(ssl.SSLWantReadError):
            while data := self.object.read(_RECORD):
                self._ready += data
        with contextlib.suppress(ssl.SSLWantReadError):
            self.object.unwrap()
        # If the socket is full, echo is pending, and the recv that reads it sends the rest.
        with contextlib.suppress(BlockingIOError):
            self._flush()

    def _flush(self) -> None:
        self._unsent += self.outgoing.read()
        while self._unsent:
            self._unsent = self._unsent[self.sock.send(self._unsent) :]

    def _fill(self) -> int:
        return self._incoming.write(self.sock.recv(_RECORD))


class Certificates:
    """A certificate authority with a server certificate and a client certificate, as files and contexts.

    Args:
        folder: the folder for the files.

    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(self.ca)
        self.certificate, self.key = self.issue("server", "localhost", "127.0.0.1")
        client = self.authority.issue_cert("client@example.org", common_name="tester")
        self.client = folder / "client.pem"
        client.private_key_and_cert_chain_pem.write_to_path(self.client)

    def issue(self, name: str, *identities: str, days: float = 90, since: float = -1) -> tuple[Path, Path]:
        """Issue a server certificate. Return its file and the file of its key.

        Args:
            name: the name of the files.
            identities: the names and addresses of the server.
            days: the end of its validity, in days from now.
            since: the start of its validity, in days from now.

        """
        now = datetime.now(UTC)
        made = self.authority.issue_cert(
            *identities, not_before=now + timedelta(days=since), not_after=now + timedelta(days=days)
        )
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        made.private_key_pem.write_to_path(key)
        certificate.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
        return certificate, key

    def options(self, name: str = "tls", address: str = "127.0.0.1:0") -> tuple[str, ...]:
        """Return command-line options for a listener with the server certificate."""
        return (
            *(f"--listeners.{name}.address", address),
            *(f"--listeners.{name}.tls.certificate", str(self.certificate)),
            *(f"--listeners.{name}.tls.private-key", str(self.key)),
        )

    def context(self, *, client: bool = False, version: str = "") -> ssl.SSLContext:
        """Return a context that trusts the authority, with the client certificate if `client` is true."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.ca)
        if client:
            context.load_cert_chain(self.client)
        if version:
            context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
        return context

    def over(self, sock: socket.socket) -> TlsSocket:
        """Return a TLS client for a crowd over a connected socket."""
        return TlsSocket(sock, self.context(), "localhost")

    def join(
        self, daemon: Daemon, context: ssl.SSLContext | None = None, *, receive_buffer: int | None = None
    ) -> TlsSocket:
        """Return a TLS client for a crowd that is connected to the daemon."""
        return TlsSocket(daemon.connect(receive_buffer=receive_buffer), context or self.context(), "localhost")

    def connect(
        self,
        daemon: Daemon,
        *,
        context: ssl.SSLContext | None = None,
        sock: socket.socket | None = None,
    ) -> ssl.SSLSocket:
        """Return a TLS client, over an existing connection to the daemon if `sock` is given.

        It raises an error if the connection ends without close_notify.
        """
        sock = sock or daemon.connect()
        try:
            return (context or self.context()).wrap_socket(
                sock, server_hostname="localhost", suppress_ragged_eofs=False
            )
        except BaseException:
            sock.close()
            raise
