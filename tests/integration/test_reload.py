"""Test reloads by SIGHUP, which drop no client."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crowd import Crowd, Stuck
from harness import PATIENCE, Daemon, clean_environment, receive, until

if TYPE_CHECKING:
    from certificates import Certificates
    from harness import Event, Start


class Configured:
    """A settings file that tests rewrite for a daemon."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str) -> None:
        self.path.write_text(text)

    def reload(self, daemon: Daemon, text: str, outcome: str = "reloaded") -> Event:
        """Rewrite the file, send SIGHUP, and return the event of the outcome."""
        self.write(text)
        before = len(daemon.all(outcome))
        daemon.send_signal(signal.SIGHUP)
        return daemon.wait_for(outcome, count=before + 1)


@pytest.fixture
def file(tmp_path: Path) -> Configured:
    """Return a settings file."""
    return Configured(tmp_path / "echo.toml")


def descriptors(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))


def test_a_hundred_under_load(start: Start, file: Configured, certificates: Certificates) -> None:
    """During 100 reloads, clients that stream with and without TLS lose no byte."""
    options = certificates.options()

    def text(number: int) -> str:
        return f"""
[limits]
write_buffer = {32768 + number}
[listeners.plain]
address = "127.0.0.1:0"
[listeners.tls]
address = "127.0.0.1:0"
tls = {{ certificate = "{options[3]}", private_key = "{options[5]}" }}
"""

    file.write(text(0))
    daemon = start("--config", str(file.path), listen=None)
    daemon.wait_for("listening", count=2)
    ports = [int(event["address"].rpartition(":")[2]) for event in daemon.all("listening")]
    with Crowd() as crowd:
        for seed in range(10):
            sock = socket.create_connection(("127.0.0.1", ports[seed % 2]), PATIENCE)
            crowd.add(sock if seed % 2 == 0 else certificates.over(sock), 10**12, seed)
        open_before = 0
        for number in range(1, 101):
            file.write(text(number))
            daemon.send_signal(signal.SIGHUP)
            crowd.run(lambda number=number: len(daemon.all("reloaded")) == number)  # type: ignore[misc]
            if number == 10:
                open_before = descriptors(daemon)
        until(lambda: descriptors(daemon) <= open_before)
        for peer in crowd.peers:
            peer.stop()
        crowd.finish()
        assert [(peer.end, peer.received, peer.wrong) for peer in crowd.peers] == [
            ("eof", peer.total, False) for peer in crowd.peers
        ]
        assert min(peer.received for peer in crowd.peers) > 0
    daemon.wait_for("client_closed", count=10)
    assert daemon.stop() == 0
    assert {tuple(event["changed"]) for event in daemon.all("reloaded")} == {("limits.write_buffer",)}
    assert {line["reason"] for line in daemon.all("client_closed")} == {"eof"}


def test_limits(start: Start, file: Configured) -> None:
    """A lower cap drops no client. A higher one admits waiting clients at once."""
    file.write("[limits]\nmax_connections = 3\n")
    daemon = start("--config", str(file.path))
    clients = [daemon.connect() for _ in range(3)]
    for client in clients:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    event = file.reload(daemon, "[limits]\nmax_connections = 1\nmax_connections_per_client = 4\n")
    assert event["changed"] == ["limits.max_connections", "limits.max_connections_per_client"]
    clients.append(daemon.connect())
    daemon.wait_for("accept_paused")
    for client in clients[:3]:
        client.sendall(b"y")
        assert client.recv(1) == b"y"
    clients[3].sendall(b"z")
    file.reload(daemon, "[limits]\nmax_connections = 10\nmax_connections_per_client = 4\n")
    assert clients[3].recv(1) == b"z"
    with daemon.connect() as fifth:
        assert fifth.recv(1) == b""
    daemon.wait_for("client_closed", reason="client_limit")
    for client in clients:
        client.close()


def test_timeouts_of_connected_clients(start: Start, file: Configured) -> None:
    """New timeouts and a new write buffer apply to connected clients too."""
    file.write("[limits]\nidle_timeout = 3600\nwrite_buffer = '64MiB'\n")
    daemon = start("--config", str(file.path))
    with daemon.connect() as client, Crowd() as crowd:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        peer = crowd.add(daemon.connect(receive_buffer=4096), None, 1)
        crowd.pause_reading(peer)
        crowd.run(lambda: peer.sent > 5_000_000)
        file.reload(daemon, "[limits]\nidle_timeout = 0.5\nwrite_buffer = '64KiB'\nwrite_timeout = 1\n")
        crowd.run(Stuck(peer))
        assert peer.sent < 40_000_000
        assert client.recv(1) == b""
        daemon.wait_for("client_closed", reason="idle")
        crowd.finish()
        daemon.wait_for("client_closed", reason="stalled")


def test_shutdown_settings(start: Start, file: Configured) -> None:
    """A stop uses the settings of the last reload."""
    file.write("[shutdown]\nquiet_period = 600\ndrain_timeout = 600\n")
    daemon = start("--config", str(file.path))
    with daemon.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        file.reload(daemon, "[shutdown]\nquiet_period = 0.1\ndrain_timeout = 600\n")
        daemon.send_signal(signal.SIGTERM)
        assert client.recv(1) == b""
    assert daemon.wait() == 0
    assert daemon.receipt()["quiet"] == 1


def test_invalid_settings_change_nothing(start: Start, file: Configured, certificates: Certificates) -> None:
    """All problems are logged with the messages of `check`, and the previous settings stay in force."""
    good = "[limits]\nmax_connections = 2\n"
    file.write(good)
    daemon = start("--config", str(file.path))
    text = f"""
[limits]
max_connections = 1
idle_timout = 3
backlog = 0
[listeners.tls]
address = "127.0.0.1:0"
tls = {{ certificate = "{certificates.ca}", private_key = "{certificates.key}" }}
"""
    problems = file.reload(daemon, text, "reload_failed")["problems"]
    assert problems == [
        f"{file.path}:5: limits.backlog: should be at least 1, not 0",
        f"{file.path}:4: limits.idle_timout: unknown key; did you mean 'idle_timeout'?",
    ]
    text = text.replace("idle_timout", "idle_timeout").replace("backlog = 0", "backlog = 1")
    (problem,) = file.reload(daemon, text, "reload_failed")["problems"]
    assert "is not the key of the certificate in" in problem
    file.path.unlink()
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("reload_failed", count=3)
    with daemon.connect() as one, daemon.connect() as two:
        for client in (one, two):
            client.sendall(b"x")
            assert client.recv(1) == b"x"
    assert not daemon.all("reloaded")
    assert file.reload(daemon, good)["changed"] == []
    assert daemon.stop() == 0


def test_settings_that_need_a_restart(start: Start, file: Configured) -> None:
    """They are logged, and the others take effect. A listener that was removed is served as before."""
    file.write(
        """
[listeners.a]
address = "127.0.0.1:0"
[listeners.b]
address = "127.0.0.1:0"
mode = "line"
"""
    )
    daemon = start("--config", str(file.path), listen=None)
    daemon.wait_for("listening", count=2)
    port = int(daemon.all("listening")[1]["address"].rpartition(":")[2])
    text = """
listen = ["127.0.0.1:0"]
[limits]
idle_timeout = 5
[listeners.a]
address = "127.0.0.1:7"
mode = "info"
[listeners.c]
address = "127.0.0.1:0"
"""
    expected = ["listen", "listeners.a.address", "listeners.b", "listeners.c"]
    for count in (1, 2):  # a second reload changes nothing, and the restart is still needed
        file.reload(daemon, text)
        assert daemon.wait_for("restart_needed", count=count)["settings"] == expected
    with daemon.connect() as client:
        assert json.loads(receive(client, 10_000))["peer"]
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        client.sendall(b"a\nb")
        assert receive(client, 2) == b"a\n"


def test_modes_and_faults_of_new_clients(start: Start, file: Configured) -> None:
    """New modes and faults apply to new clients only."""
    table = '[listeners.x]\naddress = "127.0.0.1:0"\n'
    file.write(table)
    daemon = start("--config", str(file.path), listen=None)
    with daemon.connect() as old:
        old.sendall(b"a")
        assert old.recv(1) == b"a"
        file.reload(daemon, f'{table}mode = "line"\n')
        with daemon.connect() as new:
            old.sendall(b"b")
            assert old.recv(1) == b"b"
            new.sendall(b"c\nd")
            assert receive(new, 2) == b"c\n"
    file.reload(daemon, f'{table}fault = "f"\n[faults.f]\ntrigger = "boom"\naction = "raise"\n')
    with daemon.connect() as victim:
        victim.sendall(b"boom")
        assert victim.recv(1) == b""
    daemon.wait_for("client_failed")


def test_certificates_are_swapped(start: Start, file: Configured, certificates: Certificates) -> None:
    """New clients get the new certificate, and old ones stay. A key that does not match changes nothing."""
    certificate, key = certificates.issue("renewed", "localhost")

    def text() -> str:
        return f"""
[listeners.tls]
address = "127.0.0.1:0"
tls = {{ certificate = "{certificate}", private_key = "{key}" }}
"""

    def shown() -> bytes | None:
        with certificates.connect(daemon) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            return client.getpeercert(binary_form=True)

    file.write(text())
    daemon = start("--config", str(file.path), listen=None)
    with certificates.connect(daemon) as old:
        first = shown()
        key_before = key.read_bytes()
        certificates.issue("renewed", "localhost")
        second_key = key.read_bytes()
        key.write_bytes(key_before)
        file.reload(daemon, text(), "reload_failed")
        assert shown() == first
        key.write_bytes(second_key)
        assert file.reload(daemon, text())["changed"] == []
        second = shown()
        assert second not in {first, None}
        file.reload(daemon, '[listeners.tls]\naddress = "127.0.0.1:0"\n')
        daemon.echo(b"plain now")
        old.sendall(b"y")
        assert old.recv(1) == b"y"
    with pytest.raises(ssl.SSLError):
        shown()


def test_log(start: Start, file: Configured, tmp_path: Path) -> None:
    """A reload changes level, format, file and `connections`. A log file that was moved is opened again."""
    log = tmp_path / "log"
    file.write("")
    daemon = start("--config", str(file.path))
    daemon.echo(b"x")
    daemon.wait_for("client_closed")
    file.write(f'[log]\nfile = "{log}"\nformat = "logfmt"\nconnections = "none"\n')
    daemon.send_signal(signal.SIGHUP)
    until(lambda: log.exists() and "event=reloaded" in log.read_text())
    daemon.echo(b"not logged")
    log.rename(tmp_path / "rotated")
    daemon.send_signal(signal.SIGHUP)
    until(lambda: log.exists() and "event=reloaded" in log.read_text())
    kept = tmp_path / "kept"
    log.rename(kept)
    log.mkdir()
    daemon.send_signal(signal.SIGHUP)
    until(lambda: f"'{log}' cannot be written: Is a directory" in kept.read_text())
    log.rmdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(log))
        daemon.send_signal(signal.SIGHUP)
        until(lambda: f"log.file: '{log}' cannot be written: No such device or address" in kept.read_text())
    file.write('[log]\nlevel = "warning"\n')
    daemon.send_signal(signal.SIGHUP)
    until(lambda: descriptors_of_logs(daemon, tmp_path) == 0)
    assert daemon.stop() == 0
    assert len(daemon.all("client_closed")) == 1
    assert not daemon.all("stopped")


def test_log_that_nobody_reads(start: Start, file: Configured, tmp_path: Path) -> None:
    """After a change of the log file, lines for a full pipe never reach a client's socket."""
    pipe, log = tmp_path / "pipe", tmp_path / "log"
    os.mkfifo(pipe)
    file.write("")
    daemon = start("--config", str(file.path))
    file.reload(daemon, f'[log]\nfile = "{pipe}"\n', "reload_failed")
    reason = "No such device or address: no process reads this FIFO; start its reader first"
    problem = f"{file.path}:2: log.file: '{pipe}' cannot be written: {reason}"
    assert daemon.all("reload_failed")[0]["problems"] == [problem]
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        daemon.send_signal(signal.SIGHUP)
        until(lambda: descriptors_of_logs(daemon, tmp_path) == 1)
        for _ in range(500):
            daemon.echo(b"a line")
        file.write(f'[log]\nfile = "{log}"\nconnections = "none"\n')
        daemon.send_signal(signal.SIGHUP)
        until(lambda: log.exists() and "reloaded" in log.read_text())
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(daemon.connect()) for _ in range(20)]
            for client in clients:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
            lines = b""
            os.set_blocking(reader, True)
            while more := os.read(reader, 1 << 16):
                lines += more
            for client in clients:
                client.sendall(b"y")
                client.shutdown(socket.SHUT_WR)
                assert receive(client, 1000) == b"y"
        assert lines.count(b'"client_closed"') == 500
    finally:
        os.close(reader)
    assert daemon.stop() == 0


BROKEN_LOAD = """
import sys
from echod.daemon import daemon, signals
signals = signals.Signals()
from echod.daemon.logs import Log
from echod.settings import options, resources, sources

_, _, values = options.parse(sys.argv[1:], "")
loads = []

def load(before):
    loads.append(before)
    if len(loads) == 1:
        raise KeyError("a bug")
    return before

acquired = resources.acquire(sources.load(values, None))
log = Log(acquired.config.settings.log)
code = daemon.serve(acquired, log, signals, load)
log.close()
sys.exit(code)
"""


def test_unexpected_failure(loop_name: str) -> None:
    """An unexpected exception in a reload is logged with its traceback, and the next reload succeeds."""
    with Daemon("--loop", loop_name, module=("-c", BROKEN_LOAD)) as daemon:
        daemon.send_signal(signal.SIGHUP)
        assert "KeyError: 'a bug'" in daemon.wait_for("reload_crashed")["exception"]
        daemon.wait_for("reload_failed")
        daemon.send_signal(signal.SIGHUP)
        daemon.wait_for("reloaded")
        assert daemon.stop() == 0


def descriptors_of_logs(daemon: Daemon, folder: Path) -> int:
    """Return the number of files below a folder that the daemon has open."""
    count = 0
    for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed in between
            count += link.readlink().is_relative_to(folder)
    return count


def test_at_the_start(loop_name: str) -> None:
    """A SIGHUP during the imports does not end echod: it reloads once it is up."""
    script = f"""
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "echod.settings":
            signal.raise_signal(signal.SIGHUP)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["echod", "--loop", "{loop_name}", *sys.argv[1:]]
from echod.cli import main
sys.exit(main())
"""
    with Daemon(module=("-c", script)) as daemon:
        daemon.wait_for("reloaded")
        daemon.echo(b"x")
        assert daemon.stop() == 0


def test_slow_file_and_stop(loop_name: str, file: Configured) -> None:
    """A slow settings file delays neither the echo nor a stop. Signals meanwhile cause one more reload."""
    file.write("")
    environment = clean_environment({"ECHOD_CONFIG": str(file.path)})
    with Daemon("--loop", loop_name, env=environment) as daemon:
        file.path.unlink()
        os.mkfifo(file.path)
        for _ in range(3):
            daemon.send_signal(signal.SIGHUP)
            daemon.echo(b"served")
        for count in (1, 2):
            writer = threading.Thread(target=file.write, args=["[limits]\nbacklog = 5\n"])
            writer.start()
            daemon.wait_for("reloaded", count=count)
            writer.join()
        assert [event["changed"] for event in daemon.all("reloaded")] == [["limits.backlog"], []]
        daemon.send_signal(signal.SIGHUP)
        with daemon.connect() as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            daemon.send_signal(signal.SIGTERM)
            daemon.wait_for("draining")
            daemon.send_signal(signal.SIGHUP)
            daemon.wait_for("reload_ignored")
            file.write("")  # the reading thread has waited for it
            daemon.wait_for("reload_ignored", count=2)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        assert daemon.wait() == 0
        assert len(daemon.all("reloaded")) == 2


def test_backlog(start: Start, file: Configured) -> None:
    """A reload changes the backlog of the daemon's own sockets."""
    file.write("[limits]\nbacklog = 1\n")
    daemon = start("--config", str(file.path))
    daemon.freeze()
    with pytest.raises(TimeoutError):
        fill(daemon, 5)
    daemon.send_signal(signal.SIGCONT)
    file.reload(daemon, "[limits]\nbacklog = 100\n")
    daemon.freeze()
    fill(daemon, 20)
    daemon.send_signal(signal.SIGCONT)


def fill(daemon: Daemon, count: int) -> None:
    """Connect clients that the frozen daemon does not accept."""
    with contextlib.ExitStack() as clients:
        for _ in range(count):
            clients.enter_context(daemon.connect(timeout=0.5))
