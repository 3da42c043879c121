"""Test listeners behind a proxy: the PROXY header, its trusted senders, limits per client, HAProxy and nginx."""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from certificates import TlsSocket
from crowd import Crowd
from echod.net.addresses import TcpAddress, UnixAddress
from echod.net.proxy_protocol import Tlv, encode_v1, encode_v2
from harness import PATIENCE, free_port, receive, reset, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from certificates import Certificates
    from harness import Daemon, Start

pytestmark = pytest.mark.once

HERE = TcpAddress("192.0.2.7", 4711)
THERE = TcpAddress("198.51.100.1", 443)
V1 = encode_v1(HERE, THERE)
V2 = encode_v2(HERE, THERE, (Tlv(2, b"example.org"),), checksum=True)
OPTIONS = ("--listeners.p.address", "127.0.0.1:0", "--listeners.p.proxy-protocol", "require")


def test_header(start: Start) -> None:
    """Echo only the bytes after the header, however it is split. The ledger names the real client."""
    daemon = start(*OPTIONS, listen=None)
    splits = ("whole", "bytes", "payload with it")
    for number, (header, split) in enumerate(itertools.product((V1, V2), splits), 1):
        with daemon.connect() as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if split == "bytes":
                for place in range(len(header)):
                    client.sendall(header[place : place + 1])
            elif split == "whole":
                client.sendall(header)
            client.sendall(b"hello" if split != "payload with it" else header + b"hello")
            assert receive(client, 5) == b"hello", (header, split)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        line = daemon.wait_for("client_closed", count=number)
        assert (line["client"], line["received"], line["acked"]) == ("192.0.2.7:4711", 5, 5), (header, split)
        assert line["peer"].startswith("127.0.0.1:")


@pytest.mark.parametrize("header", [encode_v1(None, None), encode_v2(None, None)])
def test_connections_of_the_proxy_itself(start: Start, header: bytes) -> None:
    """Take the connection's peer as the client if the header is UNKNOWN or LOCAL."""
    daemon = start(*OPTIONS, listen=None)
    with daemon.connect() as client:
        client.sendall(header + b"x")
        assert client.recv(1) == b"x"
    assert "client" not in daemon.wait_for("client_closed")


def test_many(start: Start) -> None:
    """Echo 50 streams completely, each after a header."""
    daemon = start(*OPTIONS, listen=None)
    with Crowd() as crowd:
        for seed in range(50):
            client = daemon.connect()
            client.sendall(V2 if seed % 2 else V1)
            crowd.add(client, 200_000 + seed, seed)
        crowd.finish()
        assert all((peer.end, peer.received, peer.wrong) == ("eof", peer.total, False) for peer in crowd.peers)


@pytest.mark.parametrize("together", [True, False])
def test_tls_behind_the_header(start: Start, certificates: Certificates, together: bool) -> None:
    """Accept a header before the handshake, in its own segment or together with the ClientHello."""
    daemon = start(*certificates.options("p"), "--listeners.p.proxy-protocol", "require", listen=None)

    class Preceded(socket.socket):
        """A socket that sends the header before its first bytes."""

        pending = V2

        def sendall(self, data: bytes, flags: int = 0) -> None:  # type: ignore[override]
            if together:
                super().sendall(self.pending + data, flags)
            elif self.pending:
                super().sendall(self.pending)
                with daemon.connect() as other:  # once it is closed, the daemon has read the header above
                    other.sendall(b"no header")
                    daemon.wait_for("client_closed", reason="proxy_header")
                super().sendall(data, flags)
            else:
                super().sendall(data, flags)
            self.pending = b""

    sock = Preceded()
    sock.settimeout(PATIENCE)
    sock.connect(daemon.address)
    with TlsSocket(sock, certificates.context(), "localhost") as client:
        client.send(b"hello")
        assert client.recv(5) == b"hello"
    line = daemon.wait_for("client_closed", tls="TLSv1.3")
    assert (line["client"], line["received"]) == ("192.0.2.7:4711", 5)


def test_bad_headers(start: Start) -> None:
    """Log one line that describes the error, and close with FIN instead of RST."""
    daemon = start(*OPTIONS, listen=None)
    cases = [
        (b"hello", "no PROXY header"),
        (V1[:-5] + b"\xff\r\n", ""),
        (b"PROXY TCP4 192.0.2.7 198.51.100.1 99999 443\r\n", ""),
        (V2[:-1] + bytes([V2[-1] ^ 1]), ""),
        (V1[:10], "the client closed the connection in the middle of its header"),
    ]
    for number, (sent, detail) in enumerate(cases, 1):
        with daemon.connect() as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == b""
        line = daemon.wait_for("client_closed", count=number)
        assert (line["reason"], line["received"]) == ("proxy_header", 0), sent
        assert line["detail"].startswith(detail)
    assert {event["level"] for event in daemon.events} == {"info"}


def test_look_at_the_port(start: Start) -> None:
    """Do not report a bad header if the client closes without sending a byte."""
    daemon = start(*OPTIONS, "--log.connections", "all", listen=None)
    with daemon.connect() as client:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert daemon.wait_for("client_closed")["reason"] == "eof"


def test_silence_instead_of_a_header(start: Start) -> None:
    """Close after `handshake_timeout` if no header arrives, or if it arrives one byte at a time."""
    daemon = start(*OPTIONS, "--limits.handshake-timeout", "1", listen=None)
    began = time.monotonic()
    with daemon.connect() as silent, daemon.connect() as slow:
        slow.sendall(V1[:5])
        assert silent.recv(1) == slow.recv(1) == b""
    assert time.monotonic() - began > 0.9
    daemon.wait_for("client_closed", count=2, reason="proxy_header")
    daemon.wait_for("client_closed", count=2)


def test_trusted_senders(start: Start) -> None:
    """Close an untrusted sender before reading a byte."""
    daemon = start(*OPTIONS, "--listeners.p.proxy-trusted", "10.0.0.0/8,127.0.0.2", listen=None)
    with daemon.connect() as client:
        assert client.recv(1) == b""
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["detail"]) == ("proxy_header", "the sender is not in proxy_trusted")
    with socket.create_connection(daemon.address, PATIENCE, source_address=("127.0.0.2", 0)) as client:
        client.sendall(V1 + b"x")
        assert client.recv(1) == b"x"


def test_unix_listener(start: Start, tmp_path: Path) -> None:
    """Accept the header from every client of a unix socket. The header may name a unix socket itself."""
    path = tmp_path / "echod.sock"
    daemon = start("--listeners.p.address", f"unix:{path}", "--listeners.p.proxy-protocol", "require", listen=None)
    for source, destination in ((HERE, THERE), (UnixAddress("/run/front"), UnixAddress("/run/back"))):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(path))
            client.sendall(encode_v2(source, destination) + b"x")
            assert client.recv(1) == b"x"
        daemon.wait_for("client_closed", client=str(source))


# Limits


def served(client: socket.socket) -> bool:
    """Tell whether the client gets its echo. A refused client is closed."""
    try:
        client.sendall(b"x")
        return client.recv(1) == b"x"
    except OSError:
        return False


def test_clients_of_one_address(start: Start) -> None:
    """Serve N clients of an address, and close and log any further ones. A client that ends makes room."""
    daemon = start("--limits.max-connections-per-client", "2")
    first, second, third = (daemon.connect() for _ in range(3))
    assert served(first)
    assert served(second)
    assert not served(third)
    with socket.create_connection(daemon.address, PATIENCE, source_address=("127.0.0.2", 0)) as other:
        assert served(other)
    assert daemon.wait_for("client_closed")["reason"] == "client_limit"
    reset(first)
    daemon.wait_for("client_closed", reason="reset")
    with daemon.connect() as fourth:
        assert served(fourth)
    for client in (second, third):
        client.close()


def test_clients_of_one_address_behind_a_proxy(start: Start) -> None:
    """Count clients by the address in the header, or by its network for IPv6. Each client that ends makes room."""
    daemon = start(*OPTIONS, "--limits.max-connections-per-client", "1", listen=None)

    def join(host: str) -> socket.socket:
        client = daemon.connect()
        there = THERE if ":" not in host else TcpAddress("2001:db8::1", 443)
        client.sendall(encode_v2(TcpAddress(host, 1), there))
        return client

    hosts = ("192.0.2.1", "192.0.2.2", "2001:db8:1::1", "2001:db8:1:1::1", "::ffff:192.0.2.3", "::ffff:192.0.2.4")
    clients = [join(host) for host in hosts]
    assert [served(client) for client in clients] == [True] * 6
    more = [join(host) for host in ("192.0.2.1", "2001:db8:1::2", "2001:db8:1:0:ffff::", "192.0.2.4")]
    assert [served(client) for client in more] == [False] * 4
    daemon.wait_for("client_closed", count=4, reason="client_limit")
    for client in (*clients, *more):
        reset(client)
    daemon.wait_for("client_closed", count=6, reason="reset")
    with join("192.0.2.1") as again:
        assert served(again)
        assert daemon.stop() == 0


# Real proxies


@pytest.fixture
def background() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Collect processes, and terminate them after the test."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.terminate()
        process.wait(PATIENCE)


def through(daemon: Daemon, port: int) -> None:
    """Wait for the proxy, then send five streams through it and check the echo and the clients in the ledger."""

    def up() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), PATIENCE).close()
        except ConnectionRefusedError:
            return False
        return True

    until(up)
    with Crowd() as crowd:
        for seed in range(5):
            crowd.add(socket.create_connection(("127.0.0.1", port), PATIENCE), 100_000, seed)
        ports = {peer.port for peer in crowd.peers}
        crowd.finish()
        assert [(peer.end, peer.received, peer.wrong) for peer in crowd.peers] == [("eof", 100_000, False)] * 5
    daemon.wait_for("client_closed", count=5, received=100_000)
    clients = {line["client"] for line in daemon.all("client_closed") if line["received"]}
    assert clients == {f"127.0.0.1:{number}" for number in ports}


@pytest.mark.parametrize(
    "options",
    ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id", "send-proxy-v2-ssl-cn"],
)
def test_haproxy(start: Start, tmp_path: Path, background: list[subprocess.Popen[bytes]], options: str) -> None:
    """Accept each header format of HAProxy. Its health checks send only a header, and are not logged."""
    if not shutil.which("haproxy"):
        pytest.skip("haproxy is not installed")
    daemon = start(*OPTIONS, listen=None)
    port = free_port()
    (tmp_path / "haproxy.cfg").write_text(
        f"""
defaults
    mode tcp
    timeout connect 5s
    timeout client 20s
    timeout server 20s
listen front
    bind 127.0.0.1:{port}
    unique-id-format %[uuid()]
    server echod 127.0.0.1:{daemon.address[1]} {options} check inter 100ms
"""
    )
    background.append(subprocess.Popen(["haproxy", "-q", "-db", "-f", tmp_path / "haproxy.cfg"]))
    through(daemon, port)
    connections = daemon.all("client_closed")
    assert {line["reason"] for line in connections} == {"eof"}
    for process in background:
        process.terminate()
        process.wait(PATIENCE)
    assert daemon.stop() == 0
    totals = daemon.wait_for("stopped")
    assert totals["empty"] > 0  # the health checks
    assert {event["level"] for event in daemon.events} == {"info"}


def test_nginx(start: Start, tmp_path: Path, background: list[subprocess.Popen[bytes]]) -> None:
    """Accept the version 1 header of nginx."""
    module = "/usr/lib/nginx/modules/ngx_stream_module.so"
    if not shutil.which("nginx"):
        pytest.skip("nginx is not installed")
    daemon = start(*OPTIONS, listen=None)
    port = free_port()
    (tmp_path / "nginx.conf").write_text(
        f"""
load_module {module};
daemon off;
pid {tmp_path}/pid;
error_log stderr;
events {{}}
stream {{
    server {{
        listen 127.0.0.1:{port};
        proxy_pass 127.0.0.1:{daemon.address[1]};
        proxy_protocol on;
        proxy_half_close on;
    }}
}}
"""
    )
    background.append(subprocess.Popen(["nginx", "-c", tmp_path / "nginx.conf", "-p", tmp_path, "-e", "stderr"]))
    through(daemon, port)
    assert daemon.stop() == 0
