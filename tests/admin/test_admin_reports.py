"""Probes and the status of a real daemon, and when the admin listener is up."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from crowd import Crowd, Stuck
from harness import PATIENCE, Daemon, clean_environment, free_port, receive, run, until
from watching import WATCHED, UnixConnection, ask, caller, get, place, scrape, status

if TYPE_CHECKING:
    from pathlib import Path

    from certificates import Certificates
    from harness import Start

pytestmark = pytest.mark.once


def test_probes(start: Start) -> None:
    """/readyz is 503 from the first signal on. All paths answer during the drain."""
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
    """The admin listener is up before the echo, and answers until all clients have left."""
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
    """The report has the versions, each listener, the client, and the changed settings with their sources."""
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
        {"key": "limits.backlog", "value": 7, "source": f"{path}:6"},
        {"key": "admin.address", "value": "127.0.0.1:0", "source": "--admin.address"},
        {"key": "listeners.lines.address", "value": "127.0.0.1:0", "source": f"{path}:2"},
        {"key": "listeners.lines.mode", "value": "line", "source": f"{path}:3"},
    ]


def test_clients_with_the_most_traffic(start: Start) -> None:
    """At most ten clients that have sent something are listed, the highest current rate first."""
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
        # A rate covers up to two seconds: wait by the report's clock until the first messages are older.
        began = report["uptime_seconds"]
        until(lambda: status(daemon)["uptime_seconds"] > began + 2)
        slowest.sendall(b"x" * 500)
        assert len(receive(slowest, 500)) == 500
        first = status(daemon)["clients"]["most_traffic"][0]
        assert first["peer"] == f"127.0.0.1:{slowest.getsockname()[1]}"
        assert (first["received"], 0 < first["received_per_second"] < 1000) == (1500, True)
    assert daemon.stop() == 0


def test_states_of_clients(start: Start, certificates: Certificates) -> None:
    """Clients in each state are counted in that state, in the status and in the metrics."""
    daemon = start(
        *(*WATCHED, *certificates.options("tls")),
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
        daemon.wait_for("draining")  # of two pending signals, the kernel delivers SIGINT first
        daemon.send_signal(signal.SIGINT)
        assert daemon.wait() == 130


def test_reloads(start: Start, tmp_path: Path) -> None:
    """Reloads are counted by result."""
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


def test_accept_pauses(start: Start) -> None:
    """A listener at its limit reports the pause and counts it."""
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


def test_lost_lines_are_counted(loop_name: str) -> None:
    """Log lines dropped because of a full pipe are counted in the status while the pipe is still full."""
    echo, admin = free_port(), free_port()
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


def test_unix_socket(start: Start, tmp_path: Path) -> None:
    """A unix socket has mode 0660, answers any Host, and is unlinked at the stop."""
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
    """If the address is in use, the command exits with 69 and opens no listener."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, other = taken.getsockname()[1], free_port()
        result = run("--listen", f"127.0.0.1:{other}", "--admin.address", f"127.0.0.1:{port}")
        message = f"echod: cannot listen on 127.0.0.1:{port}: Address already in use: "
        assert result.returncode == 69
        assert result.stderr.startswith(message)
        socket.create_server(("127.0.0.1", other)).close()


@pytest.mark.parametrize("missing", ["aiohttp", "prometheus_client"])
@pytest.mark.parametrize("command", ["check", "serve"])
def test_without_the_extra(missing: str, command: str) -> None:
    """Without the libraries, the command names the package to install. Without `admin.address`, it needs neither."""
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
    package = missing.replace("_", "-")
    message = f"needs {package}, which is not installed: {sys.executable} -m pip install {package}"
    assert (result.returncode, result.stderr) == (78, f"echod: --admin.address: admin.address: {message}\n")
    with Daemon(module=("-c", hide)) as daemon:
        daemon.echo(b"x")
        assert daemon.stop() == 0


def test_not_imported_if_it_is_off(start: Start) -> None:
    """Without `admin.address`, the daemon imports neither the libraries nor the package."""
    admin = {"aiohttp", "prometheus_client", "echod.admin.http", "echod.admin.snapshot"}
    for arguments, expected in (((), set[str]()), (WATCHED, admin)):
        daemon = start(*arguments, python=("-X", "importtime"))
        assert daemon.stop() == 0
        imported = {line.rpartition("|")[2].strip() for line in daemon.raw if line.startswith("import time:")}
        assert "echod.daemon.daemon" in imported
        assert imported & admin == expected
