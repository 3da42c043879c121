"""Test that the boundaries of TLS records are found, however the data is split."""

from __future__ import annotations

import random

import pytest

from echod.connection.record_counter import RecordCounter


def record(size: int) -> bytes:
    """Return a record with a body of this size. The body looks like headers."""
    return b"\x17\x03\x03" + size.to_bytes(2, "big") + (b"\x17\x03\x03\xff\xff" * (size // 5 + 1))[:size]


SIZES = [0, 1, 3, 4, 5, 300, 0, 0, 16_384, 16_640, 2]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 7, 1000, 65_536])
@pytest.mark.parametrize("view", [bytes, memoryview])
def test_reads_of_one_size(step: int, view: type[bytes | memoryview]) -> None:
    """Report the boundaries between records, also if headers are split or reads contain several records."""
    data = b"".join(map(record, SIZES))
    ends = {sum(5 + size for size in SIZES[:count]) for count in range(1, len(SIZES) + 1)}
    counter = RecordCounter()
    assert not counter.is_inside
    for start in range(0, len(data), step):
        piece = data[start : start + step]
        counter.feed(view(piece))
        assert counter.is_inside == (start + len(piece) not in ends)
    assert not counter.is_inside


@pytest.mark.parametrize("seed", range(5))
def test_reads_of_any_size(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.choice([0, 1, 5, 50, 16_384]) for _ in range(300)]
    data = b"".join(map(record, sizes))
    ends = {sum(5 + size for size in sizes[:count]) for count in range(1, len(sizes) + 1)}
    counter, position = RecordCounter(), 0
    while position < len(data):
        # Most reads end next to a boundary.
        near = min(end for end in ends if end > position) + rng.randint(-6, 6)
        following = max(position + 1, rng.choice([near, position + rng.randint(1, 65_536)]))
        piece = data[position:following]
        counter.feed(piece)
        position += len(piece)
        assert counter.is_inside == (position not in ends)


def test_hello_of_ssl_2() -> None:
    """Claim nothing about a client that begins in the format of SSL 2, whose records have other headers."""
    counter = RecordCounter()
    for data in (b"\x80", b"\x2e\x01\x03\x03", record(7)[:-1]):
        counter.feed(data)
        assert not counter.is_inside
