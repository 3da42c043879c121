"""Test the TLS of one session, with the client's OpenSSL in memory."""

from __future__ import annotations

import errno
import socket
import ssl
from typing import TYPE_CHECKING

import pytest

from echod.connection.echo import EchoSession
from echod.connection.plaintext_map import MAX_MARKS
from echod.connection.state import Phase
from echod.connection.tls import TlsBuffers, TlsEnd, TlsLayer
from echod.net import kernel
from echod.net.certificates import load
from pairs import LIMITS, SHUTDOWN

if TYPE_CHECKING:
    from certificates import Certificates


class Transport:
    """Take everything at once."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def set_write_buffer_limits(self, high: int, low: int | None = None) -> None:
        pass

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        msg = "a session that is ending reads nothing"
        raise AssertionError(msg)

    def is_closing(self) -> bool:
        return True


def connect(layer: TlsLayer, transport: Transport, certificates: Certificates) -> None:
    """Make a handshake with a client in memory."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = certificates.context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    for _ in range(3):
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            layer.take_over(outgoing.read())
            incoming.write(b"".join(transport.sent))
            transport.sent.clear()
    layer.take_over(outgoing.read())


@pytest.mark.parametrize("refused", [False, True])
def test_writes_without_acknowledgements(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, *, refused: bool
) -> None:
    """Prune the map, and translate the kernel's counts of ciphertext. The kernel may refuse to count."""
    tls = load(str(certificates.certificate), str(certificates.key), "", "1.2")
    with socket.socket() as sock:
        session = EchoSession(sock, LIMITS, SHUTDOWN, None)  # type: ignore[arg-type]
        layer, transport = TlsLayer(session, TlsEnd(tls.context, TlsBuffers())), Transport()
        layer.connection_made(transport)  # type: ignore[arg-type]
        phases = [session.phase]
        connect(layer, transport, certificates)
        assert [*phases, session.phase] == [Phase.HANDSHAKE, Phase.OPEN]
        assert session.tls is not None

        def count_nothing_as_acknowledged(_: socket.socket) -> int:
            if refused:
                raise OSError(errno.ENOBUFS, "No buffer space available")
            return layer.written

        monkeypatch.setattr(kernel, "unacknowledged", count_nothing_as_acknowledged)
        before = layer.written
        for _ in range(MAX_MARKS + 100):
            layer.write(b"0123456789")
        record, rest = divmod(layer.written - before, MAX_MARKS + 100)
        assert rest == 0
        assert layer.plaintext(layer.written) == 10 * (MAX_MARKS + 100)
        assert layer.plaintext(layer.written - 1) == 10 * (MAX_MARKS + 99)
        assert layer.plaintext(before + record - 1) == 0
        session.close("cut")
        layer._read_on()
        assert session.phase is Phase.FLUSHING


def test_failure_of_an_ending_session(certificates: Certificates) -> None:
    """Keep the reason of a session that is ending if its handshake fails later."""
    tls = load(str(certificates.certificate), str(certificates.key), "", "1.2")
    with socket.socket() as sock:
        session = EchoSession(sock, LIMITS, SHUTDOWN, None)  # type: ignore[arg-type]
        layer = TlsLayer(session, TlsEnd(tls.context, TlsBuffers()))
        layer.connection_made(Transport())  # type: ignore[arg-type]
        session.close("cut")
        session.reject("handshake", "too late")
        assert (session.reason, session.detail) == ("cut", "")
