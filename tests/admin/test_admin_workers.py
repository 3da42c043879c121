"""Test the admin listener of a daemon with several workers."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from harness import UNHURRIED, receive, until
from watching import get, scrape, status
from workers import freeze, pids

if TYPE_CHECKING:
    from harness import Daemon, Start

WORKERS = 3
CLIENTS = 30


@pytest.fixture
def daemon(start: Start) -> Daemon:
    """Return a daemon with workers and an admin listener."""
    return start("--workers", str(WORKERS), "--admin.address", "127.0.0.1:0", *UNHURRIED)


def test_sums(daemon: Daemon) -> None:
    """Status and metrics are the sums of all workers, and list the workers. After a worker's death, no sum falls."""
    clients = [daemon.connect() for _ in range(CLIENTS)]
    for client in clients:
        client.sendall(b"x" * 100)
        assert receive(client, 100) == b"x" * 100
    for client in clients[:10]:
        client.close()
    until(lambda: scrape(daemon)["echod_connections_closed_total", name(daemon), "eof"] == 10)
    samples = scrape(daemon)
    listener_name = name(daemon)
    assert samples["echod_connections_total", listener_name] == CLIENTS
    assert samples["echod_received_bytes_total", listener_name] == CLIENTS * 100
    assert samples["echod_connection_duration_seconds_count", listener_name] == 10
    by_worker = [samples["echod_worker_clients", str(number)] for number in range(WORKERS)]
    assert sum(by_worker) == 20
    report = status(daemon)
    (listener,) = report["listeners"]
    assert (listener["accepted"], listener["active"], listener["received"]) == (CLIENTS, 20, CLIENTS * 100)
    assert report["clients"]["active"] == 20
    assert len(report["clients"]["most_traffic"]) == 10
    expected = [
        {"worker": number, "pid": pid, "clients": by_worker[number], "answers": True}
        for number, pid in sorted(pids(daemon).items())
    ]
    assert report["workers"] == expected

    os.kill(pids(daemon)[0], signal.SIGKILL)
    daemon.wait_for("worker_ready", worker=0, count=2)
    after = scrape(daemon)
    assert after["echod_received_bytes_total", listener_name] == CLIENTS * 100
    assert after["echod_connection_duration_seconds_count", listener_name] == 10
    assert after["echod_worker_clients", "0"] == 0
    daemon.send_signal()
    daemon.wait_for("draining")
    assert get(daemon, "/readyz").status == 503
    assert status(daemon)["stop"]["seconds_left"] > 0
    for client in clients:
        client.close()
    assert daemon.wait() == 0


def name(daemon: Daemon) -> str:
    return str(daemon.all("listening")[0]["listener"])


def test_worker_that_does_not_answer(daemon: Daemon) -> None:
    """A worker that does not answer is reported and not waited for. Its last figures count."""
    victim = pids(daemon)[1]
    assert all(worker["answers"] for worker in status(daemon)["workers"])
    freeze(victim)
    assert [worker["answers"] for worker in status(daemon)["workers"]] == [True, False, True]
    os.kill(victim, signal.SIGCONT)
    until(lambda: all(worker["answers"] for worker in status(daemon)["workers"]))
    assert daemon.stop() == 0


def test_reload(start: Start) -> None:
    """The status has the settings in force, the reloads, and a pause of accepting."""
    daemon = start("--workers", "2", "--admin.address", "127.0.0.1:0", "--limits.max-connections", "1", *UNHURRIED)
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("reloaded")
    with daemon.connect() as client:
        client.sendall(b"x")
        assert receive(client, 1) == b"x"
        waiting = [daemon.connect() for _ in range(20)]
        until(lambda: status(daemon)["listeners"][0]["accept_paused"])
        report = status(daemon)
        assert report["reloads"] == {"success": 1}
        assert report["listeners"][0]["max_connections"] == 1
        for each in waiting:
            each.close()
    assert daemon.stop() == 0
