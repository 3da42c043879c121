"""The clients in the status: paused ones, round trips, and the side that caused an end."""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import TYPE_CHECKING, Any

import pytest

from crowd import Crowd, Stuck
from echod.admin import notable
from echod.admin import status as report
from echod.connection.outcome import MEANINGS
from echod.net.kernel import TcpInfo
from harness import PATIENCE, receive, reset, until
from watching import WATCHED, status

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Start

pytestmark = pytest.mark.once


def test_paused_clients(start: Start) -> None:
    """A paused client is listed although others have more traffic, the one with the least traffic first."""
    daemon = start(*WATCHED, "--limits.write-timeout", "600")
    with Crowd() as crowd, contextlib.ExitStack() as opened:
        paused = [crowd.add(daemon.connect(receive_buffer=4096), None, seed) for seed in range(12)]
        crowd.pause_reading(*paused)
        stuck = [Stuck(peer) for peer in paused]
        crowd.run(lambda: min(each() for each in stuck))  # each is called every time
        busy = [opened.enter_context(daemon.connect()) for _ in range(3)]
        for client in busy:
            client.sendall(b"x" * 10)
            assert receive(client, 10) == b"x" * 10
        until(lambda: status(daemon)["clients"]["states"]["paused"] == 12)
        clients = status(daemon)["clients"]
        ports = {f"127.0.0.1:{peer.port}" for peer in paused}
        assert len(clients["paused"]) == 10
        assert {entry["peer"] for entry in clients["paused"]} < ports
        assert {entry["state"] for entry in clients["paused"]} == {"paused"}
        assert all(entry["unsent"] for entry in clients["paused"])
        figures = [(entry["received_per_second"], entry["received"]) for entry in clients["paused"]]
        assert figures == sorted(figures)
        crowd.pause_reading(*paused, reading=True)
        for peer in paused:
            peer.stop()
        crowd.finish()
        assert status(daemon)["clients"]["paused"] == []


def test_round_trips(start: Start, tmp_path: Path) -> None:
    """The kernel's round trip and retransmits are listed for each client, and null for a unix socket."""
    daemon = start(*WATCHED, "--listeners.local.address", f"unix:{tmp_path}/echo.sock")
    with daemon.connect() as client, socket.socket(socket.AF_UNIX) as local:
        local.settimeout(PATIENCE)
        local.connect(f"{tmp_path}/echo.sock")
        for sock in (client, local):
            sock.sendall(b"12345")
            assert receive(sock, 5) == b"12345"
        entries = {entry["listener"]: entry for entry in status(daemon)["clients"]["most_traffic"]}
    assert 0 < entries["127.0.0.1:0"]["rtt_ms"] < 1000 * PATIENCE
    assert entries["127.0.0.1:0"]["retransmits"] >= 0
    assert (entries["local"]["rtt_ms"], entries["local"]["retransmits"]) == (None, None)
    assert daemon.stop() == 0


def test_round_trip_of_a_client_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that leaves during a report has its final figures, or none if the kernel refuses them."""

    def refuse(_: socket.socket) -> TcpInfo:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("echod.net.kernel.tcp_info", refuse)
    session: Any = type("Session", (), {"tcp_info": None, "sock": None})
    assert notable._tcp_info(session) is None
    session.tcp_info = TcpInfo(1.5, 2, 3)
    assert notable._tcp_info(session) == (1.5, 2, 3)


def test_closed_connections(start: Start, tmp_path: Path) -> None:
    """Closed connections of all listeners are counted by reason, with the side that caused it, most first."""
    config = tmp_path / "echo.toml"
    config.write_text(
        '[faults.flaky]\naction = "reset"\n[listeners.broken]\naddress = "127.0.0.1:0"\nfault = "flaky"\n'
        '[listeners.other]\naddress = "127.0.0.1:0"\n'
    )
    daemon = start(*WATCHED, "--config", str(config))
    ports = {
        name: int(daemon.wait_for("listening", listener=name)["address"].rpartition(":")[2])
        for name in ("broken", "other")
    }
    for _ in range(2):
        with daemon.connect() as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            reset(client)
    with daemon.connect() as client, socket.create_connection(("127.0.0.1", ports["other"]), PATIENCE) as other:
        for sock in (client, other):
            sock.sendall(b"x")
            sock.shutdown(socket.SHUT_WR)
            assert receive(sock, 2) == b"x"
    daemon.echo(b"x")
    with socket.create_connection(("127.0.0.1", ports["broken"]), PATIENCE) as broken:
        broken.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            broken.recv(1)
    daemon.wait_for("client_closed", count=6)
    assert list(status(daemon)["closed"].items()) == [
        ("eof", {"connections": 3, "caused_by": None}),
        ("reset", {"connections": 2, "caused_by": "client"}),
        ("fault", {"connections": 1, "caused_by": "echod"}),
    ]
    assert daemon.stop() == 0


def test_sides() -> None:
    """A reason blames the client, echod, or neither if nothing went wrong."""
    sides = {reason: report._side(reason) for reason in MEANINGS}
    assert {reason for reason, side in sides.items() if side is None} == {"eof", "idle", "info", "quiet", "cut"}
    assert {reason for reason, side in sides.items() if side == "echod"} == {"aborted", "fault", "io_error", "failed"}
    assert {reason for reason, side in sides.items() if side == "client"} == {
        reason for reason, meaning in MEANINGS.items() if meaning.peer_to_blame
    }


def test_time_left_of_a_stop(start: Start) -> None:
    """The status has the time in which clients are still accepted, and the time to the end of the stop."""
    daemon = start(
        *(*WATCHED, "--shutdown.delay", "1", "--shutdown.quiet-period", "1000", "--shutdown.drain-timeout", "1000"),
        *("--shutdown.linger-timeout", "500"),
    )
    assert status(daemon)["stop"] is None
    with daemon.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        daemon.send_signal()
        daemon.wait_for("draining")
        stop = status(daemon)["stop"]
        assert 0 <= stop["accepting_seconds_left"] <= 1
        assert 1501 - PATIENCE < stop["seconds_left"] <= 1501
        until(lambda: status(daemon)["stop"]["accepting_seconds_left"] == 0)
        before = status(daemon)["stop"]["seconds_left"]
        assert before <= 1500
        until(lambda: status(daemon)["stop"]["seconds_left"] < before)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert daemon.wait() == 0
