"""Servers that are not echo servers, or expect TLS or a PROXY header: the error says so, and what to write."""

from __future__ import annotations

import re
import socket
from typing import TYPE_CHECKING

import pytest

from harness import reset, run
from peers import Peer, closing, silent
from probing import UNANSWERED, Authority, check

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Start
    from peers import Handler

pytestmark = pytest.mark.once

SOURCE = "192.0.2.7:4321"
NO_ANSWER = "no answer to the TLS handshake; if the server does not use TLS, remove --tls"
NO_HEADER = "if it expects a PROXY header, add --proxy-v2 SRC:PORT"


def both(target: str, *arguments: str, code: int) -> str:
    """Run a check and a measurement that fail in the same way, and return the error of the check."""
    line = check(target, *arguments, code=code)
    result = run("probe", target, *arguments, "--count", "1")
    assert result.returncode == code
    # Each says in its own words that there was no echo.
    assert re.sub("no echo: |the server closed the connection after 0 of 64 bytes; ", "", line) in result.stderr
    return line


def sending(data: bytes) -> Handler:
    """Return a handler that sends data once the client has sent something, and then reads until EOF."""

    def handler(sock: socket.socket) -> None:
        sock.recv(1)
        sock.sendall(data)
        silent(sock)

    return handler


def greeting(data: bytes) -> Handler:
    """Return a handler that sends data at once, and then reads until EOF."""

    def handler(sock: socket.socket) -> None:
        sock.sendall(data)
        silent(sock)

    return handler


@pytest.fixture
def listeners(start: Start, tmp_path: Path) -> dict[str, str]:
    """Return the addresses of a daemon's listeners: plain, TLS, and one that requires a PROXY header."""
    authority = Authority(tmp_path)
    daemon = start(
        *("--listeners.plain.address", "127.0.0.1:0", "--listeners.secure.address", "127.0.0.1:0"),
        *(
            "--listeners.secure.tls.certificate",
            authority.server,
            "--listeners.secure.tls.private-key",
            authority.server,
        ),
        *("--listeners.behind.address", "127.0.0.1:0", "--listeners.behind.proxy-protocol", "require"),
        *("--listeners.behind.proxy-trusted", "127.0.0.0/8"),
        listen=None,
    )
    daemon.wait_for("listening", count=3)
    return {line["listener"]: line["address"] for line in daemon.all("listening")}


def test_listeners_of_another_kind(listeners: dict[str, str]) -> None:
    """The daemon's listeners say whether TLS or the PROXY header is missing or one too many."""
    plain, secure, behind = listeners["plain"], listeners["secure"], listeners["behind"]
    tls = ("--tls", "--insecure")
    echoed = "no TLS: the server sent the ClientHello back, as an echo server without TLS does; remove --tls"
    assert both(plain, *tls, code=69) == echoed
    header = "the server sent the PROXY header back, so it does not use the PROXY protocol; remove"
    for option in ("--proxy-v1", "--proxy-v2"):
        assert both(plain, option, SOURCE, code=1) == f"wrong echo: {header} {option}"
    assert both(plain, "--proxy-v2", SOURCE, *tls, code=69) == f"no TLS: {header} --proxy-v2; remove --tls"
    closed = "the server closed the connection after 0 of 64 bytes"
    assert both(secure, code=1) == f"{closed}; {UNANSWERED}"
    assert both(behind, code=1) == f"{closed}; {UNANSWERED}"
    line = both(secure, "--proxy-v2", SOURCE, code=1)
    assert line.endswith("if the server uses TLS, add --tls; if it expects no PROXY header, remove the --proxy option")
    line = both(behind, *tls, code=69)
    assert line == f"no TLS: the server closed the connection; {NO_ANSWER}; {NO_HEADER}"


@pytest.mark.parametrize(
    "handler", [sending(b"\x15\x03\x01\x00\x02\x02\x0a"), greeting(b"\x15\x03\x03\x00\x02\x01\x00")]
)
def test_an_alert(handler: Handler) -> None:
    """An alert shows that the server uses TLS."""
    with Peer(handler) as peer:
        line = both(peer.target, code=1)
    assert line == "wrong echo: the server sent a TLS alert, so it uses TLS; add --tls"


def resets(sock: socket.socket) -> None:
    """Reset the connection once data has arrived."""
    sock.recv(1)
    reset(sock)


def test_no_answer(tmp_path: Path) -> None:
    """A server that closes, resets or is silent may need TLS or a PROXY header, or may have no TLS."""
    with Peer(resets) as peer:
        assert both(peer.target, code=1) == f"no echo: Connection reset by peer; {UNANSWERED}"
        line = both(peer.target, "--tls", code=69)
        assert line == f"no connection: Connection reset by peer; {NO_ANSWER}; {NO_HEADER}"
    with Peer(silent) as peer:
        line = check(peer.target, "--tls", "--timeout", "3s", code=69)
        assert line == f"no connection: timed out; {NO_ANSWER}; {NO_HEADER}"
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(tmp_path / "closing.sock"))
    sock.listen()
    with Peer(resets, sock) as peer:
        assert both(peer.target, code=1).endswith("; if the server uses TLS, add --tls")


def test_an_http_server(start: Start) -> None:
    """The status line of an HTTP server is shown, with or without TLS."""
    daemon = start("--admin.address", "127.0.0.1:0")
    address = daemon.wait_for("listening", listener="admin")["address"]
    text = "the server sent 'HTTP/1.[01] 400 Bad Request'"
    assert re.fullmatch(f"wrong echo: {text}", both(address, code=1))
    assert re.fullmatch(f"no TLS: {text}; remove --tls", both(address, "--tls", code=69))


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"220 mail.example.org ESMTP\r\n", "'220 mail.example.org ESMTP'"),
        (b"SSH-2.0-OpenSSH_9.9\r\n\0\0\1", "'SSH-2.0-OpenSSH_9.9'"),
        (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "'HTTP/1.1 400 Bad Request'"),
        (b"\r\nerror: busy", "'error: busy'"),
        (b"x" * 60 + b"\n", repr("x" * 60)),
        (b"x" * 61 + b"\n", repr("x" * 60 + "...")),
    ],
)
def test_a_text(data: bytes, shown: str) -> None:
    """The first line of a text is shown, whether the server greets the client or answers it."""
    for handler in (greeting(data), sending(data)):
        with Peer(handler) as peer:
            assert both(peer.target, code=1) == f"wrong echo: the server sent {shown}"
            assert both(peer.target, "--tls", code=69) == f"no TLS: the server sent {shown}; remove --tls"


@pytest.mark.parametrize("data", [b"\x4a\0\0\0\x0a8.4.0\0", b"xyz", b"\xff\xfd\x18\xff\xfd\x20", b"\r\n\r\n"])
def test_bytes(data: bytes) -> None:
    """Bytes that are not a text are not shown, except for the first wrong one."""
    with Peer(greeting(data)) as peer:
        assert check(peer.target, code=1) == f"wrong echo at offset 0: expected 0x65, got 0x{data[0]:02x}"
        # TLS needs five bytes to find out that the data is not a record.
        if len(data) >= 5:
            line = both(peer.target, "--tls", code=69)
            assert line == "no TLS: the server answered without TLS; remove --tls"


def test_a_server_that_closes_at_once() -> None:
    """A server that closes while the client sends may end the connection by EOF or by a reset."""
    with Peer(closing) as peer:
        assert check(peer.target, code=1).endswith(UNANSWERED)
        line = check(peer.target, "--tls", code=69)
        assert line.endswith(f"; {NO_ANSWER}; {NO_HEADER}")
