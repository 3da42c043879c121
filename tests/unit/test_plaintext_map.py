"""Test how much plaintext is derived from acknowledged ciphertext."""

from __future__ import annotations

import itertools
import random

import pytest

from echod.connection.plaintext_map import MAX_MARKS, RECORD, PlaintextMap

HANDSHAKE = 1500
OVERHEAD = 22


def ciphertext_size(plaintext: int) -> int:
    """Return the size of a write's records."""
    return plaintext + -(-plaintext // RECORD) * OVERHEAD


class Writer:
    """Fill a map and prune it as a connection does."""

    def __init__(self) -> None:
        self.map = PlaintextMap()
        self.written = HANDSHAKE
        self.plaintext = 0
        self.acked = 0

    def write(self, size: int) -> None:
        self.written += ciphertext_size(size)
        self.plaintext += size
        self.map.add(self.written, size)
        if len(self.map) > MAX_MARKS:
            self.map.prune(self.acked)


def test_handshake_holds_no_plaintext() -> None:
    writer = Writer()
    assert writer.map.plaintext(HANDSHAKE) == 0
    writer.write(10)
    assert writer.map.plaintext(HANDSHAKE) == 0


def test_incomplete_record_does_not_count() -> None:
    writer = Writer()
    writer.write(10)
    writer.write(20)
    assert writer.map.plaintext(writer.written) == 30
    assert writer.map.plaintext(writer.written - 1) == 10
    assert writer.map.plaintext(HANDSHAKE + ciphertext_size(10) - 1) == 0


def test_complete_records_of_a_large_write_count() -> None:
    """Return at most one record less than the truth within a write of several records."""
    writer = Writer()
    writer.write(10)
    before = writer.written
    writer.write(100_000)
    for records in range(7):
        complete = before + records * (RECORD + OVERHEAD)
        almost_next = min(complete + RECORD + OVERHEAD, writer.written) - 1
        for acked in (complete, almost_next):
            assert 10 + max(0, records - 1) * RECORD <= writer.map.plaintext(acked) <= 10 + records * RECORD
    assert writer.map.plaintext(writer.written) == 100_010


def test_message_of_tls_before_a_write() -> None:
    """Count no record too early after a key update or a session ticket between two writes."""
    map_ = PlaintextMap()
    map_.add(ciphertext_size(RECORD), RECORD)
    start = ciphertext_size(RECORD) + 300
    map_.add(start + ciphertext_size(2 * RECORD), 2 * RECORD)
    assert map_.plaintext(start + ciphertext_size(RECORD) - 1) == RECORD
    assert map_.plaintext(start + ciphertext_size(2 * RECORD)) == 3 * RECORD


def test_number_of_marks_is_bounded() -> None:
    """Stay small and never return too much, however many small writes are unacknowledged."""
    writer = Writer()
    for number in range(1, 5001):
        writer.write(10)
        assert len(writer.map) <= MAX_MARKS + 1
        assert writer.map.plaintext(writer.written) == 10 * number
    for acked in range(0, 5000, 7):
        assert 0 <= writer.map.plaintext(HANDSHAKE + acked * ciphertext_size(10)) <= 10 * acked


def test_merged_marks_of_large_writes() -> None:
    """Count no record too early after marks of writes with several records were merged."""
    writer = Writer()
    ends = [HANDSHAKE]
    for _ in range(MAX_MARKS + 10):
        writer.write(RECORD + 100)
        ends += [ends[-1] + RECORD + OVERHEAD, ends[-1] + RECORD + 100 + 2 * OVERHEAD]
    truth = 0
    for number, end in enumerate(ends[1:], 1):
        assert writer.map.plaintext(end - 1) <= truth
        truth += RECORD if number % 2 else 100
    assert writer.map.plaintext(writer.written) == truth


def test_exact_again_after_the_acknowledgements() -> None:
    """Return exact results for later writes after the merged marks have been acknowledged."""
    writer = Writer()
    for _ in range(5000):
        writer.write(10)
    for _ in range(520):
        writer.acked = writer.written
        writer.write(10)
    record = ciphertext_size(10)
    assert writer.map.plaintext(writer.written - 2 * record) == 10 * (5520 - 2)
    assert writer.map.plaintext(writer.written - 2 * record - 1) == 10 * (5520 - 3)


def test_even_number_of_marks() -> None:
    """Keep the last mark when an even number of marks is merged in pairs."""
    map_ = PlaintextMap()
    for number in range(1, MAX_MARKS):
        map_.add(10 * number, 1)
    assert len(map_) % 2 == 0
    map_.prune(0)
    assert len(map_) == MAX_MARKS // 2 + 1
    assert map_.plaintext(10 * (MAX_MARKS - 1)) == MAX_MARKS - 1
    assert map_.plaintext(10 * (MAX_MARKS - 1) - 1) == MAX_MARKS - 2


def test_kernel_that_counts_buffers() -> None:
    """Accept a negative number of acknowledged bytes, as a unix socket may report."""
    writer = Writer()
    writer.acked = -1_000_000
    for _ in range(2000):
        writer.write(10)
    assert len(writer.map) <= MAX_MARKS + 1
    assert writer.map.plaintext(writer.written) == 20_000


def test_unknown_acknowledgements() -> None:
    """Return 0 for 0 acknowledged bytes, even after marks were dropped."""
    writer = Writer()
    for _ in range(2000):
        writer.acked = writer.written
        writer.write(10)
    assert writer.map.plaintext(0) == 0


@pytest.mark.parametrize("seed", range(5))
def test_any_writes_and_acknowledgements(seed: int) -> None:
    """Never return more than the complete records hold, and be exact when everything is acknowledged."""
    rng = random.Random(seed)
    writer = Writer()
    writes = [(HANDSHAKE, 0)]
    for _ in range(3000):
        writer.write(rng.choice([1, 100, RECORD, RECORD + 1, 60_000]))
        writes.append((writer.written, writer.plaintext))
        writer.acked = rng.randint(writer.acked, writer.written)
    for (start, before), (end, after) in itertools.pairwise(writes[-100:]):
        acked = rng.randint(start, end)
        complete = (
            min((acked - start) // (RECORD + OVERHEAD) * RECORD, after - before) if acked < end else after - before
        )
        if acked >= writer.acked:
            assert before <= writer.map.plaintext(acked) <= before + complete
        else:
            assert writer.map.plaintext(acked) <= before + complete
    assert writer.map.plaintext(writer.written) == writer.plaintext
