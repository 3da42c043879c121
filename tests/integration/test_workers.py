"""Test daemons with several workers: service, signals, and the end of any process."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crowd import Crowd
from echod.workers import cpus
from harness import PATIENCE, UNHURRIED, receive, until
from workers import freeze, is_alive, pids, spawner

if TYPE_CHECKING:
    from harness import Daemon, Start

WORKERS = 3


@pytest.fixture
def daemon(start: Start) -> Daemon:
    """Return a daemon with workers that log every connection."""
    return start("--workers", str(WORKERS), "--log.connections", "all", *UNHURRIED)


def connect_all(daemon: Daemon, number: int) -> list[socket.socket]:
    """Return connected clients that have sent a message each."""
    clients = [daemon.connect() for _ in range(number)]
    for index, client in enumerate(clients):
        client.sendall(b"%6d" % index)
    return clients


def check_echo(clients: list[socket.socket]) -> None:
    """Check the echo of the messages of `connect_all`."""
    assert [receive(client, 6) for client in clients] == [b"%6d" % index for index in range(len(clients))]


def test_one_daemon(daemon: Daemon) -> None:
    """Several processes serve. One draining, one receipt and one total cover all of them."""
    assert daemon.wait_for("started")["workers"] == WORKERS
    assert sorted(pids(daemon)) == list(range(WORKERS))
    clients = connect_all(daemon, 60)
    check_echo(clients)
    daemon.send_signal()
    assert daemon.wait_for("draining")["clients"] == 60
    for client in clients:
        client.close()
    assert daemon.wait() == 0
    receipt = daemon.receipt()
    lines = daemon.ledger().values()
    assert receipt["clients"] == receipt["completed"] == len(lines) == 60
    assert {line["worker"] for line in lines} == set(range(WORKERS))
    assert daemon.wait_for("stopped")["received"] == sum(line["received"] for line in lines) == 360
    assert len(daemon.all("draining")) == len(daemon.all("drained")) == len(daemon.all("stopped")) == 1
    assert daemon.loud() == []


def test_one_worker_is_one_process(start: Start) -> None:
    """With one worker there is no other process."""
    daemon = start("--workers", "1")
    assert "workers" not in daemon.wait_for("started")
    assert Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text() == ""


def test_drain_under_load(daemon: Daemon) -> None:
    """A stop loses no byte of clients that stream to all workers, and the receipt is the sum of their lines."""
    with Crowd() as crowd:
        for seed in range(60):
            crowd.add(daemon.connect(), None, seed)
        crowd.run(lambda: all(peer.received > 100_000 for peer in crowd.peers))
        daemon.send_signal()
        crowd.run(lambda: bool(daemon.all("draining")))
        for peer in crowd.peers:
            peer.stop()
        crowd.run(lambda: all(peer.end for peer in crowd.peers))
        assert daemon.wait() == 0
        ledger = daemon.ledger()
        for peer in crowd.peers:
            assert (peer.end, peer.wrong, peer.received) == ("eof", False, peer.sent)
            line = ledger[peer.port]
            assert line["received"] == line["sent"] == line["acked"] == peer.sent
    assert {line["worker"] for line in ledger.values()} == set(range(WORKERS))
    receipt = daemon.receipt()
    assert (receipt["clients"], receipt["unsent_bytes"], receipt["unacked_bytes"]) == (60, 0, 0)
    assert daemon.wait_for("stopped")["received"] == sum(line["received"] for line in ledger.values())


def test_queue_of_a_killed_worker(daemon: Daemon) -> None:
    """Connections in the queue of a worker that is killed are served by its successor."""
    victim = pids(daemon)[1]
    freeze(victim)
    clients = connect_all(daemon, 100)
    os.kill(victim, signal.SIGKILL)
    check_echo(clients)
    failed = daemon.wait_for("worker_failed")
    assert (failed["worker"], failed["pid"], failed["signal"], failed["deaths"]) == (1, victim, "SIGKILL", 1)
    assert daemon.wait_for("worker_ready", worker=1, count=2)["pid"] != victim
    for client in clients:
        client.close()
    assert daemon.stop() == 0
    lines = list(daemon.ledger().values())
    assert len(lines) == 100
    assert any(line["worker"] == 1 for line in lines)


def test_clients_of_other_workers_stay(daemon: Daemon) -> None:
    """A worker's death ends its own clients only."""
    clients = connect_all(daemon, 60)
    check_echo(clients)
    os.kill(pids(daemon)[0], signal.SIGKILL)
    daemon.wait_for("worker_ready", worker=0, count=2)
    alive = 0
    for client in clients:
        try:
            client.sendall(b"again")
            alive += receive(client, 5) == b"again"
        except ConnectionError:
            pass
        client.close()
    assert daemon.stop() == 0
    assert alive == len(daemon.ledger()) < 60


def test_signal_to_the_group(start: Start) -> None:
    """Ctrl-C reaches all processes of a terminal's group. Only the parent acts on it."""
    daemon = start("--workers", "2", *UNHURRIED, prepare=os.setpgrp)
    with daemon.connect() as client:
        os.killpg(daemon.pid, signal.SIGINT)
        daemon.wait_for("draining")
        client.sendall(b"still here")
        assert receive(client, 10) == b"still here"
    assert daemon.wait() == 0
    assert daemon.receipt()["completed"] == 1


@pytest.mark.parametrize(("first", "second", "code"), [("TERM", "INT", 130), ("QUIT", "", 131)])
def test_abort(daemon: Daemon, first: str, second: str, code: int) -> None:
    """A second signal or SIGQUIT resets the clients of all workers."""
    clients = connect_all(daemon, 20)
    check_echo(clients)
    daemon.send_signal(signal.Signals[f"SIG{first}"])
    daemon.wait_for("draining")
    if second:
        daemon.send_signal(signal.Signals[f"SIG{second}"])
    for client in clients:
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        client.close()
    assert daemon.wait() == code
    assert daemon.receipt()["aborted"] == 20


def test_auto(start: Start) -> None:
    """There is a worker for each CPU, or a single process if there is only one."""
    daemon = start("--workers", "auto")
    daemon.echo(b"served")
    assert daemon.wait_for("started").get("workers", 1) == cpus.usable()


def test_delay(start: Start) -> None:
    """During `shutdown.delay`, all workers accept, and a worker that dies is replaced. A second signal ends the delay."""
    daemon = start("--workers", "2", "--shutdown.delay", "60", *UNHURRIED)
    daemon.send_signal()
    daemon.wait_for("draining")
    os.kill(pids(daemon)[0], signal.SIGKILL)
    clients = connect_all(daemon, 20)
    check_echo(clients)
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait() == 143
    assert daemon.receipt()["aborted"] == 20
    for client in clients:
        client.close()


def test_worker_lost_in_a_drain(daemon: Daemon) -> None:
    """A worker that dies during the drain is not replaced. Its clients are counted as failed, and the receipt says so."""
    clients = connect_all(daemon, 60)
    check_echo(clients)
    daemon.send_signal()
    daemon.wait_for("draining")
    until(lambda: not daemon.listens())
    os.kill(pids(daemon)[2], signal.SIGKILL)
    daemon.wait_for("worker_failed", worker=2)
    for client in clients:
        client.close()
    assert daemon.wait() == 1
    receipt = daemon.receipt()
    assert (receipt["clients"], receipt["workers_lost"]) == (60, 1)
    assert receipt["completed"] == len(daemon.ledger())
    assert receipt["failed"] == 60 - receipt["completed"] > 0


def test_parent_lost(daemon: Daemon) -> None:
    """Workers whose parent is killed drain and end, and so does the spawner."""
    processes = [*pids(daemon).values(), spawner(daemon)]
    with daemon.connect() as client:
        client.sendall(b"before")
        assert receive(client, 6) == b"before"
        daemon.send_signal(signal.SIGKILL)
        daemon.wait_for("parent_lost", count=WORKERS)
        client.sendall(b"after")
        assert receive(client, 5) == b"after"
    until(lambda: not any(map(is_alive, processes)))
    daemon.wait()
    assert [line["received"] for line in daemon.all("client_closed")] == [11]


def test_spawner_lost(daemon: Daemon) -> None:
    """If the spawner is killed, the daemon drains and exits with 1."""
    processes = [*pids(daemon).values(), spawner(daemon)]
    with daemon.connect() as client:
        client.sendall(b"before")
        assert receive(client, 6) == b"before"
        os.kill(spawner(daemon), signal.SIGKILL)
        daemon.wait_for("spawner_lost")
        assert daemon.wait_for("draining")["signal"] is None
        client.sendall(b"after")
        assert receive(client, 5) == b"after"
    assert daemon.wait() == 1
    assert daemon.receipt()["completed"] == 1
    until(lambda: not any(map(is_alive, processes)))


def test_five_deaths(daemon: Daemon) -> None:
    """A worker that dies five times within ten seconds ends the daemon, after a drain."""
    with daemon.connect() as client:
        client.sendall(b"before")
        assert receive(client, 6) == b"before"
        for death in range(1, 6):
            victim = daemon.wait_for("worker_ready", worker=1, count=death)["pid"]
            os.kill(victim, signal.SIGKILL)
        assert daemon.wait_for("worker_failed", count=5)["deaths"] == 5
        daemon.wait_for("workers_failing")
        daemon.wait_for("draining")
    assert daemon.wait() == 1
    assert len(daemon.all("worker_failed")) == 5


def test_stuck_worker(start: Start) -> None:
    """A worker whose loop does not run is killed and replaced."""
    code = "from echod.workers import supervisor; supervisor._STUCK = 2.0; from echod.cli import main; main()"
    daemon = start("--workers", "2", *UNHURRIED, module=("-c", code))
    victim = pids(daemon)[0]
    freeze(victim)
    assert daemon.wait_for("worker_stuck", worker=0)["seconds"] >= 2
    assert daemon.wait_for("worker_failed")["signal"] == "SIGKILL"
    assert daemon.wait_for("worker_ready", worker=0, count=2)["pid"] != victim
    daemon.echo(b"served")
    assert daemon.stop() == 0


def test_pause_of_all(start: Start) -> None:
    """After a pause of all processes, no worker counts as stuck."""
    code = "from echod.workers import supervisor; supervisor._STUCK = 2.0; from echod.cli import main; main()"
    daemon = start("--workers", "2", *UNHURRIED, module=("-c", code))
    assert PATIENCE > 3
    processes = [daemon.pid, *pids(daemon).values()]
    for pid in processes:
        freeze(pid)
    before = os.times().elapsed
    until(lambda: os.times().elapsed - before > 3)
    for pid in reversed(processes):
        os.kill(pid, signal.SIGCONT)
    daemon.echo(b"served")
    assert daemon.stop() == 0
    assert daemon.loud() == []


def test_watchdog(start: Start, tmp_path: Path) -> None:
    """The parent is ready once all workers accept. It feeds the watchdog only while all of them answer."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(PATIENCE)
        daemon = start("--workers", "2", *UNHURRIED, env={"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "900000"})
        message = manager.recv(4096)
        assert b"READY=1" in message
        assert b"WATCHDOG=1" in message
        victim = pids(daemon)[0]
        freeze(victim)
        while b"WATCHDOG" in manager.recv(4096):
            pass
        os.kill(victim, signal.SIGCONT)
        while b"WATCHDOG" not in manager.recv(4096):
            pass
        daemon.send_signal()
        while b"Drained: clients=0" not in manager.recv(4096):
            pass
        assert daemon.wait() == 0
