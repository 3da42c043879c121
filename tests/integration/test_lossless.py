"""No byte is lost, neither in the echo nor at a half-close or a stop."""

from __future__ import annotations

import select
import signal
import socket
import time
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

from crowd import Crowd, Pace, Stuck
from harness import PATIENCE, UNHURRIED, receive, reset

if TYPE_CHECKING:
    from harness import Start

CLIENTS = 200
ROUNDS = 10


def test_every_byte_comes_back(start: Start) -> None:
    """200 clients send 100 MB of random bytes in writes of random sizes, then half-close."""
    daemon = start()
    with Crowd() as crowd:
        for seed in range(CLIENTS):
            crowd.add(daemon.connect(), 500_000 + seed, seed)
        crowd.finish(patience=2 * PATIENCE)
        assert [peer.end for peer in crowd.peers] == ["eof"] * CLIENTS
        assert [peer.received for peer in crowd.peers] == [peer.total for peer in crowd.peers]
        assert not any(peer.wrong for peer in crowd.peers)
        daemon.wait_for("client_closed", count=CLIENTS)
        assert daemon.stop() == 0
        lines = daemon.ledger()
        for peer in crowd.peers:
            line = lines[peer.port]
            assert (line["received"], line["sent"], line["acked"]) == (peer.total,) * 3
            assert line["reason"] == "eof"
    assert daemon.receipt()["clients"] == 0


@pytest.mark.parametrize(
    "round_", [*range(5), *(pytest.param(more, marks=pytest.mark.once) for more in range(5, ROUNDS))]
)
def test_stop_under_load(start: Start, round_: int) -> None:
    """In a stop, clients that stream without end get the echo of every byte that was read, then EOF."""
    # The clients share one thread and a core with the daemon, so they need time to take their echo.
    drain, linger = 0.3, 20.0
    daemon = start("--shutdown.drain-timeout", str(drain), "--shutdown.linger-timeout", str(linger))
    with Crowd() as crowd:
        for seed in range(CLIENTS):
            crowd.add(daemon.connect(receive_buffer=32768), None, 1000 * round_ + seed)
        crowd.run(lambda: all(peer.received for peer in crowd.peers))
        daemon.send_signal(signal.SIGTERM)
        crowd.finish()
        assert daemon.wait() == 0
        assert [peer.end for peer in crowd.peers] == ["eof"] * CLIENTS
        assert not any(peer.wrong for peer in crowd.peers)
        lines = daemon.ledger()
        assert {peer.port: peer.received for peer in crowd.peers} == {
            port: line["received"] for port, line in lines.items()
        }
    receipt = daemon.receipt()
    assert (receipt["clients"], receipt["cut"]) == (CLIENTS, CLIENTS)
    assert receipt["seconds"] < drain + linger + 1
    assert receipt["unsent_bytes"] == receipt["unacked_bytes"] == 0


def test_stop_serves_the_backlog(start: Start) -> None:
    """Clients in the backlog at SIGTERM, with a complete TCP handshake, get their echo."""
    clients = 1500
    daemon = start("--shutdown.quiet-period", "0.5")
    daemon.freeze()
    with Crowd() as crowd:
        for seed in range(clients):
            crowd.add(daemon.connect(), 1000, seed)
        crowd.run(lambda: not any(peer.writing for peer in crowd.peers))
        daemon.send_signal(signal.SIGTERM)
        daemon.send_signal(signal.SIGCONT)
        crowd.finish()
        assert [peer.end for peer in crowd.peers] == ["eof"] * clients
        assert [peer.received for peer in crowd.peers] == [1000] * clients
    assert daemon.wait() == 0
    assert daemon.receipt()["unacked_bytes"] == 0
    with pytest.raises(ConnectionRefusedError):
        daemon.connect()


@pytest.mark.parametrize("write_buffer", ["64KiB", "32MiB"])
def test_stop_waits_for_a_slow_reader(start: Start, write_buffer: str) -> None:
    """A client that has 16 MB of unread echo, and begins to read 2 s into the drain, gets all of it.

    With the small buffer, the daemon has paused reading. With the large one, it has all bytes in memory.
    """
    ahead = 16_000_000
    daemon = start("--limits.write-buffer", write_buffer, *UNHURRIED)
    with Crowd() as crowd:
        peer = crowd.add(daemon.connect(receive_buffer=4096), ahead, 1)
        crowd.pause_reading(peer)
        crowd.run(Stuck(peer))
        assert peer.sent > 1_000_000
        daemon.send_signal(signal.SIGTERM)
        began = datetime.fromisoformat(daemon.wait_for("draining")["timestamp"]).timestamp()
        crowd.run(lambda: time.time() > began + 2)
        assert not peer.end
        crowd.pause_reading(peer, reading=True)
        crowd.finish()
        assert (peer.end, peer.received, peer.wrong) == ("eof", ahead, False)
    assert daemon.wait() == 0
    assert daemon.ledger()[peer.port]["reason"] == "eof"
    assert daemon.receipt()["completed"] == 1


def test_cut_lets_slow_readers_finish(start: Start) -> None:
    """A client that reads 1 MB/s and has more than one second of unread echo at the cut gets it all, then EOF."""
    daemon = start("--shutdown.drain-timeout", "0.5", "--shutdown.linger-timeout", "8")
    with Crowd() as crowd:
        peers = [crowd.add(daemon.connect(receive_buffer=4096), None, seed) for seed in range(5)]
        crowd.pause_reading(*peers)
        for peer in peers:
            crowd.run(Stuck(peer))
        daemon.send_signal(signal.SIGTERM)
        pace = Pace(crowd, 1_000_000)
        crowd.run(lambda: pace() and all(peer.end for peer in peers))
        assert [peer.end for peer in peers] == ["eof"] * 5
        assert min(peer.received for peer in peers) > 1_500_000
        assert daemon.wait() == 0
        lines = daemon.ledger()
        for peer in peers:
            line = lines[peer.port]
            assert (line["received"], line["acked"], line["reason"]) == (peer.received, peer.received, "cut")
    assert daemon.receipt()["cut"] == 5


def test_linger_lasts_while_there_is_progress(start: Start) -> None:
    """A close waits for a slow reader longer than `linger_timeout` and discards late input.

    If it closed the connection after `linger_timeout`, the kernel would answer the late input with a reset. The reset
    would destroy the echo that the client has not read.
    """
    linger = 0.4
    daemon = start("--limits.idle-timeout", "1", "--shutdown.linger-timeout", str(linger))
    with Crowd() as crowd:
        peer = crowd.add(daemon.connect(receive_buffer=4096), 1_900_000, 1)
        peer.half_close = False
        crowd.pause_reading(peer)
        crowd.run(lambda: not peer.writing)
        crowd.run(Stuck(peer, 1.8))  # idle by now, and our FIN follows the echo
        peer.total = 2_000_000
        pace = Pace(crowd, 1_000_000)
        crowd.run(lambda: pace() and bool(peer.end))
        assert (peer.end, peer.received) == ("eof", 1_900_000)
        line = daemon.wait_for("client_closed")
        assert (line["reason"], line["acked"], line["discarded_bytes"]) == ("idle", 1_900_000, 100_000)


def test_linger_ends_without_progress(start: Start) -> None:
    """A client that neither reads nor closes after our FIN is closed after `linger_timeout`; its entry has the loss."""
    daemon = start("--limits.idle-timeout", "0.5", "--shutdown.linger-timeout", "0.3")
    with daemon.connect(receive_buffer=4096) as client:
        client.sendall(bytes(400_000))
        line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"], line["sent"]) == ("idle", 400_000, 400_000)
    assert line["acked"] < 400_000


def test_reset_is_on_record(start: Start) -> None:
    """After a client's reset, undelivered bytes are not counted as acknowledged, and not all of them as sent."""
    daemon = start()
    with Crowd() as crowd:
        client = daemon.connect(receive_buffer=4096)
        peer = crowd.add(client, None, 1)
        crowd.pause_reading(peer)
        crowd.run(Stuck(peer))
        reset(client)
    line = daemon.wait_for("client_closed", reason="reset")
    assert line["received"] > line["sent"] > line["acked"] > 0


def test_reset_after_half_close_is_noticed(start: Start) -> None:
    """A reset after the client's EOF is noticed, although the transport no longer polls the socket."""
    daemon = start("--shutdown.linger-timeout", "25")
    with daemon.connect(receive_buffer=4096) as client:
        client.sendall(bytes(400_000))
        client.shutdown(socket.SHUT_WR)
        for _ in range(5):  # by then, the EOF above is handled too
            daemon.echo(b"x")
        reset(client)
    line = daemon.wait_for("client_closed", reason="reset")
    assert line["sent"] == 400_000 > line["acked"]
    assert daemon.stop() == 0


@pytest.mark.parametrize("by", ["quiet", "idle"])
def test_unread_input_is_not_silence(start: Start, by: str) -> None:
    """After a pause of the daemon itself, no timeout closes a client with an unread message."""
    timeout = ("--shutdown.quiet-period", "0.5") if by == "quiet" else ("--limits.idle-timeout", "0.5")
    daemon = start(*timeout)
    with daemon.connect() as client:
        client.sendall(b"first")
        assert receive(client, 5) == b"first"
        if by == "quiet":
            daemon.send_signal(signal.SIGTERM)
            daemon.wait_for("draining")
        daemon.freeze()
        client.sendall(b"second")
        assert select.select([client], [], [], 1)[0] == []  # the pause
        daemon.send_signal(signal.SIGCONT)
        assert receive(client, 6) == b"second"
    if by == "idle":
        daemon.send_signal(signal.SIGTERM)
    assert daemon.wait() == 0


def test_half_close_with_a_full_buffer(start: Start) -> None:
    """The connection is closed once, even if the last echo leaves the buffer long after the client's EOF."""
    daemon = start("--limits.write-buffer", "64MiB")
    with Crowd() as crowd:
        for seed in range(6):
            crowd.add(daemon.connect(receive_buffer=4096), 8_200_000, seed)
        crowd.pause_reading(*crowd.peers)
        crowd.run(lambda: not any(peer.writing for peer in crowd.peers))
        for _ in range(5):  # by then, the EOFs of the others are handled too
            daemon.echo(b"x")
        crowd.pause_reading(*crowd.peers, reading=True)
        crowd.finish()
        assert [(peer.end, peer.received) for peer in crowd.peers] == [("eof", 8_200_000)] * 6
    assert daemon.stop() == 0
    assert {event["level"] for event in daemon.events} == {"info"}
