"""The decisions of the three workloads, with times that the test chooses."""

from __future__ import annotations

import math

import pytest

from echod.probe.workloads import PingPong, Rate, Stream

pytestmark = pytest.mark.once

SECOND = 1_000_000_000


def test_ping_pong_by_count() -> None:
    """Each echo allows one message, until the count is reached."""
    workload = PingPong(pipeline=3, size=64, count=7, duration=math.inf)
    assert [workload.first(), workload.first(), workload.exhausted] == [3, 3, False]
    assert [workload.after(2), workload.exhausted] == [1, True]
    assert workload.after(1) == 0
    assert workload.schedule(0) == ((), None)


def test_ping_pong_by_duration() -> None:
    """The number of messages is not limited."""
    workload = PingPong(pipeline=1, size=64, count=None, duration=1)
    assert [workload.after(1) for _ in range(1000)] == [1] * 1000
    assert not workload.exhausted


def test_rate() -> None:
    """A message is due on schedule, whether or not earlier ones have been answered."""
    workload = Rate(rate=4, size=64, count=5)
    assert [workload.first(), workload.after(3), workload.exhausted] == [0, 0, False]
    quarter = SECOND // 4
    assert workload.schedule(0) == ([0], quarter)
    assert workload.schedule(quarter - 1) == ([], 1)
    assert workload.schedule(3 * quarter) == ([quarter, 2 * quarter, 3 * quarter], quarter)
    assert workload.schedule(9 * SECOND) == ([SECOND], None)
    assert workload.exhausted
    assert workload.schedule(9 * SECOND) == ([], None)


def test_rate_sends_in_batches() -> None:
    """If many messages are late, echoes are received between the batches."""
    workload = Rate(rate=1000, size=64, count=100)
    due, idle = workload.schedule(SECOND)
    assert (len(due), idle) == (64, 0)
    rest, idle = workload.schedule(SECOND)
    assert [*due, *rest] == [number * SECOND // 1000 for number in range(100)]
    assert idle is None


def test_stream() -> None:
    """A connection sends one message, which is cut off at the end."""
    workload = Stream(size=4096, duration=3)
    assert (workload.first(), workload.after(1), workload.exhausted, workload.cut) == (1, 0, False, True)
    assert workload.schedule(SECOND) == ((), None)
