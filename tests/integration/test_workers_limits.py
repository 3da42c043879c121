"""Test the limits that several workers share, and how they divide the clients."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from harness import UNHURRIED, Daemon, until
from workers import inheriting, pids

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness import Start

WORKERS = 3
LIMIT = 10


class Queue:
    """Clients that wait for the echo of one byte."""

    def __init__(self, clients: list[socket.socket]) -> None:
        self.waiting = clients
        self.served: list[socket.socket] = []
        self.lost = 0

    def wait_for(self, number: int) -> None:
        """Wait until this many clients are connected and have their echo."""

        def are_served() -> bool:
            for client in list(self.waiting):
                if has_byte(client):
                    self.waiting.remove(client)
                    self.served.append(client)
            return len(self.served) >= number

        until(are_served)
        assert len(self.served) == number

    def close(self, number: int) -> None:
        """Close some of the clients that have been served."""
        for client in self.served[:number]:
            client.close()
        del self.served[:number]

    def drop_ended(self) -> None:
        """Drop those clients whose connection has ended."""
        for client in list(self.served):
            try:
                client.recv(1)
            except BlockingIOError:
                continue
            except ConnectionError:
                pass
            client.close()
            self.served.remove(client)


def has_byte(client: socket.socket) -> bool:
    """Receive the client's echo, if it has arrived."""
    try:
        return bool(client.recv(1))
    except BlockingIOError:
        return False


@pytest.fixture
def queue() -> Iterator[Queue]:
    """Return a queue whose clients are closed after the test."""
    queue = Queue([])
    yield queue
    for client in queue.waiting + queue.served:
        client.close()


def join(daemon: Daemon, queue: Queue, number: int) -> None:
    """Connect more clients, each of which sends a byte."""
    for _ in range(number):
        client = daemon.connect()
        client.send(b"x")
        client.setblocking(False)
        queue.waiting.append(client)


def test_max_connections(start: Start, queue: Queue, tmp_path: Path) -> None:
    """All workers together have exactly `max_connections` clients, also after a worker's death and a reload."""
    file = tmp_path / "echo.toml"
    file.write_text(f"limits.max_connections = {LIMIT}\n")
    daemon = start("--workers", str(WORKERS), "--config", str(file), *UNHURRIED)
    join(daemon, queue, 8 * LIMIT)
    queue.wait_for(LIMIT)
    daemon.wait_for("accept_paused", count=WORKERS)
    queue.wait_for(LIMIT)
    queue.close(3)
    queue.wait_for(LIMIT)

    os.kill(pids(daemon)[1], signal.SIGKILL)
    daemon.wait_for("worker_ready", worker=1, count=2)
    queue.drop_ended()
    queue.wait_for(LIMIT)

    file.write_text(f"limits.max_connections = {2 * LIMIT}\n")
    daemon.send_signal(signal.SIGHUP)
    queue.wait_for(2 * LIMIT)

    file.write_text(f"limits.max_connections = {LIMIT}\n")
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("reloaded", count=2)
    queue.close(LIMIT + 1)
    queue.wait_for(LIMIT)
    while queue.waiting:
        queue.close(LIMIT)
        queue.wait_for(min(LIMIT, len(queue.waiting)))
    queue.close(LIMIT)
    assert daemon.stop() == 0


def test_max_connections_per_client(start: Start, queue: Queue, tmp_path: Path) -> None:
    """All workers together have exactly `max_connections_per_client` clients of one address. A reload sets it, too."""
    file = tmp_path / "echo.toml"
    file.write_text("")
    daemon = start("--workers", str(WORKERS), "--config", str(file), "--log.connections", "all", *UNHURRIED)
    join(daemon, queue, 6)
    queue.wait_for(6)
    file.write_text("limits.max_connections_per_client = 8\n")
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("reloaded")
    daemon.echo(b"another address")
    for _ in range(20):
        with daemon.connect() as client:
            client.send(b"x")
            try:
                echo = client.recv(1)
            except ConnectionResetError:
                echo = b""
            if echo:
                queue.served.append(client.dup())
    assert len(queue.served) == 8


@pytest.fixture(params=["own", "inherited", "unix"])
def balanced(request: pytest.FixtureRequest, loop_name: str, tmp_path: Path) -> Iterator[tuple[Daemon, str]]:
    """Return a daemon with four workers, and the address of its socket of each kind."""
    arguments = ("--loop", loop_name, "--workers", "4", "--log.connections", "all", *UNHURRIED)
    with contextlib.ExitStack() as stack:
        if request.param == "inherited":
            sock = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
            daemon = inheriting(sock, *arguments)
        else:
            listen = "127.0.0.1:0" if request.param == "own" else f"unix:{tmp_path}/sock"
            daemon = Daemon(*arguments, listen=listen)
        stack.callback(daemon.end)
        yield daemon, daemon.wait_for("listening")["address"]


def test_balance(balanced: tuple[Daemon, str]) -> None:
    """Long-lived connections are divided evenly. The kernel divides those to own TCP sockets by a hash, so at random."""
    daemon, address = balanced
    # 2,000 connections: at random, a worker has 20% more or fewer than 500 once in ten million runs.
    clients: list[socket.socket] = []
    try:
        for _ in range(2000):
            unix = address.startswith("unix:")
            client = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
            clients.append(client)
            client.connect(address.removeprefix("unix:") if unix else daemon.address)
            client.send(b"x")
        for client in clients:
            assert client.recv(1) == b"x"
    finally:
        for client in clients:
            client.close()
    assert daemon.stop() == 0
    spread = Counter(line["worker"] for line in daemon.all("client_closed"))
    assert sum(spread.values()) == 2000
    assert len(spread) == 4
    assert all(400 <= clients <= 600 for clients in spread.values()), spread
