"""The shaper releases echo at the right time, in order and in the right pieces. The clock is the test's own."""

from __future__ import annotations

import random
from typing import Any

import pytest

from echod.connection.faults.shaper import Shaper
from echod.settings.model import FaultSettings

CAPACITY = 64 * 1024


class Queue:
    """A shaper with a clock that moves only on demand."""

    def __init__(self, capacity: int = CAPACITY, **settings: Any) -> None:
        self.now = 1000.0
        self.shaper = Shaper(FaultSettings(**settings), random.Random(1), lambda: self.now, capacity)

    def push(self, *messages: bytes) -> None:
        for message in messages:
            self.shaper.push(message, shaped=True)

    def take(self) -> list[bytes]:
        """Return the pieces that are due now."""
        return [piece.data for piece in self.shaper.due_pieces()]

    def run(self) -> list[tuple[float, bytes]]:
        """Empty the queue as a session does. Return each piece with its time since the start."""
        sent = []
        while self.shaper.held:
            self.now = max(self.now, self.shaper.next_due())
            sent += [(self.now - 1000, piece) for piece in self.take()]
        return sent


def test_delay() -> None:
    """A message is released after the delay, and not before."""
    queue = Queue(delay=0.2)
    queue.push(b"a")
    queue.now += 0.1
    queue.push(b"b")
    assert queue.shaper.next_due() == pytest.approx(1000.2)
    queue.now += 0.098
    assert queue.take() == []
    queue.now += 0.002
    assert queue.take() == [b"a"]
    assert queue.shaper.held == 1
    queue.now += 0.1
    assert queue.take() == [b"b"]
    assert queue.shaper.held == 0


def test_timer_that_is_early() -> None:
    """A timer may be early by less than the resolution of uvloop's timers."""
    queue = Queue(delay=0.2)
    queue.push(b"a")
    queue.now += 0.1995
    assert queue.take() == [b"a"]


def test_jitter() -> None:
    """Delays vary by the jitter in both directions. The order of messages stays."""
    queue = Queue(delay=0.2, jitter=0.05)
    times = []
    for _ in range(50):
        pushed = queue.now
        queue.push(b"a")
        queue.run()
        times.append(queue.now - pushed)
    assert 0.15 <= min(times) < 0.17
    assert 0.23 < max(times) <= 0.25
    queue = Queue(delay=0.2, jitter=0.2)
    messages = [b"%02d" % number for number in range(50)]
    queue.push(*messages)
    sent = queue.run()
    assert [piece for _, piece in sent] == messages
    assert sent[-1][0] < 0.4  # and not the sum of all delays


def test_message_that_is_not_shaped() -> None:
    """It waits for the messages before it, and for nothing else."""
    queue = Queue(delay=0.2, slice=1)
    queue.push(b"a")
    queue.shaper.push(b"bcd", shaped=False)
    queue.now += 0.2
    assert [tuple(piece) for piece in queue.shaper.due_pieces()] == [(b"a", True)]
    assert [tuple(piece) for piece in queue.shaper.due_pieces()] == [(b"bcd", False)]


def test_rate() -> None:
    """The n-th byte is released n bytes after the start at the given rate, less the burst allowance of 0.02 s."""
    queue = Queue(rate=7200)
    queue.push(b"." * 14_400)
    total = 0
    for when, piece in queue.run():
        total += len(piece)
        assert total / 7200 - 0.021 <= when <= total / 7200 + 0.021
        assert len(piece) <= 144
    assert total == 14_400


def test_burst_after_silence() -> None:
    """After a silence, the allowance of one burst is sent at once, and no more."""
    queue = Queue(rate=1000)
    queue.push(b"." * 100)
    queue.now += 0.001
    first = queue.take()
    queue.now += 10
    queue.take()
    queue.push(b"." * 100)
    assert sum(map(len, queue.take())) == sum(map(len, first)) == 20


def test_catching_up() -> None:
    """After a pause of the process, echo catches up for a quarter of a second, and no more."""
    queue = Queue(rate=1000)
    queue.push(b"." * 5000)
    queue.take()
    queue.now += 2
    assert 250 <= sum(map(len, queue.take())) <= 270
    queue.now += 0.001
    assert queue.take() == []


def test_delay_and_rate() -> None:
    """The first piece waits for the delay. The others follow at the rate."""
    queue = Queue(delay=0.2, rate=1000)
    queue.push(b"." * 500)
    sent = queue.run()
    assert sent[0][0] == pytest.approx(0.2)
    assert sent[-1][0] == pytest.approx(0.7, abs=0.03)


def test_slices() -> None:
    """Each slice is released alone, so that each is a write of its own in its own iteration."""
    queue = Queue(slice=2)
    queue.push(b"abc", b"d")
    assert [queue.take() for _ in range(4)] == [[b"ab"], [b"c"], [b"d"], []]


def test_slices_at_a_rate() -> None:
    """A slice is released when its last byte would arrive."""
    queue = Queue(rate=1000, slice=10)
    queue.push(b"." * 200)
    sent = queue.run()
    assert [len(piece) for _, piece in sent] == [10] * 20
    assert sent[-1][0] - sent[5][0] == pytest.approx(0.14, abs=0.002)


def test_full() -> None:
    """The queue is full above the capacity, until it has fallen to a quarter."""
    queue = Queue(100, delay=1)
    states = []
    for _ in range(5):
        queue.push(b"." * 25)
        states.append((queue.shaper.held, queue.shaper.full))
    queue.now += 1
    states += [(queue.shaper.held, queue.shaper.full) for _ in queue.shaper.due_pieces()]
    pushed = [(25, False), (50, False), (75, False), (100, False), (125, True)]
    assert states == [*pushed, (100, True), (75, True), (50, True), (25, False), (0, False)]


def test_small_capacity() -> None:
    """The pieces are a small part of the capacity, so that the queue is not empty before reading resumes."""
    queue = Queue(800, rate=1_000_000)
    queue.push(b"." * 800)
    queue.now += 0.001
    assert max(map(len, queue.take())) == 100
    queue.shaper.resize(80)
    queue.push(b"." * 80)
    queue.now += 0.001
    assert max(map(len, queue.take())) == 10


def test_drain() -> None:
    """All held echo comes out at once, in order."""
    queue = Queue(4, delay=60, slice=1)
    queue.push(b"abc", b"def")
    assert queue.shaper.full
    assert queue.shaper.drain() == b"abcdef"
    assert (queue.shaper.held, queue.shaper.full) == (0, False)
    assert queue.take() == []
