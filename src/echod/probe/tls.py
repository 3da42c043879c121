"""TLS for a client, over memory BIOs. Imported only with --tls, as it loads OpenSSL."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import TYPE_CHECKING

from echod.net import files, openssl, pem
from echod.probe.errors import TlsError, identify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from echod.probe.timing import Deadline

_CIPHERTEXT = 65536
# Bytes that one `send` accepts at most, since ciphertext that the socket refuses is kept in memory.
_PLAINTEXT = 65536

# Bytes of the server's handshake that are kept, to explain a failure.
_ANSWER = 256
# The first bytes of a record (RFC 8446, section 5.1), and the place and the type of its handshake message (section 4).
_HANDSHAKE_RECORD, _ALERT_RECORD = b"\x16\x03", b"\x15\x03"
_TYPE, _CLIENT_HELLO = 5, b"\x01"
# X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH of OpenSSL.
_OTHER_NAME = (62, 64)


class ClientTls:
    """The TLS context of a client.

    Args:
        ca: certificates of the trusted authorities (PEM), or None for those that the system trusts.
        certificate: the client's certificate (PEM).
        private_key: its private key (PEM), or None if the certificate's file contains it.
        server_name: the host name or IP address that the server's certificate must contain. A host name is sent as
            SNI, without the trailing dot, which belongs to DNS only (RFC 6066, section 3).
        insecure: accept any certificate.

    Raises:
        ValueError: a file cannot be used. The message starts with the option that names it.

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
        # The zone of an IPv6 address is local to this host.
        self._server_name = None if server_name is None else server_name.removesuffix(".").partition("%")[0]
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if insecure:
            self._context.check_hostname = False
            self._context.verify_mode = ssl.CERT_NONE
        elif ca is not None:
            # Trust an intermediate authority even without its root.
            self._context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            with _blame("--ca", ca):
                self._context.load_verify_locations(ca)
        else:
            self._context.load_default_certs()
        if certificate is not None:
            with _blame("--cert", certificate):
                data = files.read(str(certificate)).data  # only once: it may be a pipe
                _check_certificates(data)
            with _blame("--key", private_key or certificate):
                key = data if private_key is None else files.read(str(private_key)).data
                pem.load_pair(self._context, data, key, _no_password)

    def handshake(self, sock: socket.socket, deadline: Deadline, advice: str) -> TlsChannel:
        """Do the handshake on a blocking socket.

        Args:
            sock: the connected socket.
            deadline: for the handshake.
            advice: becomes a note of the error if the server sends nothing.

        Raises:
            TlsError: the handshake failed.
            OSError: the connection failed, or the deadline has passed.

        """
        return TlsChannel(sock, self._context, self._server_name, deadline, advice)


def _check_certificates(data: bytes) -> None:
    """Check a client's certificates. OpenSSL does not tell whether it cannot read these or the key.

    Raises:
        ValueError: there is no certificate, or one cannot be read.

    """
    found = [block for block in pem.blocks(data) if block.label.endswith("CERTIFICATE")]
    problems = [f"{block} {problem}" for block in found if (problem := block.problem())]
    if problems or not found:
        raise ValueError(problems[0] if problems else "the file holds no certificate in PEM form")


def _no_password() -> str:
    msg = "the key is encrypted; give a key without a password"
    raise ValueError(msg)


@contextlib.contextmanager
def _blame(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except ssl.SSLError as error:
        # OpenSSL gives no reason if it finds no key that it can read.
        why = openssl.explain(error) if error.reason else "the file holds no usable private key in PEM form"
        msg = f"{option}: {str(path)!r}: {why}"
        raise ValueError(msg) from error
    except OSError as error:
        msg = f"{option}: {str(path)!r} cannot be read: {error.strerror}"
        raise ValueError(msg) from error
    except ValueError as error:
        msg = f"{option}: {str(path)!r}: {error}"
        raise ValueError(msg) from error


class TlsChannel:
    """TLS over a connected socket.

    `ssl.SSLSocket` cannot half-close: its `unwrap` fails on data that arrives after our close_notify, and the echo does.
    Memory BIOs allow sending close_notify while the SSL object has nothing to read.
    """

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, server_name: str | None, deadline: Deadline, advice: str
    ) -> None:
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        self._unsent = b""
        answer = b""
        try:
            while not self._shake_hands(answer):
                deadline.limit(sock)  # for each call, as the server may send byte by byte
                self.flush()
                answer += self._fill()[: _ANSWER - len(answer)]
            self.flush()
        except OSError as error:
            if not answer:
                error.add_note("no answer to the TLS handshake")
                error.add_note(advice)
            raise

    def _shake_hands(self, answer: bytes) -> bool:
        """Continue the handshake. Return whether it is complete.

        Args:
            answer: the first bytes that the server has sent so far.

        Raises:
            TlsError: the handshake failed.

        """
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            with contextlib.suppress(OSError):
                self.flush()  # the alert tells the peer why
            raise TlsError(_explain(error, answer)) from error
        return True

    @property
    def version(self) -> str | None:
        """The protocol version, such as "TLSv1.3"."""
        return self._object.version()

    @property
    def unsent(self) -> bool:
        """Whether ciphertext is waiting to be sent."""
        return bool(self._unsent or self._outgoing.pending)

    def flush(self) -> None:
        """Send the waiting ciphertext.

        Raises:
            OSError: the socket failed. BlockingIOError means that some ciphertext is still waiting.

        """
        while self.unsent:
            self._unsent = self._unsent or self._outgoing.read()
            self._unsent = self._unsent[self._sock.send(self._unsent) :]

    def recv(self, size: int, /) -> bytes:
        """Return some bytes, or none after the peer's close_notify.

        Raises:
            TlsError: the peer broke the protocol, for example by closing without close_notify.
            OSError: the socket failed.

        """
        while True:
            try:
                return self._object.read(size)
            except ssl.SSLWantReadError:
                # Send the answer to a KeyUpdate. Receive even if it cannot be sent, as the peer may wait for that.
                with contextlib.suppress(BlockingIOError):
                    self.flush()
                self._fill()
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLError as error:
                raise TlsError(openssl.explain(error)) from error

    def send(self, data: bytes | memoryview, /) -> int:
        """Accept some of the bytes and return their number. `flush` sends those that the socket refuses now.

        Raises:
            OSError: the socket failed. BlockingIOError means that older ciphertext is still waiting.

        """
        self.flush()
        try:
            taken = self._object.write(data[:_PLAINTEXT])
        except ssl.SSLError as error:
            raise TlsError(openssl.explain(error)) from error
        with contextlib.suppress(BlockingIOError):
            self.flush()
        return taken

    def shutdown(self, _: int, /) -> None:
        """Send close_notify. Data can still be received."""
        try:
            self._object.unwrap()
        except ssl.SSLWantReadError:  # the peer's close_notify has not arrived
            pass
        except ssl.SSLError as error:
            raise TlsError(openssl.explain(error)) from error
        with contextlib.suppress(BlockingIOError):
            self.flush()

    def close(self) -> None:
        """Send close_notify if that is still possible, and close the socket."""
        with contextlib.suppress(OSError):
            self.shutdown(socket.SHUT_WR)
        self._sock.close()

    def _fill(self) -> bytes:
        if data := self._sock.recv(_CIPHERTEXT):
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        return data


def _explain(error: ssl.SSLError, answer: bytes) -> str:
    """Describe the failure of a handshake.

    Args:
        error: the failure.
        answer: the first bytes that the server sent.

    """
    if not answer:
        return "the server closed the connection"
    if answer.startswith(_HANDSHAKE_RECORD) and answer[_TYPE : _TYPE + 1] == _CLIENT_HELLO:
        return "the server sent the ClientHello back, as an echo server without TLS does; remove --tls"
    if not answer.startswith((_HANDSHAKE_RECORD, _ALERT_RECORD)):
        return f"the server {identify(answer) or 'answered without TLS'}; remove --tls"
    if isinstance(error, ssl.SSLCertVerificationError):
        name = error.verify_code in _OTHER_NAME
        advice = "--server-name NAME expects another" if name else "--ca FILE trusts its authority"
        return f"{openssl.explain(error).removesuffix('.')}; {advice}, --insecure accepts any certificate"
    return openssl.explain(error)
