"""Kill workers, reload and restart while clients connect. `make soak-workers` does so for minutes."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from connects import Connects
from harness import UNHURRIED, Daemon, until
from workers import freeze, inheriting, pids

if TYPE_CHECKING:
    from harness import Start

# A soak test sets a higher number.
ROUNDS = int(os.environ.get("SOAK_ROUNDS", "4"))
RATE = 500 if "SOAK_ROUNDS" in os.environ else 100

# Clients per second that wait while there is no daemon: fewer, so that the backlog suffices for a slow start.
WAITING_RATE = 50

# Clients that are served between two rounds: a second's, or fewer in a short test.
BETWEEN = RATE if "SOAK_ROUNDS" in os.environ else 10


def sockets(pid: int) -> int:
    """Return the number of a process's open sockets."""
    links = (str(descriptor.readlink()) for descriptor in Path(f"/proc/{pid}/fd").iterdir())
    return sum(link.startswith("socket:") for link in links)


def wait_for_clients(connects: Connects, number: int) -> None:
    """Wait until this many more clients have been served."""
    served = connects.served
    until(lambda: connects.served >= served + number)


def test_kills_under_load(start: Start) -> None:
    """When workers are killed, only connections fail that the killed worker had accepted. All others are served."""
    daemon = start("--workers", "4", "--log.connections", "none", *UNHURRIED)
    own = {sockets(pid) for pid in pids(daemon).values()}
    assert len(own) == 1
    accepted = 0
    victims: list[int] = []
    deaths = dict.fromkeys(range(4), 0)
    with Connects(daemon.address, RATE) as connects:
        for _ in range(ROUNDS):
            # Each worker once in four rounds: five deaths of one worker within ten seconds would end the daemon.
            victims = victims or random.sample(range(4), 4)
            number = victims.pop()
            pid = daemon.wait_for("worker_ready", worker=number, count=deaths[number] + 1)["pid"]
            freeze(pid)
            wait_for_clients(connects, BETWEEN // 2)
            accepted += sockets(pid) - min(own)
            os.kill(pid, signal.SIGKILL)
            deaths[number] += 1
            wait_for_clients(connects, BETWEEN // 2)
        connects.finish()
    assert connects.served + len(connects.failures) == connects.begun
    assert len(connects.failures) <= accepted, connects.failures
    assert daemon.stop() == 0
    assert len(daemon.all("worker_failed")) == ROUNDS
    _report(f"{ROUNDS} kills: {connects.served} clients served, {len(connects.failures)} of {accepted} accepted failed")


def test_reloads_under_load(start: Start, tmp_path: Path) -> None:
    """No connect fails during reloads."""
    file = tmp_path / "echo.toml"
    file.write_text("")
    daemon = start("--workers", "2", "--log.connections", "none", "--config", str(file), *UNHURRIED)
    with Connects(daemon.address, RATE) as connects:
        for number in range(1, ROUNDS + 1):
            file.write_text(f"limits.write_buffer = {32768 + number}\n")
            daemon.send_signal(signal.SIGHUP)
            daemon.wait_for("reloaded", count=number)
            wait_for_clients(connects, 5)
        connects.finish()
    assert connects.failures == []
    assert connects.served == connects.begun > 0
    assert daemon.stop() == 0
    assert daemon.loud() == []
    _report(f"{ROUNDS} reloads: {connects.served} clients served, none failed")


def test_restarts_under_load(loop_name: str) -> None:
    """During restarts on an inherited socket, no connect fails and no echo is lost."""
    arguments = ("--loop", loop_name, "--workers", "2", *UNHURRIED)
    with (
        socket.create_server(("127.0.0.1", 0), backlog=4096) as sock,
        Connects(sock.getsockname(), WAITING_RATE) as connects,
    ):
        for _ in range(ROUNDS):
            with inheriting(sock, *arguments) as daemon:
                # Otherwise clients could wait in the queue for several rounds.
                begun = connects.begun
                until(lambda begun=begun: connects.served >= begun)  # type: ignore[misc]
                _stop(daemon)
        with inheriting(sock, *arguments) as daemon:
            connects.finish()
            _stop(daemon)
    assert connects.failures == []
    assert connects.served == connects.begun > 0
    _report(f"{ROUNDS} restarts on {loop_name}: {connects.served} clients served, none failed")


def _stop(daemon: Daemon) -> None:
    """Stop a daemon that loses no byte."""
    assert daemon.stop() == 0
    receipt = daemon.receipt()
    assert (receipt["unsent_bytes"], receipt["unacked_bytes"]) == (0, 0)


def _report(text: str) -> None:
    sys.stdout.write(f"{text}\n")
