"""Token buckets: what they give in any sequence of calls, and how many are kept."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echod.datagram.bucket import SECOND, Bucket, Rate, Sources

pytestmark = pytest.mark.once


@settings(deadline=None)  # a busy machine pauses a test
@given(
    st.integers(1, 5000),
    st.integers(1, 100),
    st.lists(st.tuples(st.integers(0, SECOND // 10), st.integers(1, 20)), max_size=20),
)
def test_bound(rate: int, burst: int, steps: list[tuple[int, int]]) -> None:
    """In no interval are there more tokens than the burst and the rate allow, and none is withheld without need."""
    bucket = Bucket(Rate.of(rate, burst))
    interval = Rate.of(rate, burst).interval
    now, taken = 1_000_000, []
    missing = 0  # nanoseconds of tokens that are missing in a model of the bucket
    for pause, tries in steps:
        now += pause
        missing = max(0, missing - pause)
        for _ in range(tries):
            expected = missing + interval <= burst * interval
            assert bucket.has_token(now) is expected
            assert bucket.take(now) is expected
            assert not (expected and bucket.is_full(now))
            if expected:
                missing += interval
                taken.append(now)
    for first, start in enumerate(taken):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + rate * (taken[last] - start) / SECOND


def test_no_limit() -> None:
    """Rate 0 is no limit. A rate above one token per nanosecond counts as that rate."""
    bucket = Bucket(Rate.of(0, 1))
    assert all(bucket.take(1) for _ in range(1000))
    assert Rate.of(2**31 - 1, 2) == (1, 1)


def test_other_rate() -> None:
    """Another rate applies to the next token."""
    bucket = Bucket(Rate.of(1, 1))
    assert bucket.take(1)
    assert not bucket.take(2)
    bucket.reconfigure(Rate.of(1, 3))
    assert bucket.take(2)


def test_flows_of_a_source_share_a_bucket() -> None:
    """A new flow of a source does not get a new burst allowance, neither beside the first flow nor after it."""
    sources = Sources(Rate.of(1, 2), 10)
    bucket = sources.join("a")
    assert sources.join("a") is bucket
    assert sources.join("b") is not bucket
    assert bucket.take(1)
    assert bucket.take(1)
    for _ in range(2):
        sources.leave("a", 1)
    assert not sources.join("a").take(2)
    sources.leave("a", 2)
    sources.leave("b", 3 * SECOND)
    assert len(sources) == 0


def test_number_of_buckets() -> None:
    """At most `capacity` buckets are kept for sources without a flow. The oldest goes first."""
    sources = Sources(Rate.of(1, 1), 3)
    for number in range(100):
        assert sources.join(number).take(1)
        sources.leave(number, 1)
    assert len(sources) == 3
    assert not sources.join(99).take(1)
    assert sources.join(96).take(1)


def test_other_rate_of_all_sources() -> None:
    """Another rate applies to all buckets, and another capacity from the next flow on."""
    sources = Sources(Rate.of(1, 1), 3)
    bucket = sources.join("a")
    assert bucket.take(1)
    sources.reconfigure(Rate.of(1, 2), 0)
    assert bucket.take(1)
    sources.leave("a", 1)
    assert len(sources) == 0
