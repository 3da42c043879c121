"""Calibrated loss and delay: bursts, seeds, and the times of delayed answers."""

from __future__ import annotations

from itertools import groupby
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_datagram_flows import new_flow

from echod.connection.faults.chance import GilbertElliott
from echod.connection.faults.injector import Echo
from echod.connection.faults.profile import FaultProfile
from echod.datagram.bucket import SECOND
from echod.datagram.held import HoldQueue
from echod.datagram.shaping import FlowFault
from echod.settings.model import FaultSettings

pytestmark = pytest.mark.once


def fault(**keys: Any) -> FlowFault:
    return FlowFault(FaultProfile("x", FaultSettings(**keys)), 0)


def dropped(one: FlowFault, datagrams: int = 200) -> list[int]:
    """Return the numbers of the datagrams that get no answer."""
    return [number for number in range(datagrams) if one.decide(b"%d" % number, number) is None]


@pytest.mark.parametrize(("probability", "burst"), [(0.01, 5), (0.2, 3), (0.5, 1), (0.5, 10), (0.9, 9)])
def test_bursts(probability: float, burst: float) -> None:
    """Over many messages, the share of the chosen ones and the mean length of their bursts are those of the settings."""
    chance = GilbertElliott(probability, burst, Random(1))
    draws = [chance.draw() for _ in range(400_000)]
    lengths = [len(list(run)) for chosen, run in groupby(draws) if chosen]
    # Three standard errors of the mean: a burst adds to the variance of the share in proportion to its length.
    error = 3 * (2 * burst * probability * (1 - probability) / len(draws)) ** 0.5
    assert sum(draws) / len(draws) == pytest.approx(probability, abs=error)
    assert sum(lengths) / len(lengths) == pytest.approx(burst, rel=4 / len(lengths) ** 0.5)


@settings(deadline=None)  # a busy machine pauses a test
@given(st.integers(0, 2**31 - 1), st.floats(0.01, 0.8), st.sampled_from([None, 4, 20]))
def test_same_seed(seed: int, probability: float, burst: float | None) -> None:
    """With one seed, each flow loses the same datagrams, whatever they contain."""
    loss = {"action": "drop", "probability": probability, "burst": burst, "seed": seed}
    one, other = fault(**loss), fault(**loss)
    lost = dropped(one)
    assert lost == [number for number in range(200) if other.decide(b"other", number) is None]
    assert one.fired is bool(lost)


def test_seeds() -> None:
    """Other seeds lose other datagrams. Without a seed, each flow does."""
    loss = {"action": "drop", "probability": 0.5}
    assert len({tuple(dropped(fault(seed=seed, **loss))) for seed in range(20)}) == 20
    assert dropped(fault(**loss)) != dropped(fault(**loss))


def test_actions() -> None:
    """An action drops, changes or repeats the datagram. An empty datagram stays empty."""
    drop, duplicate = fault(action="drop"), fault(action="duplicate")
    assert drop.decide(b"abcd", 1) is None
    assert duplicate.decide(b"abcd", 1) == Echo(b"abcd", shaped=False, copies=2)
    assert fault(action="truncate").decide(b"abcd", 1) == Echo(b"ab", shaped=False)
    corrupt = fault(action="corrupt", seed=1)
    echo = corrupt.decide(b"abcd", 1)
    assert echo is not None
    assert (int.from_bytes(b"abcd", "big") ^ int.from_bytes(echo.data, "big")).bit_count() == 1
    assert corrupt.decide(b"", 1) == Echo(b"", shaped=False)


def test_conditions() -> None:
    """Trigger, bytes and seconds select datagrams as they select messages of a stream."""
    trigger = fault(action="drop", trigger="b")
    assert [trigger.decide(data, 1) is None for data in (b"a", b"b", b"b\n")] == [False, True, False]
    after = fault(action="drop", after_bytes=4)
    assert dropped(after, 6) == [4, 5]
    late = fault(action="drop", after_seconds=2)
    assert [late.decide(b"a", seconds * SECOND) is None for seconds in (0, 1, 2, 3)] == [False, False, True, True]


def test_blackhole() -> None:
    """A black hole answers nothing any more, once its condition holds. Without a trigger, it needs no datagram to begin."""
    hole = fault(action="blackhole", trigger="end")
    assert [hole.decide(data, 1) is None for data in (b"a", b"end", b"a")] == [False, True, True]
    hole = fault(action="blackhole", after_bytes=3)
    assert [hole.decide(b"ab", 1) is None for _ in range(4)] == [False, False, True, True]
    assert hole.fired


def test_delay() -> None:
    """Without jitter each answer has the same delay. With jitter, the order stays unless `reorder` is set."""
    assert [fault(delay=0.5).due(10, now) for now in (0, SECOND)] == [SECOND // 2, 3 * SECOND // 2]
    ordered = fault(delay=0.5, jitter=0.5, seed=1)
    times = [ordered.due(1, now) for now in range(100)]
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] <= SECOND + 100
    free = fault(delay=0.5, jitter=0.5, seed=1, reorder=True)
    times = [free.due(1, now) for now in range(100)]
    assert times != sorted(times)
    assert 0 <= min(times) < SECOND // 2 < max(times) <= SECOND + 100


def test_rate() -> None:
    """At a rate, an answer waits until those before it have passed the line."""
    slow = fault(rate=1000)
    assert [slow.due(100, 0), slow.due(50, 0), slow.due(100, SECOND)] == [
        SECOND // 10,
        15 * SECOND // 100,
        11 * SECOND // 10,
    ]
    assert fault(rate=1000, delay=1).due(100, 0) == 11 * SECOND // 10


def test_hold_queue() -> None:
    """Answers come out by their time, those of one time in order. A timer's resolution of a millisecond counts as due."""
    queue, flow, sent = HoldQueue(), new_flow("a"), []

    def send(_: object, data: bytes, copies: int, now: int) -> None:
        sent.append((data, copies, now))

    assert queue.next_due() is None
    for due, data in ((2 * SECOND, b"late"), (SECOND, b"one"), (SECOND, b"two")):
        assert queue.push(due, flow, Echo(data, shaped=True), send)
    assert queue.next_due() == SECOND
    assert list(queue.pop_due(SECOND - SECOND // 1000)) == []
    released = list(queue.pop_due(SECOND - SECOND // 1000 + 1))
    assert [held.data for held in released] == [b"one", b"two"]
    released[0].send(flow, released[0].data, released[0].copies, 5)
    assert sent == [(b"one", 1, 5)]
    assert [held.data for held in queue.pop_all()] == [b"late"]
    assert queue.next_due() is None


def test_hold_queue_is_bounded() -> None:
    """The queue holds 16 MiB, empty datagrams included. What has left it makes room."""
    queue, flow = HoldQueue(), new_flow("a")
    empty = Echo(b"", shaped=True)
    held = 0
    while queue.push(1, flow, empty, print):
        held += 1
    assert held == 16 * 1024 * 1024 // 256
    next(queue.pop_all())
    assert queue.push(1, flow, empty, print)
    assert not queue.push(1, flow, empty, print)
