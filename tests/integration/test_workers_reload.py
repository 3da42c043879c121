"""Test reloads and the log of a daemon with several workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from crowd import Crowd
from harness import PATIENCE, UNHURRIED, Daemon, receive, until
from workers import freeze, pids

if TYPE_CHECKING:
    from pathlib import Path

    from certificates import Certificates
    from harness import Start

WORKERS = 2


def reload(daemon: Daemon, outcome: str) -> None:
    """Send SIGHUP, and wait for the outcome."""
    before = len(daemon.all(outcome))
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for(outcome, count=before + 1)


def modes(daemon: Daemon, number: int) -> set[bytes]:
    """Return the first bytes that new clients of several workers get: an echo, or a description in mode info."""
    first: set[bytes] = set()
    for _ in range(number):
        with daemon.connect() as client:
            client.sendall(b"x\n")
            first.add(receive(client, 1))
    return first


def test_all_or_none(start: Start, tmp_path: Path) -> None:
    """A reload applies to all workers, and also to a worker that is started later. Invalid settings apply to none."""
    file = tmp_path / "echo.toml"
    table = '[listeners.a]\naddress = "127.0.0.1:0"\nmode = "{}"\n'
    file.write_text(table.format("stream"))
    daemon = start("--workers", str(WORKERS), "--config", str(file), *UNHURRIED, listen=None)
    assert modes(daemon, 20) == {b"x"}
    file.write_text(table.format("info") + "fault = 'missing'\n")
    reload(daemon, "reload_failed")
    assert modes(daemon, 20) == {b"x"}
    file.write_text(table.format("info"))
    reload(daemon, "reloaded")
    # The workers have the new settings once they have answered another message.
    reload(daemon, "reloaded")
    assert modes(daemon, 20) == {b"{"}
    os.kill(pids(daemon)[0], signal.SIGKILL)
    daemon.wait_for("worker_ready", worker=0, count=2)
    assert modes(daemon, 20) == {b"{"}
    assert daemon.stop() == 0


def test_removed_listener(start: Start, tmp_path: Path, certificates: Certificates) -> None:
    """A listener that a reload removes is served until a restart, also by a worker that is started later."""
    file = tmp_path / "echo.toml"
    certificate, key = certificates.issue("soon", "localhost", "127.0.0.1", days=5)
    tls = f'tls = {{ certificate = "{certificate}", private_key = "{key}" }}\n'
    file.write_text(f'listen = ["127.0.0.1:0"]\n[listeners.old]\naddress = "127.0.0.1:0"\n{tls}')
    daemon = start("--workers", str(WORKERS), "--config", str(file), *UNHURRIED, listen=None)
    daemon.wait_for("certificate_ends_soon", listener="old")
    address = daemon.wait_for("listening", listener="old")["address"].rpartition(":")
    file.write_text('listen = ["127.0.0.1:0"]\n')
    reload(daemon, "reloaded")
    assert daemon.wait_for("restart_needed")["settings"] == ["listeners.old"]
    for number in range(WORKERS):
        os.kill(pids(daemon)[number], signal.SIGKILL)
        daemon.wait_for("worker_ready", worker=number, count=2)
    reload(daemon, "reloaded")
    for _ in range(10):
        sock = socket.create_connection((address[0], int(address[2])), PATIENCE)
        with certificates.over(sock) as client:
            client.send(b"over TLS")
            assert client.recv(8) == b"over TLS"
    assert daemon.stop() == 0


def test_worker_that_does_not_answer(start: Start, tmp_path: Path) -> None:
    """A reload fails if a worker does not check the settings in time."""
    code = "from echod.workers import supervisor; supervisor._ANSWER = 0.5; from echod.cli import main; main()"
    file = tmp_path / "echo.toml"
    file.write_text("")
    daemon = start("--workers", str(WORKERS), "--config", str(file), *UNHURRIED, module=("-c", code))
    victim = pids(daemon)[1]
    freeze(victim)
    reload(daemon, "reload_failed")
    assert daemon.all("reload_failed")[0]["problems"] == ["worker 1 does not answer"]
    os.kill(victim, signal.SIGCONT)
    daemon.echo(b"unchanged")
    assert daemon.stop() == 0


def test_under_load(start: Start, tmp_path: Path, certificates: Certificates) -> None:
    """During reloads, clients of all workers lose no byte. Each reload reads the certificates again."""
    file = tmp_path / "echo.toml"
    options = certificates.options()

    def write(number: int) -> None:
        tls = f'tls = {{ certificate = "{options[3]}", private_key = "{options[5]}" }}'
        file.write_text(f'[limits]\nwrite_buffer = {32768 + number}\n[listeners.tls]\naddress = "127.0.0.1:0"\n{tls}\n')

    write(0)
    daemon = start("--workers", str(WORKERS), "--config", str(file), *UNHURRIED, listen=None)
    with Crowd() as crowd:
        for seed in range(10):
            crowd.add(certificates.over(daemon.connect()), 10**12, seed)
        for number in range(1, 6):
            write(number)
            daemon.send_signal(signal.SIGHUP)
            crowd.run(lambda number=number: len(daemon.all("reloaded")) == number)  # type: ignore[misc]
        for peer in crowd.peers:
            peer.stop()
        crowd.run(lambda: all(peer.end for peer in crowd.peers))
        assert {(peer.end, peer.wrong, peer.received - peer.sent) for peer in crowd.peers} == {("eof", False, 0)}
    assert daemon.stop() == 0
    assert daemon.loud() == []


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_whole_lines(loop_name: str, kind: str, tmp_path: Path) -> None:
    """Lines of all processes are whole, and those of workers have their number. SIGHUP reopens the file in all."""
    file = tmp_path / "log"
    arguments = ["--workers", "4", "--loop", loop_name, "--log.connections", "all", "--log.level", "debug", *UNHURRIED]
    if kind == "file":
        arguments += ["--log.file", str(file), "--log.format", "json"]
    with Daemon(*arguments, read_log=False) as daemon:
        if kind == "pipe":
            daemon.start_reading()
        else:
            until(lambda: file.exists() and b'"listening"' in file.read_bytes())
            address = next(
                json.loads(line)["address"] for line in file.read_text().splitlines() if '"listening"' in line
            )
        clients = 300
        # Many at once, so that the lines of all workers are written at the same time.
        target = daemon.address if kind == "pipe" else ("127.0.0.1", int(address.rpartition(":")[2]))
        threads = [threading.Thread(target=_connect, args=(target, clients)) for _ in range(4)]
        for thread in threads:
            thread.start()
        if kind == "file":
            file.rename(tmp_path / "log.1")
            daemon.send_signal(signal.SIGHUP)
        for thread in threads:
            thread.join()
        daemon.send_signal()
        assert daemon.wait() == 0
        lines = daemon.raw
        if kind == "file":
            lines = (tmp_path / "log.1").read_text().splitlines() + file.read_text().splitlines()
    events = [json.loads(line) for line in lines]
    closed = [event for event in events if event["event"] == "client_closed"]
    assert len(closed) == 4 * clients
    assert {event["worker"] for event in closed} == {0, 1, 2, 3}
    assert "worker" not in next(event for event in events if event["event"] == "stopped")


def _connect(target: tuple[str, int], number: int) -> None:
    for _ in range(number):
        with socket.create_connection(target, PATIENCE) as client:
            client.sendall(b"x")
            client.recv(1)


def test_stalled_log(start: Start) -> None:
    """A log whose reader stalls stops no echo of any worker."""
    daemon = start("--workers", str(WORKERS), "--log.connections", "all", *UNHURRIED, read_log=False)
    line = b""
    while b'"listening"' not in line:
        line = daemon.log_pipe.readline()
    address = ("127.0.0.1", int(json.loads(line)["address"].rpartition(":")[2]))
    _connect(address, 2000)  # each worker's lines fill the pipe
    for _ in range(10):
        with socket.create_connection(address, PATIENCE) as client:
            client.sendall(b"still")
            assert receive(client, 5) == b"still"
    daemon.send_signal()
    rest = daemon.log_pipe.read()
    assert daemon.process.wait(PATIENCE) == 0
    assert b'"stopped"' in rest
    for each in rest.splitlines():
        json.loads(each)
