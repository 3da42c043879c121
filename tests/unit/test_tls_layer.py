"""Test the TLS of one session, with the client's OpenSSL in memory."""

from __future__ import annotations

import errno
import os
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
    """Prune the map, and translate the kernel's counts of ciphertext. If the kernel refuses the count, nothing has arrived."""
    tls = load(str(certificates.certificate), str(certificates.key), "", "1.2")
    with socket.socket() as sock:
        session = EchoSession(sock, LIMITS, SHUTDOWN, None)  # type: ignore[arg-type]
        layer, transport = TlsLayer(session, TlsEnd(tls.context, TlsBuffers())), Transport()
        layer.connection_made(transport)  # type: ignore[arg-type]
        phases = [session.phase]
        connect(layer, transport, certificates)
        assert [*phases, session.phase] == [Phase.HANDSHAKE, Phase.OPEN]
        assert session.tls is not None

        def nothing_has_arrived(_: socket.socket) -> int:
            if refused:
                raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
            return layer.written

        monkeypatch.setattr(kernel, "unacknowledged", nothing_has_arrived)
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
