"""Measurements of `echod probe`: closed loop, open loop and streams."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from peers import Peer, each, echo, ending, silent
from probing import measure, narrow

if TYPE_CHECKING:
    from harness import Start

pytestmark = pytest.mark.once


def test_closed_loop(start: Start) -> None:
    """Every message is sent and answered, and the daemon has counted the same bytes."""
    daemon = start("--log.connections", "all")
    host, port = daemon.address
    options = ("--count", "1000", "--connections", "7", "--size", "1KiB", "--pipeline", "3", "--half-close")
    found = measure(f"{host}:{port}", *options)
    assert (found["mode"], found["ending"], found["connected"], found["errors"]) == ("closed", "right", 7, {})
    assert (found["messages"], found["unanswered"]) == (1000, 0)
    assert found["bytes_sent"] == found["bytes_received"] == 1000 * 1024
    assert found["messages_per_second"] == pytest.approx(1000 / found["seconds"])
    assert found["bytes_per_second"] == pytest.approx(1024_000 / found["seconds"])
    latency = found["latency"]
    order = [latency[key] for key in ("min", "p50", "p90", "p99", "p99.9", "max")]
    assert order == sorted(order)
    assert 0 < latency["min"] < latency["mean"] < latency["max"] < found["seconds"]
    assert sum(count for _, count in found["histogram"]) == 1000
    assert found["histogram"][-1][0] == latency["max"]
    assert found["hdr"].startswith("HISTF")
    daemon.wait_for("client_closed", count=7)
    assert sum(line["acked"] for line in daemon.all("client_closed")) == 1000 * 1024
    assert {line["reason"] for line in daemon.all("client_closed")} == {"eof"}


def test_messages_larger_than_all_buffers(start: Start) -> None:
    """The echo of a message is received while the message is still being sent."""
    daemon = start()
    host, port = daemon.address
    found = measure(f"{host}:{port}", "--count", "3", "--size", "20MB")
    assert (found["messages"], found["bytes_received"]) == (3, 60_000_000)


@pytest.mark.parametrize("options", [("--pipeline", "6"), ("--rate", "1000"), ("--half-close",)])
def test_small_buffers(options: tuple[str, ...]) -> None:
    """The rest of a message is sent later, and its echo is received in the meantime."""
    with Peer(echo, narrow()) as peer:
        found = measure(peer.target, "--count", "10", "--size", "2MB", *options)
    assert (found["messages"], found["bytes_received"], found["errors"]) == (10, 20_000_000, {})


def test_fewer_messages_than_connections() -> None:
    with Peer(echo) as peer:
        found = measure(peer.target, "--count", "2", "--connections", "5")
    assert (found["messages"], found["connected"], found["errors"]) == (2, 5, {})


def test_pipeline() -> None:
    """The pipeline's depth is the number of messages sent before the first echo."""
    seen = []

    def handler(sock: socket.socket) -> None:
        data = sock.recv(30, socket.MSG_WAITALL)
        sock.settimeout(0.2)
        try:
            seen.append(sock.recv(1))
        except TimeoutError:
            seen.append(b"")
        sock.settimeout(None)
        sock.sendall(data)
        echo(sock)

    with Peer(handler) as peer:
        assert measure(peer.target, "--count", "10", "--size", "10", "--pipeline", "3")["messages"] == 10
    assert seen == [b""]


def test_rate_goes_on_without_a_broken_connection() -> None:
    """The remaining connections send the messages that are due."""
    with Peer(each(ending(650), echo)) as peer:
        found = measure(peer.target, "--rate", "300", "--count", "300", "--connections", "2", code=1)
    assert (found["mode"], found["errors"]) == ("open", {"early_eof": 1})
    assert found["messages"] + found["unanswered"] == 300
    assert found["send_lag"] > 0
    assert 0 < found["unanswered"] < 100


@pytest.mark.parametrize("half_close", [(), ("--half-close",)])
def test_stream(start: Start, half_close: tuple[str, ...]) -> None:
    daemon = start("--log.connections", "all")
    host, port = daemon.address
    found = measure(f"{host}:{port}", "--stream", "--duration", "1.2", "--connections", "2", *half_close)
    assert (found["mode"], found["ending"], found["errors"]) == ("stream", "right", {})
    assert found["messages"] is found["latency"] is found["histogram"] is None
    assert found["bytes_sent"] == found["bytes_received"] > 10_000_000
    assert 1 <= len(found["throughput"]) <= 2
    daemon.wait_for("client_closed", count=2)
    assert sum(line["received"] for line in daemon.all("client_closed")) == found["bytes_sent"]


def test_a_stream_into_a_sink() -> None:
    """A server that never sends is detected when the duration is over."""
    with Peer(silent) as peer:
        found = measure(peer.target, "--stream", "--duration", "0.3", "--timeout", "0.3", code=1)
    assert (found["errors"], found["bytes_received"]) == ({"timeout": 1}, 0)
    assert found["bytes_sent"] > 0


def test_seed() -> None:
    """The seed determines the bytes."""
    seen = []

    def handler(sock: socket.socket) -> None:
        seen.append(sock.recv(64, socket.MSG_WAITALL))
        sock.sendall(seen[-1])

    with Peer(handler) as peer:
        for seed in ("1", "1", "2"):
            assert measure(peer.target, "--seed", seed, "--count", "1")["seed"] == int(seed)
    assert seen[0] == seen[1] != seen[2]
    assert len(set(seen[0])) > 30  # the bytes look random
