"""TLS as a client has it. Imported only where TLS is asked for."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import TYPE_CHECKING

from echod.net import files, pem
from echod.probe.connect import TlsError, limit_time

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_CIPHERTEXT = 65536
# What one call takes at most: the ciphertext that the socket does not take at once is kept in memory.
_PLAINTEXT = 65536


class TlsFileError(ValueError):
    """A file is not what it should be; `option` tells which one it is of."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class Tls:
    """What a client asks of the peer, and shows of itself.

    Args:
        ca: certificates of the authorities to trust, PEM; None: those that the system trusts.
        certificate: the client's own, PEM.
        private_key: the certificate's; None: it is in the same file.
        server_name: the host name or IP address that the peer's certificate has to hold. A host name is sent to the
            peer (SNI), without the trailing dot, which is part of DNS only (RFC 6066, section 3).
        insecure: whether any certificate does.

    Raises:
        TlsFileError: a file cannot be used.

    """

    def __init__(
        self,
        *,
        ca: Path | None = None,
        certificate: Path | None = None,
        private_key: Path | None = None,
        server_name: str | None = None,
        insecure: bool = False,
    ) -> None:
        # The zone of an IPv6 address is local to this machine.
        self._server_name = None if server_name is None else server_name.removesuffix(".").partition("%")[0]
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if insecure:
            self._context.check_hostname = False
            self._context.verify_mode = ssl.CERT_NONE
        elif ca is not None:
            # An intermediate authority is enough.
            self._context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            with _blame("--ca", ca):
                self._context.load_verify_locations(ca)
        else:
            self._context.load_default_certs()
        if certificate is not None:
            with _blame("--cert", certificate):
                data = files.read(str(certificate)).data  # once: it may be a pipe
            with _blame("--key", private_key or certificate):
                key = data if private_key is None else files.read(str(private_key)).data
                pem.load_pair(self._context, data, key, _no_password)

    def handshake(self, sock: socket.socket, deadline: float) -> Secure:
        """Do the handshake on a blocking socket, until a deadline on the clock of `time.perf_counter`.

        Raises:
            TlsError: it failed.
            OSError: so did the connection, or the deadline has passed.

        """
        return Secure(sock, self._context, self._server_name, deadline)


def _no_password() -> str:
    msg = "it is encrypted, and nobody is there to type its password"
    raise ValueError(msg)


@contextlib.contextmanager
def _blame(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except ssl.SSLError as error:
        # For PEM that is none, OpenSSL gives no reason.
        why = _text(error) if error.reason else "holds no PEM of the kind that is needed"
        raise TlsFileError(option, f"{str(path)!r}: {why}") from error
    except OSError as error:
        raise TlsFileError(option, f"{str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TlsFileError(option, f"{str(path)!r}: {error}") from error


def _text(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError):
        return "the connection ended without close_notify"
    return (error.reason or str(error)).lower().replace("_", " ")


class Secure:
    """TLS over a connected socket, with the engine apart from it.

    An `ssl.SSLSocket` cannot half-close: its `unwrap` fails on data that comes after our close_notify, and that is the
    echo. Here close_notify is put out while the engine has nothing to read.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_name: str | None, deadline: float) -> None:
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        self._unsent = b""
        while True:
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                limit_time(sock, deadline)  # again each time: the server may send byte by byte
                self.flush()
                self._fill()
            except ssl.SSLError as error:
                with contextlib.suppress(OSError):
                    self.flush()  # the alert: so the peer knows why
                raise TlsError(_text(error)) from error
            else:
                self.flush()
                return

    @property
    def version(self) -> str | None:
        """The protocol's, as "TLSv1.3"."""
        return self._object.version()

    @property
    def unsent(self) -> bool:
        """Whether there is ciphertext that the socket has not taken."""
        return bool(self._unsent or self._outgoing.pending)

    def flush(self) -> None:
        """Send what there is.

        Raises:
            OSError: BlockingIOError too, when not all of it could be sent.

        """
        while self.unsent:
            self._unsent = self._unsent or self._outgoing.read()
            self._unsent = self._unsent[self._sock.send(self._unsent) :]

    def recv(self, size: int, /) -> bytes:
        """Return some bytes, none after the peer's close_notify.

        Raises:
            TlsError: the peer broke the protocol, also by closing without close_notify.
            OSError: of the socket.

        """
        while True:
            try:
                return self._object.read(size)
            except ssl.SSLWantReadError:
                # The answer to a KeyUpdate. Whether it can be sent or not: a peer may wait for us to receive.
                with contextlib.suppress(BlockingIOError):
                    self.flush()
                self._fill()
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLError as error:
                raise TlsError(_text(error)) from error

    def send(self, data: bytes | memoryview, /) -> int:
        """Take some of the bytes. What the socket does not take of them at once is for `flush` to send.

        Raises:
            OSError: of the socket; BlockingIOError: there is still something to be flushed, and nothing was taken.

        """
        self.flush()
        try:
            taken = self._object.write(data[:_PLAINTEXT])
        except ssl.SSLError as error:
            raise TlsError(_text(error)) from error
        with contextlib.suppress(BlockingIOError):
            self.flush()
        return taken

    def shutdown(self, _: int, /) -> None:
        """Send close_notify; what the peer still sends can be received."""
        try:
            self._object.unwrap()
        except ssl.SSLWantReadError:  # for the peer's
            pass
        except ssl.SSLError as error:
            raise TlsError(_text(error)) from error
        with contextlib.suppress(BlockingIOError):
            self.flush()

    def close(self) -> None:
        """Send close_notify where that is still possible, and let go of the socket."""
        with contextlib.suppress(OSError):
            self.shutdown(socket.SHUT_WR)
        self._sock.close()

    def _fill(self) -> None:
        if data := self._sock.recv(_CIPHERTEXT):
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
