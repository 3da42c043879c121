"""Test the modes line and info."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from echod.net.addresses import TcpAddress
from echod.net.proxy_protocol import Tlv, encode_v2
from harness import PATIENCE, receive, reset

if TYPE_CHECKING:
    from pathlib import Path

    from certificates import Certificates
    from harness import Command, Start

pytestmark = pytest.mark.once

LINE = ("--listeners.x.address", "127.0.0.1:0", "--listeners.x.mode", "line")
INFO = ("--listeners.x.address", "127.0.0.1:0", "--listeners.x.mode", "info")


def test_lines_come_back_whole(start: Start) -> None:
    """Echo a line when its line feed arrives, with its line ending unchanged."""
    daemon = start(*LINE, listen=None)
    with daemon.connect() as client, daemon.connect() as other:
        client.sendall(b"hel")
        other.sendall(b"x\n")
        assert receive(other, 2) == b"x\n"  # the server has most likely read the first part by now
        client.sendall(b"lo\r")
        other.sendall(b"y\n")
        assert receive(other, 2) == b"y\n"
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        client.settimeout(PATIENCE)
        client.sendall(b"\nsecond\n\nthird")
        assert receive(client, 15) == b"hello\r\nsecond\n\n"
        client.shutdown(socket.SHUT_WR)
        assert receive(client, 100) == b"third"
    line = daemon.wait_for("client_closed", received=20)
    assert (line["acked"], line["reason"]) == (20, "eof")


@pytest.mark.parametrize("seed", range(3))
def test_any_split(start: Start, seed: int) -> None:
    """Echo the same bytes, however they are split."""
    rng = random.Random(seed)
    daemon = start(*LINE, "--limits.max-line", "100", listen=None)
    text = b"".join(b"x" * rng.randrange(99) + rng.choice([b"\n", b"\r\n"]) for _ in range(3000)) + b"tail"
    with daemon.connect() as client:
        sent, received = 0, bytearray()
        while sent < len(text):
            size = rng.choice([1, 2, 7, 101, 5000])
            client.sendall(text[sent : sent + size])
            sent += size
            if rng.random() < 0.1:
                whole = text[:sent].rfind(b"\n") + 1
                received += receive(client, whole - len(received))
        client.shutdown(socket.SHUT_WR)
        received += receive(client, 2 * len(text))
        assert received == text


def test_longest_line(start: Start) -> None:
    """Close after a line longer than `max_line`, including its ending. Echo the lines before it."""
    daemon = start(*LINE, "--limits.max-line", "10", listen=None)
    cases = [
        (b"1234567890\n", b""),
        (b"123456789\n", b"123456789\n"),
        (b"1234567890", b"1234567890"),
        (b"12345678901", b""),
        (b"a\nb\r\n12345678901\nnever\n", b"a\nb\r\n"),
        (b"a\n12345678901", b"a\n"),
        (b"a\n" * 20, b"a\n" * 20),
        (b"a\n" * 20 + b"1234567890", b"a\n" * 20 + b"1234567890"),
    ]
    connections = 0
    for text, echo in cases:
        for pieces in ([text], [text[place : place + 1] for place in range(len(text))]):
            with daemon.connect() as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for piece in pieces:
                    client.sendall(piece)
                client.shutdown(socket.SHUT_WR)
                assert receive(client, 1000) == echo
            connections += 1
            line = daemon.wait_for("client_closed", count=connections)
            assert line["reason"] == ("eof" if len(echo) == len(text) else "line_too_long"), text
            assert line["acked"] == len(echo)
    assert daemon.stop() == 0


@pytest.mark.parametrize("by", ["idle", "quiet", "cut"])
def test_unfinished_line_when_the_server_closes(start: Start, by: str) -> None:
    """Echo an unfinished line before FIN."""
    options = {
        "idle": ("--limits.idle-timeout", "0.5"),
        "quiet": ("--shutdown.quiet-period", "0.2"),
        "cut": ("--shutdown.quiet-period", "20", "--shutdown.drain-timeout", "0.2"),
    }[by]
    daemon = start(*LINE, *options, listen=None)
    with daemon.connect() as client:
        client.sendall(b"whole\npart")
        assert receive(client, 6) == b"whole\n"
        if by != "idle":
            daemon.send_signal(signal.SIGTERM)
        assert receive(client, 100) == b"part"
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"], line["acked"]) == (by, 10, 10)


def test_large_lines_that_the_client_does_not_read(start: Start) -> None:
    """Stop reading from a client that does not read, as in mode stream."""
    daemon = start(*LINE, "--limits.max-line", "1MiB", "--limits.write-timeout", "1", listen=None)
    with daemon.connect(receive_buffer=4096) as client:
        lines = (b"x" * 500_000 + b"\n") * 100
        with pytest.raises(ConnectionError):
            client.sendall(lines)
    assert daemon.wait_for("client_closed")["reason"] == "stalled"


def test_a_flood_of_lines_delays_no_other_client(start: Start) -> None:
    """Serve other clients during endless empty lines."""
    daemon = start(*LINE, listen=None)
    with daemon.connect() as other, daemon.connect() as client:
        text = b"\n" * 20_000_000
        sender = threading.Thread(target=client.sendall, args=[text])
        reader = threading.Thread(target=receive, args=[client, len(text)])
        sender.start()
        reader.start()
        slowest = 0.0
        while reader.is_alive():
            used = daemon.cpu_seconds()
            other.sendall(b"x\n")
            assert receive(other, 2) == b"x\n"
            slowest = max(slowest, daemon.cpu_seconds() - used)
        sender.join()
        assert slowest < 1


def test_lines_on_a_unix_socket(start: Start, tmp_path: Path) -> None:
    """Do not count an unfinished line as sent if it was never written."""
    path = tmp_path / "echod.sock"
    daemon = start("--listeners.x.address", f"unix:{path}", "--listeners.x.mode", "line", listen=None)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        client.sendall(b"whole\npart")
        assert receive(client, 6) == b"whole\n"
        daemon.send_signal(signal.SIGTERM)
        daemon.wait_for("draining")
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait() == 143
    line = daemon.wait_for("client_closed")
    assert (line["received"], line["sent"]) == (10, 6)


def ask(daemon: Any, sent: bytes = b"") -> dict[str, Any]:
    """Return the description that a client gets."""
    with daemon.connect() as client:
        client.sendall(sent)
        text = receive(client, 10_000)
    assert text.endswith(b"\n")
    assert text.count(b"\n") == 1
    seen: dict[str, Any] = json.loads(text)
    return seen


def test_info(start: Start) -> None:
    """Send the description of the connection as one JSON object, then FIN."""
    daemon = start(*INFO, listen=None)
    with daemon.connect() as client:
        seen = json.loads(receive(client, 10_000))
        host, port = client.getsockname()
        assert seen["peer"] == f"{host}:{port}"
        host, port = client.getpeername()
        assert seen["local"] == f"{host}:{port}"
    assert (seen["proxy"], seen["tls"]) == (None, None)
    assert seen["tcp_info"]["snd_mss"] > 0
    assert {"rtt_us", "total_retrans", "pmtu", "snd_cwnd"} <= set(seen["tcp_info"])
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"], line["acked"]) == ("info", 0, line["sent"])
    assert ask(daemon, b"input is ignored")["tls"] is None
    assert daemon.stop() == 0
    assert {event["level"] for event in daemon.events} == {"info"}


def test_info_behind_a_proxy(start: Start) -> None:
    """Describe the header, with the names of its TLVs."""
    daemon = start(*INFO, "--listeners.x.proxy-protocol", "require", listen=None)
    header = encode_v2(TcpAddress("192.0.2.7", 1), TcpAddress("192.0.2.8", 2), (Tlv(2, b"example.org"),), checksum=True)
    seen = ask(daemon, header)["proxy"]
    assert (seen["version"], seen["source"], seen["destination"]) == (2, "192.0.2.7:1", "192.0.2.8:2")
    assert {"type": "AUTHORITY", "text": "example.org"} in seen["tlvs"]


def test_info_over_tls(start: Start, certificates: Certificates) -> None:
    """Describe the result of the handshake, the server name and the client's subject."""
    daemon = start(
        *certificates.options("x"),
        *("--listeners.x.mode", "info", "--listeners.x.tls.client-ca", str(certificates.ca)),
        listen=None,
    )
    with certificates.connect(daemon, context=certificates.context(client=True)) as client:
        seen = json.loads(receive(client, 10_000))["tls"]
        assert (seen["version"], seen["cipher"]) == (client.version(), client.cipher()[0])  # type: ignore[index]
    assert seen["server_name"] == "localhost"
    assert seen["subject"].startswith("CN=tester,")
    line = daemon.wait_for("client_closed")
    assert line["sent"] == line["acked"] > 0


def test_info_on_a_unix_socket(start: Start, tmp_path: Path) -> None:
    """Name the process that connected."""
    path = tmp_path / "echod.sock"
    daemon = start("--listeners.x.address", f"unix:{path}", "--listeners.x.mode", "info", listen=None)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        seen = json.loads(receive(client, 10_000))
    assert (seen["local"], seen["tcp_info"]) == (f"unix:{path}", None)
    assert seen["credentials"] == {"pid": os.getpid(), "uid": os.getuid(), "gid": os.getgid()}
    line = daemon.wait_for("client_closed")
    assert (line["received"], line["sent"] > 0, line["acked"]) == (0, True, line["sent"])


def test_info_and_a_client_that_half_closes(start: Start) -> None:
    """Send the description even if the client closes its direction at once."""
    daemon = start(*INFO, listen=None)
    daemon.freeze()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(daemon.connect()) for _ in range(20)]
        for client in clients:
            client.shutdown(socket.SHUT_WR)
        daemon.send_signal(signal.SIGCONT)
        for client in clients:
            assert json.loads(receive(client, 10_000))["peer"]
    daemon.wait_for("client_closed", count=20, reason="info")


def test_info_and_a_client_that_is_gone(start: Start) -> None:
    """Report no error if the client resets at once."""
    daemon = start(*INFO, "--log.connections", "all", listen=None)
    for _ in range(20):
        reset(daemon.connect())
    daemon.wait_for("client_closed", count=20)
    assert {event["level"] for event in daemon.events} == {"info"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ("--listeners.x.proxy-trusted", "10.0.0.0/8"),
            "--listeners.x.proxy-trusted: listeners.x.proxy_trusted: has no effect without proxy_protocol = 'require'",
        ),
        (
            ("--listeners.x.socket-mode", "0600"),
            "--listeners.x.socket-mode: listeners.x.socket_mode: has no effect on this address: only unix:PATH has a file",
        ),
        (
            ("--listeners.x.socket-mode", "888"),
            '--listeners.x.socket-mode: listeners.x.socket_mode: should be permissions in octal such as "0660", not "888"',
        ),
        (
            ("--listeners.x.proxy-protocol", "require", "--listeners.x.proxy-trusted", "10.0.0.1/8"),
            (
                "--listeners.x.proxy-trusted: listeners.x.proxy_trusted[0]: '10.0.0.1/8' has host bits set: write 10.0.0.0/8, "
                "or 10.0.0.1 for that address alone"
            ),
        ),
        (
            (
                "--listeners.x.mode",
                "info",
                "--listeners.x.fault",
                "b",
                "--faults.b.trigger",
                "x",
                "--faults.b.action",
                "raise",
            ),
            "--listeners.x.fault: listeners.x.fault: has no effect in mode info, which does not echo: choose stream or line",
        ),
        (
            ("--listeners.x.tls.certificate", "c"),
            "--listeners.x.tls.certificate: listeners.x.tls.private_key: is missing",
        ),
        (("--listeners.x.tls", "c"), "--listeners.x.tls: listeners.x.tls: should be a table"),
        (
            (
                "--listeners.x.tls.certficate",
                "c",
                "--listeners.x.tls.private-key",
                "k",
                "--listeners.x.tls.certificate",
                "c",
            ),
            "--listeners.x.tls.certficate: listeners.x.tls.certficate: unknown key; did you mean --listeners.x.tls.certificate?",
        ),
    ],
)
def test_settings(command: Command, arguments: tuple[str, ...], problem: str) -> None:
    """Report a value that is invalid or has no effect, with an explanation."""
    result = command("check", "--listeners.x.address", "h:1", *arguments)
    assert result.returncode == 78
    assert f"echod: {problem}" in result.stderr.splitlines()
