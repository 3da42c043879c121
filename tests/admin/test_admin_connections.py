"""The admin listener's connections: how they are accepted, and which bytes are a request."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE, Daemon
from watching import WATCHED, caller, get, place, received, scrape

if TYPE_CHECKING:
    from harness import Start

pytestmark = pytest.mark.once

MAIN = "import sys; from echod.cli import main; sys.exit(main())"

# The daemon itself does not give up before the test does.
PATIENT = "from echod.admin import http\nhttp._PATIENCE = 1000.0\n"

HEAD = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Empty:\r\nX: a\t\xe9\r\nConnection: close\r\n\r\n"

# Every answer has these, whatever its status.
SAME = ("Cache-Control", "Content-Security-Policy", "Cross-Origin-Resource-Policy", "Referrer-Policy", "Server")


@pytest.mark.parametrize(
    "request_", [HEAD, HEAD.replace(b"\r\n", b"\n"), HEAD.replace(b"\r\n", b"\n", 2), b"\r\n\r\n\n" + HEAD]
)
def test_line_endings(start: Start, request_: bytes) -> None:
    """A line may end in LF alone, and empty lines come before a request: RFC 9112, 2.2. However it is cut, 200."""
    daemon = start(*WATCHED)
    with caller(daemon) as sock:
        sock.sendall(request_)
        assert received(sock).endswith(b"alive\n")
    with caller(daemon) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request_:
            sock.sendall(bytes([byte]))
        assert received(sock).endswith(b"alive\n")
    with caller(daemon) as sock:
        sock.sendall(request_.replace(b"Connection: close", b"A: b") + request_)
        assert received(sock).count(b"alive\n") == 2


BEGINNINGS = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\x16",
    b"\x00",
    b" GET / HTTP/1.1",
    b"\r\n\r\n{",
    b"\rGET / HTTP/1.1",
    b"GET\t/",
    b"GET /\x00",
    b"GET /\r ",
    b"GET /\r\n",
    b"GET / HTTP/1\r\n",
    b"GET  / HTTP/1.1\r\n",
    b"hello\n",
    b"SSH-2.0-x\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
    b"GET / HTTP/1.1\r\nHost\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n folded",
    b"GET / HTTP/1.1\r\nHost : localhost\r\n",
    b"GET / HTTP/1.1\r\nHost: a\x1b",
    b"GET / HTTP/1.1\nHost: a\r\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    b"GET / HTTP/2.0\r\n",
    # Whole heads that only aiohttp refuses.
    b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    b"GET / HTTP/1.9\r\nHost: localhost\r\n\r\n",
]


def test_not_a_request(start: Start) -> None:
    """Bytes that cannot become a request are answered 400 without more of them, with the headers of every answer."""
    daemon = start(*WATCHED, module=("-c", PATIENT + MAIN))
    right = get(daemon, "/livez").headers
    for beginning in BEGINNINGS:
        with caller(daemon) as sock:
            sock.sendall(beginning)
            head, _, body = received(sock).decode().partition("\r\n\r\n")
        status, *fields = head.split("\r\n")
        headers = dict(field.split(": ", 1) for field in fields)
        assert status.split()[1] == "400", beginning
        assert {name: headers[name] for name in SAME} == {name: right[name] for name in SAME}
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Type"] == "text/plain; charset=utf-8"
        assert body == "this is not an HTTP request: use http://, without TLS\n"
    assert daemon.stop() == 0
    assert daemon.loud() == []


def test_tls_to_the_plain_port(start: Start) -> None:
    """A TLS client learns at once that there is no TLS."""
    daemon = start(*WATCHED, module=("-c", PATIENT + MAIN))
    context = ssl.create_default_context()
    with caller(daemon) as sock, pytest.raises(ssl.SSLError, match=r"(?i)wrong.version.number"):
        context.wrap_socket(sock, server_hostname="localhost")


def test_an_unexpected_failure_has_the_headers_too(loop_name: str) -> None:
    """500 has the headers of every answer, and says nothing of the cause."""
    broken = (
        "from echod.admin import http\nasync def fail(_): raise ValueError('secret')\nhttp.Admin._get_livez = fail\n"
    )
    with Daemon("--loop", loop_name, *WATCHED, module=("-c", broken + MAIN)) as daemon:
        answer = get(daemon, "/livez")
        assert (answer.status, answer.body) == (500, b"an unexpected failure: the log has it\n")
        assert answer.headers["Cache-Control"] == "no-store"
        assert "secret" in daemon.wait_for("Error handling request from 127.0.0.1")["exception"]
        assert daemon.stop() == 0


# Accepting

NO_READER = """
import asyncio, errno, os
import uvloop
failures = 4 * [errno.ENOSPC]
def failing(base):
    class Loop(base):
        def add_reader(self, fd, callback, *args):
            if getattr(callback, "__qualname__", "") == "Admin._accept" and failures:
                raise OSError(failures.pop(), "no room")
            return super().add_reader(fd, callback, *args)
    return Loop
asyncio.SelectorEventLoop = failing(asyncio.SelectorEventLoop)
uvloop.new_event_loop = failing(uvloop.Loop)
"""

NO_DESCRIPTOR = """
import errno, socket
failures = 4 * [errno.EMFILE]
accept = socket.socket.accept
def failing(self):
    if failures:
        raise OSError(failures.pop(), "too many")
    return accept(self)
socket.socket.accept = failing
"""


@pytest.mark.parametrize(("patch", "cause"), [(NO_READER, "ENOSPC"), (NO_DESCRIPTOR, "EMFILE")])
def test_accepting_is_tried_again(loop_name: str, patch: str, cause: str) -> None:
    """The admin listener survives that its socket cannot be watched, or no connection accepted: one pause, logged."""
    with Daemon("--loop", loop_name, *WATCHED, module=("-c", patch + MAIN)) as daemon:
        assert get(daemon, "/livez").status == 200
        paused = daemon.wait_for("accept_paused")
        resumed = daemon.wait_for("accept_resumed")
        assert (paused["listener"], paused["cause"], paused["clients"]) == ("admin", cause, 0)
        assert resumed["listener"] == "admin"
        assert resumed["seconds"] >= 0.005 * (1 + 2 + 4 + 8)
        assert scrape(daemon)["echod_admin_accept_pauses_total",] == 1
        assert (len(daemon.all("accept_paused")), len(daemon.all("accept_resumed"))) == (1, 1)
        daemon.echo(b"x")
        assert daemon.stop() == 0


def test_gone_before_it_was_accepted(loop_name: str) -> None:
    """A connection that is aborted in the backlog does not cause a pause."""
    patch = NO_DESCRIPTOR.replace("EMFILE", "ECONNABORTED")
    with Daemon("--loop", loop_name, *WATCHED, module=("-c", patch + MAIN)) as daemon:
        assert get(daemon, "/livez").status == 200
        assert scrape(daemon)["echod_admin_accept_pauses_total",] == 0
        assert daemon.stop() == 0
        assert daemon.loud() == []


def test_stop_during_a_pause(loop_name: str) -> None:
    """A stop does not wait for the admin listener to be watched again."""
    patch = NO_READER.replace("4 *", "10**6 *")
    with Daemon("--loop", loop_name, *WATCHED, module=("-c", patch + MAIN)) as daemon:
        daemon.wait_for("accept_paused")
        with socket.create_connection(place(daemon), PATIENCE) as waiting:
            assert daemon.stop() == 0
            with pytest.raises(ConnectionResetError):
                waiting.recv(1)
