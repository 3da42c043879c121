"""Test urgent data (MSG_OOB, RFC 6093). It is echoed in its place and counted, like all other data."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE, receive
from inheriting import hand_over

if TYPE_CHECKING:
    from pathlib import Path

    from certificates import Certificates
    from harness import Daemon, Start

pytestmark = pytest.mark.once

# In Linux the last byte of the write is the urgent one. RFC 793 defines it differently.
PARTS = ((b"ab", 0), (b"CD", socket.MSG_OOB), (b"ef", 0), (b"g", socket.MSG_OOB), (b"\n", 0))
WHOLE = b"abCDefg\n"


def send(client: socket.socket) -> None:
    for part, flags in PARTS:
        client.send(part, flags)


def served(daemon: Daemon, client: socket.socket) -> None:
    """Send urgent data between other data, half-close, and check the echo and the counts."""
    client.settimeout(PATIENCE)
    send(client)
    client.shutdown(socket.SHUT_WR)
    assert receive(client, 100) == WHOLE
    line = daemon.wait_for("client_closed")
    assert (line["received"], line["sent"], line["reason"]) == (len(WHOLE), len(WHOLE), "eof")


@pytest.mark.parametrize("mode", ["stream", "line"])
@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0"])
def test_tcp(start: Start, mode: str, address: str) -> None:
    daemon = start("--listeners.x.address", address, "--listeners.x.mode", mode, listen=None)
    with daemon.connect() as client:
        served(daemon, client)


@pytest.mark.parametrize("abstract", [False, True])
def test_unix(start: Start, tmp_path: Path, abstract: bool) -> None:
    """Echo urgent data on a unix socket, which does not inherit SO_OOBINLINE from its listening socket."""
    name = f"@echod-urgent-{tmp_path.name}-{id(tmp_path)}" if abstract else str(tmp_path / "echod.sock")
    daemon = start(listen=f"unix:{name}")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"\0{name[1:]}" if abstract else name)
        served(daemon, client)


def test_fault(start: Start) -> None:
    """Keep the urgent byte in a message that a fault delays."""
    options = ("--listeners.x.address", "127.0.0.1:0", "--listeners.x.fault", "late", "--faults.late.delay", "0.01")
    daemon = start(*options, listen=None)
    with daemon.connect() as client:
        served(daemon, client)


def test_proxy_header(start: Start) -> None:
    """Accept an urgent byte in the PROXY header, and as the first byte after it."""
    options = ("--listeners.p.address", "127.0.0.1:0", "--listeners.p.proxy-protocol", "require")
    daemon = start(*options, listen=None)
    with daemon.connect() as client:
        client.send(b"PROXY TCP4 192.0.2.1", socket.MSG_OOB)
        client.send(b" 192.0.2.2 1000 2000\r\n")
        client.send(b"C", socket.MSG_OOB)
        client.send(b"D")
        assert receive(client, 2) == b"CD"
    assert daemon.wait_for("client_closed")["client"] == "192.0.2.1:1000"


def received(sock: socket.socket) -> bytes:
    """Receive some bytes, and assert that they are not EOF."""
    data = sock.recv(65536)
    assert data
    return data


def test_tls(start: Start, certificates: Certificates) -> None:
    """Keep an urgent byte in a TLS record. Without that byte, the record would be invalid."""
    daemon = start(*certificates.options(), listen=None)
    with daemon.connect() as sock:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = certificates.context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.send(outgoing.read(), socket.MSG_OOB)
                incoming.write(received(sock))
        client.write(b"data")
        sock.send(outgoing.read(), socket.MSG_OOB)
        echo = b""
        while not echo:
            incoming.write(received(sock))
            try:
                echo = client.read(10)
            except ssl.SSLWantReadError:  # the session tickets
                continue
        assert echo == b"data"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_inherited(loop_name: str, family: socket.AddressFamily) -> None:
    """Set the option also on connections that entered an inherited queue before the start."""
    with socket.socket(family) as listening, socket.socket(family) as client:
        listening.bind(("127.0.0.1", 0) if family == socket.AF_INET else "")
        listening.listen()
        client.connect(listening.getsockname())
        with hand_over([listening], "web", loop_name=loop_name) as daemon:
            served(daemon, client)
