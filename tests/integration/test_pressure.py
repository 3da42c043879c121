"""Too many clients, too few descriptors, clients that do not read."""

from __future__ import annotations

import resource
import select
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crowd import Crowd, Stuck
from harness import PATIENCE, UNHURRIED, receive, until

if TYPE_CHECKING:
    import socket

    from harness import Daemon, Start

DESCRIPTORS = 64
CLIENTS = 500


def limit_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))


def connect_all(daemon: Daemon, count: int) -> list[socket.socket]:
    """Connect clients that each send a message and wait for its echo."""
    clients = [daemon.connect() for _ in range(count)]
    for number, client in enumerate(clients):
        client.sendall(b"%05d" % number)
    return clients


def cpu_share(daemon: Daemon, seconds: float) -> float:
    """Return the share of one CPU that the daemon uses in the next seconds."""
    used, began = daemon.cpu_seconds(), time.monotonic()
    select.select([], [], [], seconds)
    return (daemon.cpu_seconds() - used) / (time.monotonic() - began)


def serve_out(clients: list[socket.socket]) -> list[bytes]:
    """Read the echo of each client as it arrives, close that client, and return all echoes in the clients' order."""
    echoes: dict[socket.socket, bytes] = {}
    while len(echoes) < len(clients):
        readable, _, _ = select.select([client for client in clients if client not in echoes], [], [], 20)
        assert readable, f"{len(clients) - len(echoes)} clients are not served"
        for client in readable:
            echoes[client] = receive(client, 5)
            client.close()
    return [echoes[client] for client in clients]


@pytest.mark.parametrize("when", ["from the start", "later"])
def test_descriptors_run_out(start: Start, when: str) -> None:
    """With 64 descriptors, all of 500 clients are served in the end. During the pause the daemon uses no CPU.

    A limit that is set before the start also limits the number of clients. After a later one, accept(2) fails.
    """
    daemon = start("--log.connections", "none", prepare=limit_descriptors if when == "from the start" else None)
    if when == "later":
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        cause = "EMFILE"
    else:
        assert daemon.wait_for("descriptor_limit")["limit"] == DESCRIPTORS
        cause = "max_connections"
    clients = connect_all(daemon, CLIENTS)
    paused = daemon.wait_for("accept_paused")
    assert paused["cause"] == cause
    assert paused["clients"] < DESCRIPTORS
    assert cpu_share(daemon, 1.5) < 0.05
    assert len(daemon.all("accept_paused")) == 1
    assert serve_out(clients) == [b"%05d" % number for number in range(CLIENTS)]
    daemon.wait_for("accept_resumed")
    assert len(daemon.all("accept_paused")) == 1
    assert daemon.stop() == 0
    totals = daemon.wait_for("stopped")
    assert (totals["connections"], totals["accept_pauses"]) == (CLIENTS, 1)


def test_stop_with_a_full_descriptor_table(start: Start) -> None:
    """In a stop without free descriptors, clients in the backlog are accepted as others leave."""
    daemon = start("--shutdown.quiet-period", "5")
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    clients = connect_all(daemon, CLIENTS)
    daemon.wait_for("accept_paused")
    daemon.send_signal(signal.SIGTERM)
    daemon.wait_for("draining")
    assert serve_out(clients) == [b"%05d" % number for number in range(CLIENTS)]
    assert daemon.wait() == 0
    assert daemon.receipt()["clients"] == CLIENTS
    assert not daemon.all("backlog_abandoned")


def test_stop_abandons_what_it_cannot_accept(start: Start) -> None:
    """At the deadline of a stop, clients still in the backlog for lack of descriptors are logged."""
    daemon = start("--shutdown.quiet-period", "5", "--shutdown.drain-timeout", "0.5", "--shutdown.linger-timeout", "0")
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    clients = connect_all(daemon, 100)
    daemon.wait_for("accept_paused")
    assert daemon.stop() == 0
    served = daemon.receipt()["clients"]
    assert daemon.wait_for("backlog_abandoned")["clients"] == 100 - served
    for client in clients:
        client.close()


def test_cap(start: Start) -> None:
    """At `max_connections`, each client in the backlog waits until another leaves. A stop serves all of them at once."""
    daemon = start("--limits.max-connections", "2", *UNHURRIED)
    clients = connect_all(daemon, 5)
    assert daemon.wait_for("accept_paused")["cause"] == "max_connections"
    assert select.select(clients, [], [], 5)[0] == clients[:2]
    clients[0].close()
    assert receive(clients[2], 5) == b"00002"
    assert select.select(clients[3:], [], [], 0.3)[0] == []
    daemon.send_signal(signal.SIGTERM)
    assert [receive(client, 5) for client in clients[3:]] == [b"00003", b"00004"]
    for client in clients[1:]:
        client.close()
    assert daemon.wait() == 0
    assert daemon.receipt()["completed"] == 4


def test_pauses_are_logged_if_a_client_waits(start: Start) -> None:
    """A pause begins when a client has to wait, not at `max_connections` itself. It ends when no client waits."""
    daemon = start("--limits.max-connections", "2")
    clients = connect_all(daemon, 2)
    serve = [receive(client, 5) for client in clients]
    assert serve == [b"00000", b"00001"]
    assert not daemon.all("accept_paused")
    clients += connect_all(daemon, 1)
    daemon.wait_for("accept_paused")
    clients[0].close()
    assert receive(clients[2], 5) == b"00000"
    clients[1].close()
    daemon.wait_for("accept_resumed")
    clients[2].close()


def test_stop_with_no_time_to_drain(start: Start) -> None:
    """With a `drain_timeout` of 0, clients in the backlog get EOF, not a reset."""
    daemon = start("--limits.max-connections", "1", "--shutdown.drain-timeout", "0")
    clients = connect_all(daemon, 20)
    assert receive(clients[0], 5) == b"00000"
    daemon.send_signal(signal.SIGTERM)
    assert [receive(client, 5) for client in clients[1:]] == [b""] * 19
    for client in clients:
        client.close()
    assert daemon.wait() == 0
    assert daemon.receipt()["cut"] == 20
    assert not daemon.all("backlog_abandoned")


def test_stop_with_a_full_descriptor_table_and_an_empty_backlog(start: Start) -> None:
    """The listening socket is closed at once, so that late clients are refused instead of reset."""
    daemon = start("--shutdown.quiet-period", "20", "--shutdown.drain-timeout", "20")
    with daemon.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        open_now = len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (open_now, open_now))
        daemon.send_signal(signal.SIGTERM)
        until(lambda: not daemon.listens())
    assert daemon.wait() == 0
    assert daemon.receipt()["completed"] == 1


def test_clients_that_do_not_read(start: Start) -> None:
    """200 clients that never read need bounded memory, delay no other client, and are reset in the end."""
    write_buffer, write_timeout, count = 65536, 3.0, 200
    daemon = start("--limits.write-timeout", str(write_timeout), "--limits.write-buffer", str(write_buffer))
    daemon.echo(b"warm")
    before = peak = daemon.memory()
    next_echo = 0.0

    def observe() -> bool:
        nonlocal peak, next_echo
        peak = max(peak, daemon.memory())
        if time.monotonic() > next_echo:
            daemon.echo(b"the others' echo goes on")
            next_echo = time.monotonic() + 0.2
        return all(peer.end for peer in crowd.peers)

    with Crowd() as crowd:
        for seed in range(count):
            crowd.add(daemon.connect(receive_buffer=4096), None, seed)
        crowd.pause_reading(*crowd.peers)
        crowd.run(observe, patience=2 * PATIENCE)
        assert peak - before < count * (write_buffer + 256 * 1024)
        assert {peer.end for peer in crowd.peers} == {"ConnectionResetError"}
        daemon.wait_for("client_closed", count=count, reason="stalled")
        lines = daemon.ledger()
        for peer in crowd.peers:
            line = lines[peer.port]
            assert line["reason"] == "stalled"
            assert line["seconds"] > write_timeout
            assert line["received"] > line["sent"] > line["acked"]
    assert daemon.stop() == 0


def test_slow_readers_are_not_stalled(start: Start) -> None:
    """A slow reader is still served, although the kernel reports its socket as full."""
    daemon = start("--limits.write-timeout", "1")
    with Crowd() as crowd:
        peer = crowd.add(daemon.connect(receive_buffer=4096), None, 1)
        crowd.pause_reading(peer)
        crowd.run(Stuck(peer))
        began = time.monotonic()

        def sip() -> bool:
            crowd.pause_reading(peer, reading=peer.received < 40_000 * (time.monotonic() - began))
            return time.monotonic() > began + 4

        crowd.run(sip)
        assert not peer.end
        assert not daemon.all("client_closed")


def test_idle(start: Start) -> None:
    """A client without a byte in either direction for `idle_timeout` is closed. An active one is not."""
    daemon = start("--limits.idle-timeout", "0.8")
    with daemon.connect() as idle, daemon.connect() as busy:
        idle.sendall(b"x")
        assert idle.recv(1) == b"x"
        while not select.select([idle], [], [], 0.2)[0]:
            busy.sendall(b"y")
            assert busy.recv(1) == b"y"
        assert idle.recv(1) == b""
        busy.sendall(b"z")
        assert busy.recv(1) == b"z"
        idle.close()
        line = daemon.wait_for("client_closed")
        assert line["reason"] == "idle"


def test_idle_client_that_still_takes_its_echo(start: Start) -> None:
    """A slow reader is not idle: bytes that leave the kernel's queue count as activity."""
    daemon = start("--limits.idle-timeout", "1")
    with Crowd() as crowd:
        peer = crowd.add(daemon.connect(receive_buffer=4096), 1_500_000, 1)
        peer.half_close = False
        crowd.pause_reading(peer)
        crowd.run(lambda: not peer.writing)
        began = time.monotonic()

        def sip() -> bool:
            crowd.pause_reading(peer, reading=peer.received < 300_000 * (time.monotonic() - began))
            return time.monotonic() > began + 4

        crowd.run(sip)
        peer.total = 1_600_000
        crowd.pause_reading(peer, reading=True)
        crowd.run(lambda: peer.received == peer.total)
        assert not daemon.all("client_closed")
