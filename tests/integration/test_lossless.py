"""No byte is lost: not in the echo, not at a half-close, not at a stop."""

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
    """200 clients send 100 MB of random bytes in writes of random sizes, and half-close."""
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
    """At SIGTERM, clients that stream without end get the echo of all that was read from them, then EOF."""
    # The clients share one thread with each other, and a core with the daemon: they are given time to take their echo.
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
    """Clients whose handshake is complete when SIGTERM comes, and who were not yet accepted, get their echo."""
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
    """A client that is 16 MB ahead of its reading, and begins to read 2 s into the drain, gets all of it.

    With the small buffer the daemon has paused reading from it, with the large one all of its bytes are in the daemon.
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


def test_cut_lets_slow_readers_take_what_is_on_its_way(start: Start) -> None:
    """Who reads 1 MB/s, and has more than a second's worth ahead at the cut, gets it all and then EOF."""
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
    """A close by the server waits for a slow reader longer than `linger_timeout`, and discards what it still sends.

    Were the connection closed after `linger_timeout`, those late bytes would be answered with a reset, and what the
    client has not read by then would be lost.
    """
    linger = 0.4
    daemon = start("--limits.idle-timeout", "1", "--shutdown.linger-timeout", str(linger))
    with Crowd() as crowd:
        peer = crowd.add(daemon.connect(receive_buffer=4096), 1_900_000, 1)
        peer.half_close = False
        crowd.pause_reading(peer)
        crowd.run(lambda: not peer.writing)
        crowd.run(Stuck(peer, 1.8))  # idle by now, and FIN is behind the echo
        peer.total = 2_000_000
        pace = Pace(crowd, 1_000_000)
        crowd.run(lambda: pace() and bool(peer.end))
        assert (peer.end, peer.received) == ("eof", 1_900_000)
        line = daemon.wait_for("client_closed")
        assert (line["reason"], line["acked"], line["discarded_bytes"]) == ("idle", 1_900_000, 100_000)


def test_linger_ends_without_progress(start: Start) -> None:
    """A client that neither reads nor closes after our FIN is closed after `linger_timeout`, its loss on record."""
    daemon = start("--limits.idle-timeout", "0.5", "--shutdown.linger-timeout", "0.3")
    with daemon.connect(receive_buffer=4096) as client:
        client.sendall(bytes(400_000))
        line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"], line["sent"]) == ("idle", 400_000, 400_000)
    assert line["acked"] < 400_000
    assert 0.8 <= line["seconds"] < 5


def test_reset_is_on_record(start: Start) -> None:
    """What a client that resets did not get is in its line: neither counted as acknowledged, nor all as sent."""
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
    """The transport looks at the socket no more after the client's EOF; the reset that follows is seen all the same."""
    daemon = start("--shutdown.linger-timeout", "25")
    with daemon.connect(receive_buffer=4096) as client:
        client.sendall(bytes(400_000))
        client.shutdown(socket.SHUT_WR)
        for _ in range(5):  # while these are served, so is the one above
            daemon.echo(b"x")
        reset(client)
    line = daemon.wait_for("client_closed", reason="reset")
    assert line["sent"] == 400_000 > line["acked"]
    assert line["seconds"] < 20
    assert daemon.stop() == 0


@pytest.mark.parametrize("by", ["quiet", "idle"])
def test_what_waits_to_be_read_is_no_silence(start: Start, by: str) -> None:
    """After a stall of the daemon itself, its timeouts do not close a client whose message is there to be read."""
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
        select.select([], [], [], 1)  # the stall
        daemon.send_signal(signal.SIGCONT)
        assert receive(client, 6) == b"second"
    if by == "idle":
        daemon.send_signal(signal.SIGTERM)
    assert daemon.wait() == 0


def test_half_close_with_a_full_buffer(start: Start) -> None:
    """The end comes once, also where the last of the echo leaves the buffer long after the client's EOF."""
    daemon = start("--limits.write-buffer", "64MiB")
    with Crowd() as crowd:
        for seed in range(6):
            crowd.add(daemon.connect(receive_buffer=4096), 8_200_000, seed)
        crowd.pause_reading(*crowd.peers)
        crowd.run(lambda: not any(peer.writing for peer in crowd.peers))
        for _ in range(5):  # while these are served, so are the EOFs of the others
            daemon.echo(b"x")
        crowd.pause_reading(*crowd.peers, reading=True)
        crowd.finish()
        assert [(peer.end, peer.received) for peer in crowd.peers] == [("eof", 8_200_000)] * 6
    assert daemon.stop() == 0
    assert {event["level"] for event in daemon.events} == {"info"}
