"""Calibrated loss and delay of a UDP listener, compared with the client's own count."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from echod.connection.faults.profile import FaultProfile
from echod.datagram.shaping import FlowFault
from echod.settings.model import FaultSettings
from harness import UNHURRIED
from udp_clients import AT_ONCE, UNLIMITED, ask, client, flow, udp_address

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Daemon, Start


@pytest.fixture
def owned() -> Iterator[ExitStack]:
    """Yield a stack that closes the sockets of the test."""
    with ExitStack() as stack:
        yield stack


def start_faulty(start: Start, *stop: str, host: str = "127.0.0.1", **fault: str) -> Daemon:
    """Start a daemon with a UDP listener that has the fault."""
    options = [part for key, value in fault.items() for part in (f"--faults.x.{key}", value)]
    listener = ("--listeners.a.address", f"udp:{host}:0", "--listeners.a.fault", "x")
    return start(*listener, *options, *UNLIMITED, *stop, listen=None)


@pytest.mark.parametrize("burst", [None, 4.0])
def test_loss_is_equal_to_the_datagram(start: Start, owned: ExitStack, burst: float | None) -> None:
    """With a seed, exactly the datagrams are lost that the settings name, in each flow. The ledger has their number."""
    settings = FaultSettings(action="drop", probability=0.3, seed=5, burst=burst)
    bursts = {} if burst is None else {"burst": str(burst)}
    daemon = start_faulty(start, *AT_ONCE, action="drop", probability="0.3", seed="5", **bursts)
    model = FlowFault(FaultProfile("x", settings), 0)
    kept = [number for number in range(400) if model.decide(b"", 0) is not None]
    assert 200 < len(kept) < 350
    for _ in range(2):
        sock = owned.enter_context(client(udp_address(daemon)))
        for number in range(400):
            sock.send(b"%d" % number)
            if number in kept:
                assert sock.recv(10) == b"%d" % number
    assert daemon.stop() == 0
    for line in daemon.all("flow_closed"):
        assert (line["received_datagrams"], line["sent_datagrams"]) == (400, len(kept))
        assert (line["dropped"], line["fault"]) == (400 - len(kept), "x")
    assert daemon.wait_for("drained")["flows"] == 2
    assert daemon.wait_for("stopped")["datagrams_dropped"] == 2 * (400 - len(kept))


def test_changes(start: Start, owned: ExitStack) -> None:
    """A datagram is repeated, cut in half or has one bit flipped. Copies are counted apart."""
    twice = start_faulty(start, *AT_ONCE, action="duplicate")
    sock = owned.enter_context(client(udp_address(twice)))
    assert [ask(sock, b"ab"), sock.recv(10), ask(sock, b""), sock.recv(10)] == [b"ab", b"ab", b"", b""]
    assert twice.stop() == 0
    line = flow(twice, sock)
    assert (line["received_datagrams"], line["sent_datagrams"], line["copies"], line["sent"]) == (2, 2, 2, 2)
    half = start_faulty(start, *AT_ONCE, action="truncate")
    sock = owned.enter_context(client(udp_address(half)))
    assert ask(sock, b"abcd") == b"ab"
    assert half.stop() == 0
    assert flow(half, sock)["sent"] == 2
    bit = start_faulty(start, *AT_ONCE, action="corrupt")
    sock = owned.enter_context(client(udp_address(bit)))
    assert (int.from_bytes(ask(sock, b"abcd"), "big") ^ int.from_bytes(b"abcd", "big")).bit_count() == 1


def test_delay(start: Start, owned: ExitStack) -> None:
    """Delayed answers come in order, also to several clients. The drain waits for them."""
    daemon = start_faulty(
        start, "--shutdown.quiet-period", "0", "--shutdown.drain-timeout", "60", delay="0.2", jitter="0.1"
    )
    first, second = (owned.enter_context(client(udp_address(daemon))) for _ in range(2))
    for number in range(50):
        first.send(b"%d" % number)
        second.send(b"%d" % number)
    assert [first.recv(10) for _ in range(50)] == [b"%d" % number for number in range(50)]
    first.send(b"held")
    assert [second.recv(10) for _ in range(50)] == [b"%d" % number for number in range(50)]
    assert first.recv(10) == b"held"
    assert daemon.stop() == 0
    assert flow(daemon, first)["sent_datagrams"] == 51


def test_delay_of_a_listener_on_all_addresses(start: Start, owned: ExitStack) -> None:
    """A delayed answer leaves from the address that was asked, too."""
    daemon = start_faulty(start, *AT_ONCE, host="0.0.0.0", delay="0.01")
    sock = owned.enter_context(client(("127.0.0.7", udp_address(daemon)[1])))
    assert ask(sock, b"x") == b"x"
    assert daemon.stop() == 0


def test_reorder(start: Start, owned: ExitStack) -> None:
    """With `reorder`, jitter changes the order, and nothing is lost."""
    daemon = start_faulty(start, *AT_ONCE, delay="0.1", jitter="0.1", reorder="true", seed="1")
    sock = owned.enter_context(client(udp_address(daemon)))
    for number in range(100):
        sock.send(b"%d" % number)
    received = [int(sock.recv(10)) for _ in range(100)]
    assert received != sorted(received)
    assert sorted(received) == list(range(100))


def test_held_answers_at_the_end(start: Start, owned: ExitStack) -> None:
    """At the end of a stop, delayed answers are sent at once."""
    daemon = start_faulty(start, "--shutdown.quiet-period", "60", "--shutdown.drain-timeout", "0", delay="3600")
    sock = owned.enter_context(client(udp_address(daemon)))
    for number in range(3):
        sock.send(b"%d" % number)
    assert daemon.stop() == 0
    assert [sock.recv(10) for _ in range(3)] == [b"0", b"1", b"2"]
    line, receipt = flow(daemon, sock), daemon.receipt()
    assert (line["sent_datagrams"], line["dropped"], line["reason"]) == (3, 0, "cut")
    assert receipt["datagrams_unanswered"] == 0


def test_held_answers_of_an_evicted_flow(start: Start, owned: ExitStack) -> None:
    """Delayed answers of an evicted flow are dropped, counted and never sent."""
    daemon = start_faulty(start, *UNHURRIED, "--limits.max-flows", "1", delay="0.5")
    first, second = (owned.enter_context(client(udp_address(daemon))) for _ in range(2))
    first.send(b"x")
    assert ask(second, b"y") == b"y"
    line = flow(daemon, first)
    assert (line["received_datagrams"], line["sent_datagrams"], line["dropped"], line["reason"]) == (1, 0, 1, "evicted")
    daemon.wait_for("datagrams_dropped", cause="ended", datagrams=1)
    first.setblocking(False)
    with pytest.raises(BlockingIOError):
        first.recv(1)
