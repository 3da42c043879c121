"""Requests and answers: paths, headers, names, and bytes that are not HTTP."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import TYPE_CHECKING

import pytest

from echod.admin.hosts import HostCheck
from echod.net.addresses import TcpAddress
from harness import Daemon
from watching import WATCHED, caller, get, place, received

if TYPE_CHECKING:
    from admin_thread import StartAdmin
    from harness import Start

pytestmark = pytest.mark.once


def test_methods_and_paths(start: Start) -> None:
    """GET and HEAD are answered on six paths. Other methods get 405, other paths 404."""
    daemon = start(*WATCHED)
    for path in ("/", "/livez", "/readyz", "/metrics", "/status", "/history"):
        body, head = get(daemon, path), get(daemon, path, "HEAD")
        assert (body.status, head.status, head.body) == (200, 200, b"")
        assert head.headers["Content-Type"] == body.headers["Content-Type"]
        assert int(head.headers["Content-Length"]) > 0
        posted = get(daemon, path, "POST")
        assert (posted.status, posted.headers["Allow"], posted.headers["Connection"]) == (405, "GET, HEAD", "close")
    missing = get(daemon, "/metrics/")
    assert (missing.status, missing.body) == (404, b"not found: use / /livez /readyz /metrics /status /history\n")
    assert get(daemon, "/metrics?x=1").status == 200
    assert get(daemon, "/livez", "OPTIONS", Origin="http://elsewhere.example").status == 405
    assert daemon.stop() == 0


def test_headers(start: Start) -> None:
    """Answers are not cached, sniffed, framed or shared with other sites. The page may load nothing else."""
    daemon = start(*WATCHED)
    for path in ("/", "/livez", "/metrics", "/status", "/history", "/none"):
        headers = get(daemon, path, Origin="http://elsewhere.example").headers
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert "Access-Control-Allow-Origin" not in headers
        assert "Set-Cookie" not in headers
        assert headers["Server"] == "echod"


def test_names_of_a_loopback_address() -> None:
    """On loopback, a Host is answered only if it cannot come from DNS rebinding."""
    hosts = [
        ("127.0.0.1:{port}", True),
        ("127.0.0.1", True),
        ("localhost:{port}", True),
        ("LocalHost", True),
        ("echod.localhost:1", True),
        ("localhost.", True),
        ("[::1]:{port}", True),
        ("192.0.2.1", True),  # a foreign address, but DNS rebinding needs a name
        ("elsewhere.example:{port}", False),
        ("localhost.elsewhere.example", False),
        ("127.0.0.1.elsewhere.example", False),
        ("", False),
        ("[::1", False),
        ("a:b:c", False),
    ]
    with Daemon(*WATCHED) as daemon:
        for host, right in hosts:
            answer = get(daemon, "/status", Host=host.format(port=place(daemon)[1]))
            assert answer.status == (200 if right else 421), host
            assert (b"version" in answer.body) == right
        assert daemon.stop() == 0


def test_names_of_other_addresses() -> None:
    """The configured name is allowed. On other addresses than loopback, any name is."""
    for configured, bound, host, allowed in (
        (TcpAddress("", 0), ["0.0.0.0", "::"], "echod.default.svc", True),
        (TcpAddress("127.0.0.1", 0), ["127.0.0.1"], "echod.default.svc", False),
        (TcpAddress("echod.test", 0), ["127.0.0.1", "::1"], "echod.test", True),
        (TcpAddress("echod.test", 0), ["127.0.0.1", "192.0.2.1"], "echod.default.svc", True),
    ):
        check = HostCheck([TcpAddress(address, 9000) for address in bound], configured)
        assert check.allows(host) == allowed


def test_two_names(start: Start) -> None:
    """A forbidden Host is refused even after an allowed one."""
    daemon = start(*WATCHED)
    with caller(daemon) as sock:
        sock.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\nHost: elsewhere.example\r\nConnection: close\r\n\r\n")
        assert received(sock).split()[1] in {b"400", b"421"}


def test_host_in_the_target(start: Start) -> None:
    """The authority of a target in absolute form is checked instead of the Host header (RFC 9112, section 3.2.2)."""
    cases = [
        ("http://elsewhere.example/livez", "localhost", 421),
        ("HTTP://elsewhere.example:80/livez", "localhost", 421),
        ("http://elsewhere.example?x=1", "localhost", 421),
        ("http://localhost@elsewhere.example/livez", "localhost", 421),
        ("ftp://elsewhere.example/livez", "localhost", 421),
        ("http://localhost/livez", "elsewhere.example", 200),
        ("http://127.0.0.1:1/livez", "localhost", 200),
        ("http://[::1]/livez", "localhost", 200),
        ("/livez?http://elsewhere.example/", "localhost", 200),
        ("//elsewhere.example/livez", "localhost", 404),
    ]
    daemon = start(*WATCHED)
    for target, host, code in cases:
        with caller(daemon) as sock:
            sock.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            assert int(received(sock).split()[1]) == code, target


HEAD = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Empty:\r\nX: a\t\xe9\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "request_", [HEAD, HEAD.replace(b"\r\n", b"\n"), HEAD.replace(b"\r\n", b"\n", 2), b"\r\n\r\n\n" + HEAD]
)
def test_line_endings(start: Start, request_: bytes) -> None:
    """Lines may end in LF alone, and empty lines may precede a request, in any segments (RFC 9112, section 2.2)."""
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
    # Complete heads that aiohttp refuses.
    b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    b"GET / HTTP/1.9\r\nHost: localhost\r\n\r\n",
]


# All answers have these headers.
SAME = ("Cache-Control", "Content-Security-Policy", "Cross-Origin-Resource-Policy", "Referrer-Policy", "Server")


def test_not_a_request(start: Start) -> None:
    """Bytes that cannot become a request are answered with 400 at once, with the headers of all answers."""
    daemon = start(*WATCHED)
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
    """A TLS client is answered at once, and reports that the server does not use TLS."""
    daemon = start(*WATCHED)
    context = ssl.create_default_context()
    with caller(daemon) as sock, pytest.raises(ssl.SSLError, match=r"(?i)wrong.version.number"):
        context.wrap_socket(sock, server_hostname="localhost")


def test_half_closed(start: Start) -> None:
    """After a half-close, all complete requests are answered. Without one, the connection is closed."""
    daemon = start(*WATCHED)
    request = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with caller(daemon) as sock:
        sock.sendall(3 * request)
        sock.shutdown(socket.SHUT_WR)
        assert received(sock).count(b"alive") == 3
    with caller(daemon) as sock:
        sock.sendall(request[:-2])
        sock.shutdown(socket.SHUT_WR)
        assert received(sock) == b""
    assert daemon.stop() == 0


def test_hostile_requests(start: Start) -> None:
    """Garbage, bodies and large heads are refused or answered, and the connection closed. Nothing is logged."""
    daemon = start(*WATCHED, python=("-X", "dev"))
    requests = [
        b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000,
        b"GET /" + b"a" * 17_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n\r\n",
        b"GET / HTTP/1.9\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n" + b"x" * 10,
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: \x00\r\n\r\n",
        b"\r\n\r\n" * 4000 + b"x" * 1000,
    ]
    with daemon.connect() as client:
        for request in requests:
            with caller(daemon) as sock:
                with contextlib.suppress(ConnectionError):
                    sock.sendall(request)
                answer = received(sock)
                assert answer == b"" or answer.split()[1] in {b"400", b"200", b"405", b"421", b"505"}, request
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            assert get(daemon, "/livez").status == 200
    assert daemon.stop() == 0
    assert daemon.loud() == []


def test_upgrade(start: Start) -> None:
    """A request to upgrade the protocol is answered with HTTP."""
    daemon = start(*WATCHED)
    head = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    with caller(daemon) as sock:
        sock.sendall(head + b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = received(sock)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"alive" in answer


def test_failure(start_admin: StartAdmin, caplog: pytest.LogCaptureFixture) -> None:
    """A defect is one answer of 500 with the usual headers, and one log record with the traceback."""

    def draining() -> bool:
        msg = "a bug"
        raise KeyError(msg)

    admin = start_admin(draining=draining)
    answer = get(admin, "/readyz")
    assert (answer.status, answer.body) == (500, b"unexpected failure: see the log\n")
    assert {name: answer.headers[name] for name in SAME} == {name: get(admin, "/livez").headers[name] for name in SAME}
    admin.echo(b"x")
    admin.stop()
    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert record.name == "echod.admin"
    assert record.getMessage() == "Error handling request from 127.0.0.1"
    assert record.exc_info is not None
    assert repr(record.exc_info[1]) == "KeyError('a bug')"
