"""HTTP for whoever watches: what it says, and that nobody who uses it can hurt the echo."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import html.parser
import http.client
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from crowd import Crowd, Stuck
from echod.admin.http import _Connection, _Hosts, _Shared
from echod.admin.snapshot import DaemonView, Snapshot
from echod.net.addresses import TcpAddress
from echod.net.listeners import ListenerSpec, open_listeners
from echod.server.ledger import Ledger
from echod.server.server import Server
from harness import PATIENCE, Daemon, clean_environment, receive, reset, run, until
from servers import server_settings
from watching import WATCHED, UnixConnection, ask, caller, get, place, received, scrape, status

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from harness import Start

pytestmark = pytest.mark.once

CHROMIUM = shutil.which("chromium")
CHROMEDRIVER = shutil.which("chromedriver")


def patched_daemon(patch: str, loop_name: str, *arguments: str) -> Daemon:
    """Return a daemon in which something was changed on purpose."""
    main = "import sys; from echod.cli import main; sys.exit(main())"
    return Daemon("--loop", loop_name, *WATCHED, *arguments, module=("-c", f"{patch}\n{main}"))


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """Return the files of a certificate and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    files = str(tmp_path / "server.pem"), str(tmp_path / "server.key")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "100", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files


# What it says


def test_probes(start: Start) -> None:
    """Alive and ready, until the first signal; alive, not ready, and still measured during the drain; then gone."""
    daemon = start(*WATCHED, "--shutdown.delay", "30")
    assert [get(daemon, path)[::2] for path in ("/livez", "/readyz")] == [(200, b"alive\n"), (200, b"ready\n")]
    with daemon.connect() as client:
        daemon.send_signal()
        daemon.wait_for("draining")
        assert [get(daemon, path)[::2] for path in ("/livez", "/readyz")] == [(200, b"alive\n"), (503, b"draining\n")]
        assert b"\nechod_draining 1.0\n" in get(daemon, "/metrics").body
        assert status(daemon)["state"] == "draining"
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        daemon.echo(b"a newcomer, during the delay")
        daemon.send_signal(signal.SIGINT)
        assert daemon.wait() == 130
    with pytest.raises(ConnectionRefusedError):
        caller(daemon)
    assert [event["event"] for event in daemon.events][-2:] == ["drained", "stopped"]


def test_up_before_the_echo_and_down_after_it(start: Start) -> None:
    """Whoever sees that the echo listens finds the admin listener up; until all clients have left, it answers."""
    daemon = start(*WATCHED, "--shutdown.quiet-period", "100", "--shutdown.drain-timeout", "100")
    assert [event["listener"] for event in daemon.all("listening")] == ["127.0.0.1:0", "admin"]
    connection = http.client.HTTPConnection(*place(daemon), timeout=PATIENCE)
    with daemon.connect() as client, contextlib.closing(connection):
        daemon.send_signal()
        until(lambda: not daemon.listens())
        assert ask(connection, "/readyz").status == 503
        assert json.loads(ask(connection, "/status").body)["clients"]["active"] == 1
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        assert daemon.wait() == 0
        assert connection.sock.recv(1) == b""


def test_status(start: Start, loop_name: str, tmp_path: Path) -> None:
    """The report has what runs, listener by listener, and the settings that were changed with their sources."""
    path = tmp_path / "echo.toml"
    path.write_text(
        '[listeners.lines]\naddress = "127.0.0.1:0"\nmode = "line"\n[limits]\nidle_timeout = 0.0\nbacklog = 7\n'
    )
    daemon = start(*WATCHED, "--config", str(path), "--limits.max-connections", "9")
    with daemon.connect() as client:
        client.sendall(b"12345")
        assert receive(client, 5) == b"12345"
        report = status(daemon)
        peer = "127.0.0.1:" + str(client.getsockname()[1])
    assert (report["version"], report["loop"], report["pid"]) == (
        *(daemon.wait_for("started")[key] for key in ("version", "loop", "pid")),
    )
    assert report["loop"] == loop_name
    assert (report["state"], report["restart_needed"], report["log_lines_dropped"]) == ("ready", [], 0)
    assert 0 < report["uptime_seconds"] < PATIENCE
    stream, lines = report["listeners"]
    assert (stream["name"], stream["mode"], lines["name"], lines["mode"]) == ("127.0.0.1:0", "stream", "lines", "line")
    assert stream["addresses"] == [daemon.wait_for("listening", listener="127.0.0.1:0")["address"]]
    assert (stream["accepted"], stream["active"], stream["received"], stream["sent"]) == (1, 1, 5, 5)
    assert (stream["max_connections"], stream["tls"], stream["certificate_expires"]) == (9, False, None)
    assert stream["received_per_second"] > 0
    (busiest,) = report["clients"]["most_traffic"]
    assert (busiest["peer"], busiest["received"], busiest["state"], busiest["unsent"]) == (peer, 5, "open", 0)
    assert busiest["received_per_second"] > 0
    assert report["settings"] == [
        {"key": "loop", "value": loop_name, "source": "--loop"},
        {"key": "listen", "value": ["127.0.0.1:0"], "source": "--listen"},
        {"key": "limits.max_connections", "value": 9, "source": "--limits.max-connections"},
        {"key": "limits.backlog", "value": 7, "source": str(path)},
        {"key": "admin.address", "value": "127.0.0.1:0", "source": "--admin.address"},
        {"key": "listeners.lines.address", "value": "127.0.0.1:0", "source": str(path)},
        {"key": "listeners.lines.mode", "value": "line", "source": str(path)},
    ]


def test_clients_with_the_most_traffic(start: Start) -> None:
    """Ten at most, who sends the most a second first: of late, not over all its life; the silent are not among them."""
    daemon = start(*WATCHED)
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(daemon.connect()) for _ in range(14)]
        sizes = dict(zip(clients, (0, 0, *range(1000, 13000, 1000)), strict=True))
        for client, size in sizes.items():
            client.sendall(b"x" * size)
            assert len(receive(client, size)) == size
        report = status(daemon)
        assert report["clients"]["active"] == 14
        assert [entry["received"] for entry in report["clients"]["most_traffic"]] == [*range(12000, 2000, -1000)]
        slowest = clients[2]
        # Rates are over a second or two: wait, by the report's own clock, until what was sent lies before that.
        began = report["uptime_seconds"]
        until(lambda: status(daemon)["uptime_seconds"] > began + 2)
        slowest.sendall(b"x" * 500)
        assert len(receive(slowest, 500)) == 500
        first = status(daemon)["clients"]["most_traffic"][0]
        assert first["peer"] == f"127.0.0.1:{slowest.getsockname()[1]}"
        assert (first["received"], 0 < first["received_per_second"] < 1000) == (1500, True)
    assert daemon.stop() == 0


def test_states_of_clients(start: Start, certificate: tuple[str, str]) -> None:
    """A client in each state is reported in that state, and in the metrics."""
    daemon = start(
        *(*WATCHED, "--listeners.tls.address", "127.0.0.1:0", "--listeners.tls.tls.certificate", certificate[0]),
        *("--listeners.tls.tls.private_key", certificate[1]),
        *("--listeners.behind.address", "127.0.0.1:0", "--listeners.behind.proxy-protocol", "require"),
        *("--shutdown.linger-timeout", "60"),
    )
    ports = {
        name: int(daemon.wait_for("listening", listener=name)["address"].rpartition(":")[2])
        for name in ("127.0.0.1:0", "tls", "behind")
    }

    def connect(name: str) -> socket.socket:
        return socket.create_connection(("127.0.0.1", ports[name]), PATIENCE)

    with (
        Crowd() as crowd,
        connect("127.0.0.1:0") as opened,
        connect("tls"),
        connect("behind") as named,
        connect("behind"),
    ):
        opened.sendall(b"x")
        assert opened.recv(1) == b"x"
        named.sendall(b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 7\r\ny")
        assert named.recv(1) == b"y"
        paused = crowd.add(daemon.connect(receive_buffer=4096), None, 1)
        crowd.pause_reading(paused)
        crowd.run(Stuck(paused))
        closing = crowd.add(daemon.connect(receive_buffer=4096), 1_000_000, 2)
        crowd.pause_reading(closing)
        closing.half_close = False
        with contextlib.suppress(BlockingIOError):
            while True:
                closing.sock.send(b"z" * 1000)
        closing.sock.shutdown(socket.SHUT_WR)
        expected = {"proxy_header": 1, "handshake": 1, "open": 2, "paused": 2, "closing": 0}
        until(lambda: status(daemon)["clients"]["states"] == expected)
        samples = scrape(daemon)
        for state, count in expected.items():
            assert sum(samples["echod_connections_active", name, state] for name in ports) == count
        seen = {entry["peer"]: entry for entry in status(daemon)["clients"]["most_traffic"]}
        peer = f"127.0.0.1:{named.getsockname()[1]}"
        assert (seen[peer]["client"], seen[peer]["listener"]) == ("192.0.2.7:4711", "behind")
        unsent = seen[f"127.0.0.1:{paused.port}"]["unsent"]
        assert unsent > 0
        assert samples["echod_received_bytes_total", "127.0.0.1:0"] > samples["echod_sent_bytes_total", "127.0.0.1:0"]
        daemon.send_signal()
        daemon.wait_for("draining")  # of two signals that wait, the kernel gives SIGINT first
        daemon.send_signal(signal.SIGINT)
        assert daemon.wait() == 130


def test_reloads(start: Start, tmp_path: Path) -> None:
    """Reloads are counted by how they went; another admin address waits for a restart, and is reported to."""
    path = tmp_path / "echo.toml"
    path.write_text("")
    daemon = start(*WATCHED, "--config", str(path))
    path.write_text("[limits]\nbacklog = 'x'\n")
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("reload_failed")
    path.write_text(f"[log]\nfile = '{tmp_path}'\n")
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("reload_failed", count=2)
    path.write_text("[limits]\nbacklog = 9\n")
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("reloaded", changed=["limits.backlog"])
    assert status(daemon)["reloads"] == {"failure": 2, "success": 1}
    samples = scrape(daemon)
    assert (samples["echod_reloads_total", "failure"], samples["echod_reloads_total", "success"]) == (2, 1)
    assert daemon.stop() == 0


def test_another_address_needs_a_restart(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "echo.toml"
    path.write_text('[admin]\naddress = "127.0.0.1:0"\n')
    daemon = start("--config", str(path))
    path.write_text("")
    daemon.send_signal(signal.SIGHUP)
    assert daemon.wait_for("restart_needed")["settings"] == ["admin.address"]
    report = status(daemon)
    assert (report["restart_needed"], report["reloads"]) == (["admin.address"], {"success": 1})
    assert daemon.stop() == 0


def test_unix_socket(start: Start, tmp_path: Path) -> None:
    """On a unix socket, the permissions of its file are what guards it, and any name is right; it is gone afterwards."""
    path = tmp_path / "admin.sock"
    daemon = start("--admin.address", f"unix:{path}")
    assert daemon.wait_for("listening", listener="admin")["address"] == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with contextlib.closing(UnixConnection(str(path))) as connection:
        assert ask(connection, "/readyz", Host="any.name.will.do").status == 200
        assert ask(connection, "/metrics").status == 200
    assert daemon.stop() == 0
    assert not path.exists()


def test_address_in_use() -> None:
    """69 with the address, and no listener is left open."""
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        port, other = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        result = run("--listen", f"127.0.0.1:{other}", "--admin.address", f"127.0.0.1:{port}")
        message = f"echod: cannot listen on 127.0.0.1:{port}: Address already in use\n"
        assert (result.returncode, result.stderr) == (69, message)
        socket.create_server(("127.0.0.1", other)).close()


@pytest.mark.parametrize("missing", ["aiohttp", "prometheus_client"])
@pytest.mark.parametrize("command", ["check", "serve"])
def test_without_the_extra(missing: str, command: str) -> None:
    """Without the libraries there is no admin listener, which is said in time; who wants none needs none."""
    hide = f"""
import sys
from importlib.machinery import PathFinder
class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == {missing!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hide
from echod.cli import main
sys.exit(main())
"""
    line = [sys.executable, "-c", hide, command, *WATCHED]
    result = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
    message = "needs aiohttp and prometheus-client: pip install 'echod[admin]'"
    assert (result.returncode, result.stderr) == (78, f"echod: --admin.address: admin.address: {message}\n")
    with Daemon(module=("-c", hide)) as daemon:
        daemon.echo(b"x")
        assert daemon.stop() == 0


def test_not_loaded_where_it_is_off() -> None:
    """Who has no admin listener pays nothing for it, not even the import."""
    code = (
        "import sys; from echod import cli; from echod.daemon import daemon; from echod.net.listeners import open_listeners\n"
        "def stop(*_): print(*sys.modules); sys.exit(0)\n"
        "daemon.open_listeners = stop; sys.exit(cli.main())"
    )
    command = [sys.executable, "-c", code, "--listen", "127.0.0.1:0"]
    modules = subprocess.run(command, capture_output=True, text=True, env=clean_environment()).stdout.split()
    assert "echod.daemon.daemon" in modules
    assert not {
        "aiohttp",
        "prometheus_client",
        "echod.admin.http",
        "echod.admin.metrics",
        "echod.admin.snapshot",
    } & set(modules)


# HTTP


def test_methods_and_paths(start: Start) -> None:
    """GET and HEAD, of five paths."""
    daemon = start(*WATCHED)
    for path in ("/", "/livez", "/readyz", "/metrics", "/status"):
        body, head = get(daemon, path), get(daemon, path, "HEAD")
        assert (body.status, head.status, head.body) == (200, 200, b"")
        assert head.headers["Content-Type"] == body.headers["Content-Type"]
        assert int(head.headers["Content-Length"]) > 0
        posted = get(daemon, path, "POST")
        assert (posted.status, posted.headers["Allow"], posted.headers["Connection"]) == (405, "GET, HEAD", "close")
    missing = get(daemon, "/metrics/")
    assert (missing.status, missing.body) == (404, b"there are: / /livez /readyz /metrics /status\n")
    assert get(daemon, "/metrics?x=1").status == 200
    assert get(daemon, "/livez", "OPTIONS", Origin="http://elsewhere.example").status == 405
    assert daemon.stop() == 0


def test_headers(start: Start) -> None:
    """Nothing is kept, guessed, framed, or given to other sites; nothing else may be loaded or run by the page."""
    daemon = start(*WATCHED)
    for path in ("/", "/livez", "/metrics", "/status", "/none"):
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
    """On loopback, only names that nobody else can make lead there are answered: no DNS rebinding."""
    hosts = [
        ("127.0.0.1:{port}", True),
        ("127.0.0.1", True),
        ("localhost:{port}", True),
        ("LocalHost", True),
        ("echod.localhost:1", True),
        ("localhost.", True),
        ("[::1]:{port}", True),
        ("192.0.2.1", True),  # another's, and no name that somebody else controls
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
    """The configured name is right; where not only this machine can ask, any is."""
    for address, host, right in (
        (TcpAddress("", 0), "echod.default.svc", True),
        (TcpAddress("127.0.0.1", 0), "echod.default.svc", False),
        (TcpAddress("localhost", 0), "localhost", True),
    ):
        (listener,) = open_listeners([ListenerSpec("admin", address)], 1)
        assert _Hosts(listener, address).accept(host) == right
        for listening in listener.sockets:
            listening.close()


def test_two_names(start: Start) -> None:
    """A second Host does not hide the first."""
    daemon = start(*WATCHED)
    with caller(daemon) as sock:
        sock.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\nHost: elsewhere.example\r\nConnection: close\r\n\r\n")
        assert received(sock).split()[1] in {b"400", b"421"}


# Slow and hostile clients


def test_half_closed(start: Start) -> None:
    """Who asks, several times at once even, and closes its own direction, is answered; who only closes is closed."""
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


def test_what_is_no_request(start: Start) -> None:
    """Garbage, bodies and endless heads are refused or answered, and the connection closed; the log stays silent."""
    daemon = start(*WATCHED, python=("-X", "dev"))
    requests = [
        b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000,
        b"GET /" + b"a" * 17_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
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


def test_endless_heads(loop_name: str) -> None:
    """Who never comes to an end of the head is closed after 16 KiB, not kept for as long as there is patience."""
    with patched_daemon("from echod.admin import http; http._PATIENCE = 1000", loop_name) as daemon:
        for start_ in (
            b"GET / HTTP/1.1\r\nX: ",
            b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n",
        ):
            with caller(daemon) as sock:
                sock.sendall(start_)
                with pytest.raises(ConnectionError):
                    sock.sendall(b"a" * 50_000_000)
        assert get(daemon, "/livez").status == 200


def test_upgrade(start: Start) -> None:
    """Who wants another protocol gets HTTP."""
    daemon = start(*WATCHED)
    head = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    with caller(daemon) as sock:
        sock.sendall(head + b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = received(sock)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"alive" in answer


def test_asked_and_gone(start: Start) -> None:
    """Who resets before, during or after an answer is no error, and no line of the log."""
    daemon = start(*WATCHED, python=("-X", "dev"))
    for number in range(150):
        with caller(daemon) as sock:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * (1 + number % 3))
            if number % 5 == 0:
                sock.recv(1)
            reset(sock)
    assert get(daemon, "/livez").status == 200
    assert daemon.stop() == 0
    assert daemon.loud() == []


def test_slow_heads(loop_name: str) -> None:
    """Who does not complete a request in time is closed, however busily it drips; so is who asks nothing more."""
    with patched_daemon("from echod.admin import http; http._PATIENCE = 0.5", loop_name) as daemon:
        with caller(daemon) as silent, caller(daemon) as dripping, caller(daemon) as idle:
            idle.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                dripping.sendall(b"GET / HTTP/1.1\r\nX: ")
                for _ in range(3000):
                    if select.select([dripping], [], [], 0.01)[0]:
                        break
                    dripping.sendall(b"a")
                else:
                    pytest.fail("was not closed")
            assert received(silent) == b""
            assert received(idle).endswith(b"alive\n")
        assert get(daemon, "/livez").status == 200


def test_a_client_that_does_not_read(loop_name: str) -> None:
    """It is asked to wait once the kernel takes no more, and closed in time; nothing piles up for it."""
    with patched_daemon(
        "from echod.admin import http; http._PATIENCE = 2; http._ANSWER_EVERY = 0", loop_name
    ) as daemon:
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with sock:
            sock.connect(place(daemon))
            sock.settimeout(PATIENCE)
            before = daemon.memory()
            with contextlib.suppress(ConnectionError):
                while True:
                    sock.sendall(request)
                    assert daemon.memory() - before < 10_000_000
        daemon.echo(b"x")
        assert daemon.stop() == 0
        assert {event["level"] for event in daemon.events} == {"info"}


def test_a_reader_that_comes_back(loop_name: str) -> None:
    """Who does not read for a while gets all answers in the end, in order."""
    with patched_daemon("from echod.admin import http; http._ANSWER_EVERY = 0", loop_name) as daemon:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with sock:
            sock.connect(place(daemon))
            sock.settimeout(PATIENCE)
            count = 380
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * count)
            sock.shutdown(socket.SHUT_WR)
            until(lambda: waiting(sock) > 0)
            daemon.settle()  # the answers have filled all that lies between
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            assert received(sock).count(b"</html>") == count
        assert daemon.stop() == 0


def waiting(sock: socket.socket) -> int:
    return len(sock.recv(65536, socket.MSG_PEEK))


def test_too_many_connections(loop_name: str) -> None:
    """At the cap, a newcomer takes the place of whoever has asked for nothing for the longest time."""
    patient = "from echod.admin import http; http._PATIENCE = 1000"
    with patched_daemon(patient, loop_name) as daemon, contextlib.ExitStack() as opened:
        connection = http.client.HTTPConnection(*place(daemon), timeout=PATIENCE)
        opened.callback(connection.close)
        silent: list[socket.socket] = []
        for _ in range(100):
            assert ask(connection, "/readyz").status == 200
            silent.append(opened.enter_context(caller(daemon)))
            if len(silent) == 32:
                assert received(silent.pop(0)) == b""
        assert get(daemon, "/livez").status == 200
        assert ask(connection, "/livez").status == 200
        daemon.echo(b"x")
        assert daemon.stop() == 0


def test_requests_take_turns(start: Start) -> None:
    """Nobody gets more than so many answers a second, on one connection or on several."""
    daemon = start(*WATCHED)
    began = time.monotonic()

    def hammer() -> None:
        with caller(daemon) as sock:
            sock.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
            sock.shutdown(socket.SHUT_WR)
            assert received(sock).count(b"alive") == 100

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    daemon.echo(b"x")
    for thread in threads:
        thread.join()
    assert time.monotonic() - began > 299 * 0.005


def test_shared_work(loop_name: str) -> None:
    """What costs time is made once for all who wait, begun after each had asked, and then not for a while."""
    from echod.loops import loop_factory  # noqa: PLC0415  (the loop under test)

    begun: list[float] = []
    rounds: list[tuple[float, float]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        third = asyncio.Event()

        async def make() -> bytes:
            begun.append(loop.time())
            third.set()
            await asyncio.sleep(0.02)
            rounds.append((begun[-1], loop.time()))
            return str(len(begun)).encode()

        shared = _Shared(make)
        assert await asyncio.gather(*(shared.get() for _ in range(5))) == [b"1"] * 5
        late = loop.create_task(shared.get())
        assert {await shared.get(), await late} == {b"2"}
        third.clear()
        running = loop.create_task(shared.get())
        await third.wait()
        assert await shared.get() == b"4"  # the third had begun already
        assert await running == b"3"

    with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
        runner.run(main())
    for (first, ended), (second, _) in itertools.pairwise(rounds):
        assert second - ended > 0.9 * 9 * (ended - first)


def test_stop_where_nobody_asked(start: Start) -> None:
    daemon = start(*WATCHED)
    assert daemon.stop() == 0
    assert {event["level"] for event in daemon.events} == {"info"}


def test_stop_with_connections(start: Start) -> None:
    """Silent, half-asked and unread connections do not hold up the stop, nor does any leave a trace in the log."""
    daemon = start(*WATCHED, python=("-X", "dev"))
    with caller(daemon), caller(daemon) as asking, caller(daemon) as unread, caller(daemon) as idle:
        asking.sendall(b"GET / HT")
        unread.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400)
        idle.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle.recv(1) == b"H"
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 10
    assert daemon.loud() == []
    assert len(daemon.raw) == len(daemon.events), "a line that is not of the log"


def test_stop_with_a_client_that_does_not_read(loop_name: str) -> None:
    """What it has not taken by the end is dropped."""
    with (
        patched_daemon("from echod.admin import http; http._ANSWER_EVERY = 0", loop_name) as daemon,
        socket.socket() as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(place(daemon))
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400)
        assert waiting(sock) > 0
        daemon.settle()  # the answers have filled all that lies between
        assert daemon.stop() == 0
        assert {event["level"] for event in daemon.events} == {"info"}


def test_stop_during_an_answer(loop_name: str) -> None:
    """An answer under way when all clients have left is given; one that takes for ever is not waited for."""
    patch = """
import asyncio
from echod.admin import http
async def slow(self):
    self._subject.reloads["slow"] += 1
    await asyncio.sleep(0.2)
    return http._response(200, "at last\\n")
async def endless(self):
    await asyncio.sleep(1000)
http.Admin._get_livez = slow
http.Admin._get_page = endless
"""
    with patched_daemon(patch, loop_name) as daemon, caller(daemon) as one, caller(daemon) as other:
        other.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        one.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: status(daemon)["reloads"].get("slow") == 1)
        assert daemon.stop() == 0
        assert received(one).endswith(b"at last\n")
        assert received(other) == b""


def test_failure(loop_name: str) -> None:
    """What must not happen is one answer, 500, and one line of the log with the traceback."""
    patch = """
from echod.admin import http
async def broken(self):
    raise KeyError("a bug")
http.Admin._get_livez = broken
"""
    with patched_daemon(patch, loop_name) as daemon:
        assert get(daemon, "/livez").status == 500
        assert get(daemon, "/readyz").status == 200
        daemon.echo(b"x")
        assert daemon.stop() == 0
        (error,) = (event for event in daemon.events if event["level"] == "error")
        assert "KeyError: 'a bug'" in error["exception"]


def test_no_descriptor_for_a_connection(start: Start) -> None:
    """Who finds none waits in the backlog, and is served when there is one."""
    daemon = start(*WATCHED)
    import resource  # noqa: PLC0415  (Linux has prlimit)

    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    with caller(daemon) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
        sock.settimeout(PATIENCE)
        assert received(sock).endswith(b"alive\n")
    assert daemon.stop() == 0


def test_reset_before_its_turn(loop_name: str) -> None:
    """Where the kernel tells at once that a connection is gone, that is the end of it, and of nothing else."""
    patch = """
import asyncio
from echod.daemon import daemon
loop_factory = daemon.loop_factory
def factory(choice):
    base = loop_factory(choice)
    def make():
        loop = base()
        class Loop(type(loop)):
            tries = 0
            async def connect_accepted_socket(self, *arguments, **options):
                Loop.tries += 1
                if Loop.tries == 1:
                    raise ConnectionResetError
                return await super().connect_accepted_socket(*arguments, **options)
        loop.close()
        return Loop()
    return make
daemon.loop_factory = factory
"""
    with patched_daemon(patch, loop_name) as daemon:
        with caller(daemon) as sock:
            assert received(sock) == b""
        assert get(daemon, "/livez").status == 200
        assert daemon.stop() == 0
        assert {event["level"] for event in daemon.events} == {"info"}


class Http:
    """Stands for aiohttp's protocol, and for the transport."""

    peername = None

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.calls.append((name, *arguments))


def test_connection_between_two_iterations() -> None:
    """It may be aborted before it has its transport, and be lost while a request waits for its turn."""

    async def main() -> None:
        http, head = Http(), b"GET / HTTP/1.1\r\n\r\n"
        delays = iter([0.0, 0.001])
        connection = _Connection(http, lambda _: next(delays), http.lost)  # type: ignore[arg-type]
        connection.abort()
        assert not http.calls
        connection.connection_made(http)  # type: ignore[arg-type]
        connection.pause_writing()
        connection.data_received(head + head)
        assert [name for name, *_ in http.calls] == ["connection_made", "pause_writing"]
        connection.resume_writing()
        connection.answered()  # the second one has to wait
        connection.connection_lost(None)
        await asyncio.sleep(0.002)
        assert http.calls[2:] == [("resume_writing",), ("data_received", head), ("connection_lost", None), ("lost",)]

    asyncio.run(main())


# Counting


def run_on(steps: Generator[Any, Any, Any]) -> Any:
    """Run what is left of a coroutine that waits for nothing."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def test_census_counts_everyone_once(loop_name: str) -> None:
    """Whoever leaves while it is taken is counted by the figures of its end; who comes then, next time."""
    from echod.daemon.logs import Log  # noqa: PLC0415
    from echod.loops import loop_factory  # noqa: PLC0415
    from echod.settings.model import LogSettings  # noqa: PLC0415

    clients = 600

    async def scene(server: Server, address: tuple[str, int]) -> None:
        streams = [await asyncio.open_connection(*address) for _ in range(clients)]
        for _, writer in streams:
            writer.write(b"12345")
        for reader, _ in streams:
            assert await reader.readexactly(5) == b"12345"
        census = Snapshot(DaemonView({"x": server}, {}, pytest.fail, bool, list, {}, int))
        steps = census.take().__await__()
        next(steps)  # the first few hundred are counted; of those that are not, the last goes, and another comes
        _, last = streams[-1]
        last.transport.abort()
        reader, newcomer = await asyncio.open_connection(*address)
        newcomer.write(b"67")
        assert await reader.readexactly(2) == b"67"
        while not server.ledger.counters.reasons:  # noqa: ASYNC110  (no event tells)
            await asyncio.sleep(0)
        count = run_on(steps)["x"]
        assert (count.counters.accepted, count.received, count.sent) == (clients, 5 * clients, 5 * clients)
        assert sum(count.states.values()) == clients - 1
        for _, writer in [*streams, (None, newcomer)]:
            writer.close()
        await server.shutdown()
        # Where the kernel has sent less of a connection than could be seen while it was open, the sum stands still.
        server.ledger.counters.sent -= 1
        count = (await census.take())["x"]
        assert (count.counters.accepted, count.received, count.sent) == (clients + 1, 5 * clients + 2, 5 * clients + 1)
        server.ledger.counters.sent -= 2
        assert (await census.take())["x"].sent == count.sent
        assert not count.clients

    async def main() -> None:
        log = Log(LogSettings(level="error"))
        (listener,) = open_listeners([ListenerSpec("x", TcpAddress("127.0.0.1", 0))], 1000)
        shutdown = {"quiet_period": 0.1, "drain_timeout": 0.2, "linger_timeout": 0.1}
        server = Server(listener.sockets, server_settings(shutdown=shutdown), Ledger(log.logger, "none"))
        server.start()
        try:
            await scene(server, listener.sockets[0].sock.getsockname())
        finally:
            server.abort()
            await server.shutdown()
            log.close()

    with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
        runner.run(main())


def test_counters_never_fall(start: Start) -> None:
    """Scraped all the time, under load with every kind of end, no counter falls; at the end they are the log's."""
    daemon = start(*WATCHED, "--shutdown.delay", "60", "--limits.write-buffer", "16KiB")
    samples: list[dict[tuple[str, ...], float]] = []
    stop = threading.Event()

    def scrape_on() -> None:
        while not stop.is_set():
            samples.append(scrape(daemon))

    watcher = threading.Thread(target=scrape_on)
    watcher.start()
    try:
        with Crowd() as crowd:
            for seed in range(60):
                crowd.add(daemon.connect(), 200_000 + 10_000 * seed, seed)
            crowd.run(lambda: sum(bool(peer.end) for peer in crowd.peers) > 20)
            for peer in crowd.peers[::5]:
                if not peer.end and isinstance(peer.sock, socket.socket):
                    reset(peer.sock)
                    peer.end = "reset"
            crowd.finish()
        daemon.wait_for("client_closed", count=60)
    finally:
        stop.set()
        watcher.join()
    samples.append(scrape(daemon))
    for before, after in itertools.pairwise(samples):
        for series, value in before.items():
            if series[0].endswith(("_total", "_bucket", "_count", "_sum")):
                assert after[series] >= value, series
    daemon.send_signal()
    daemon.send_signal(signal.SIGINT)
    daemon.wait()
    totals = daemon.wait_for("stopped")
    last = samples[-1]
    for name, key in (
        ("received_bytes", "received"),
        ("acked_bytes", "acked"),
        ("connections", "connections"),
        ("discarded_bytes", "discarded_bytes"),
    ):
        assert last[f"echod_{name}_total", "127.0.0.1:0"] == totals[key]
    sent = last["echod_sent_bytes_total", "127.0.0.1:0"]
    assert totals["sent"] <= sent <= totals["received"]


def test_lost_lines_are_counted(loop_name: str) -> None:
    """Lines of the log that nobody reads are in the status, while nobody reads them."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        echo, admin = one.getsockname()[1], other.getsockname()[1]
    daemon = Daemon(
        *("--loop", loop_name, "--admin.address", f"127.0.0.1:{admin}", "--log.connections", "all"),
        listen=f"127.0.0.1:{echo}",
        read_log=False,
    )
    try:

        def dropped() -> float:
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", admin, timeout=PATIENCE)) as connection:
                return float(json.loads(ask(connection, "/status").body)["log_lines_dropped"])

        def listening() -> bool:
            with contextlib.suppress(ConnectionRefusedError):
                return dropped() == 0
            return False

        until(listening)
        while not dropped():
            for _ in range(500):
                socket.create_connection(("127.0.0.1", echo), PATIENCE).close()
        daemon.start_reading()
        before = dropped()
        assert daemon.wait_for("log_lines_dropped")["lines"] <= before
    finally:
        daemon.kill()


def test_accept_pauses(start: Start) -> None:
    """A listener at its cap shows that clients wait, and how often that was so."""
    daemon = start(*WATCHED, "--limits.max-connections", "1")
    with daemon.connect() as one, daemon.connect():
        one.sendall(b"x")
        assert one.recv(1) == b"x"
        daemon.wait_for("accept_paused")
        (listener,) = status(daemon)["listeners"]
        assert (listener["accept_paused"], listener["accept_pauses"]) == (True, 1)
        samples = scrape(daemon)
        assert samples["echod_accept_paused", "127.0.0.1:0"] == 1
        assert samples["echod_accept_pauses_total", "127.0.0.1:0"] == 1
        assert samples["echod_connections_limit", "127.0.0.1:0"] == 1
    daemon.wait_for("accept_resumed")
    assert scrape(daemon)["echod_accept_paused", "127.0.0.1:0"] == 0
    assert daemon.stop() == 0


# The page


class Page(html.parser.HTMLParser):
    """Collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.styles = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        for name, value in attrs:
            if name in {"src", "href", "srcset", "action", "data"}:
                self.links.append(value or "")
            self.handlers += [name] if name.startswith("on") else []
            self.styles += name == "style"


def test_page_is_self_contained(start: Start) -> None:
    """It loads nothing but /status, and the policy names exactly its script and style."""
    answer = get(start(*WATCHED), "/")
    text = answer.body.decode()
    page = Page()
    page.feed(text)
    assert {link for link in page.links if not link.startswith("data:,")} == {"status", "metrics"}
    assert not any(urlsplit(link).netloc for link in page.links)
    assert (page.handlers, page.styles) == ([], 0)
    assert set(re.findall(r"https?://[^\"' )]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in text
    assert "@import" not in text
    assert "innerHTML" not in text
    policy = answer.headers["Content-Security-Policy"]
    for element in ("script", "style"):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Give a headless Chromium."""
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "hide-scrollbars", f"user-data-dir={tmp_path / 'profile'}"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(CHROMEDRIVER)
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


def show(browser: Any, width: int, height: int, scheme: str) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def text_of(browser: Any, element: str) -> str:
    return str(browser.execute_script(f"return document.querySelector({element!r}).innerText"))


@pytest.mark.chromium
def test_page_in_a_browser(start: Start, browser: Any, tmp_path: Path, certificate: tuple[str, str]) -> None:
    """It is live, shows what there is, takes names for text, fits a phone, and says when echod drains or is gone."""
    config = tmp_path / "echo.toml"
    config.write_text(f"[listeners.{json.dumps(HOSTILE)}]\naddress = '127.0.0.1:0'\n")
    daemon = start(
        *(*WATCHED, "--config", str(config), "--shutdown.quiet-period", "100", "--shutdown.drain-timeout", "100"),
        *("--listeners.secure.address", "127.0.0.1:0", "--listeners.secure.tls.certificate", certificate[0]),
        *("--listeners.secure.tls.private_key", certificate[1]),
    )
    browser.get(f"http://127.0.0.1:{place(daemon)[1]}/")
    until(lambda: text_of(browser, "#state") == "ready")
    assert text_of(browser, "#active") == "0"
    assert text_of(browser, "#certificates").startswith("secure")
    assert "99\xa0d left" in text_of(browser, "#certificates")
    listeners = text_of(browser, "#listeners")
    assert HOSTILE in listeners
    assert "--shutdown.quiet-period" in text_of(browser, "#settings")

    daemon.echo(b"gone by then")
    with daemon.connect() as client:

        def flow() -> bool:
            client.sendall(b"x" * 50_000)
            receive(client, 50_000)
            return bool(re.fullmatch(r"[\d.]+", text_of(browser, "#in"))) and bool(
                re.search("[kM]B/s", text_of(browser, "#clients"))
            )

        until(flow)
        until(lambda: text_of(browser, "#active") == "1")
        assert f"127.0.0.1:{client.getsockname()[1]}" in text_of(browser, "#clients")
        assert re.fullmatch(r"eof\s+1", text_of(browser, "#closed"))
        for width, height, scheme in ((1200, 1000, "light"), (390, 844, "dark"), (360, 640, "light")):
            show(browser, width, height, scheme)
            assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
            background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
            channels = [int(channel) for channel in re.findall(r"\d+", background)]
            assert (sum(channels) < 384) == (scheme == "dark")
            if shots := os.environ.get("SCREENSHOTS"):
                browser.save_screenshot(f"{shots}/{width}-{scheme}.png")

        daemon.send_signal()
        until(lambda: text_of(browser, "#state") == "draining")
        assert "1 still connected" in text_of(browser, "#notice")
    assert daemon.wait() == 0
    until(lambda: text_of(browser, "#state") == "gone")
    assert "No answer from echod" in text_of(browser, "#notice")
    assert browser.title.startswith("gone")
    messages = [line["message"] for line in browser.get_log("browser")]
    assert not [message for message in messages if "ERR_CONNECTION" not in message], "the console is not silent"
