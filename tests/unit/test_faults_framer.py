"""The framers divide reads into messages without losing a byte."""

from __future__ import annotations

import pytest

from echod.connection.faults.framer import LineFramer, ReadFramer


@pytest.mark.parametrize(
    ("split_at", "reads", "messages"),
    [
        (0, [b"abc", b"d"], [b"abc", b"d"]),
        (2, [b"abc", b"d"], [b"ab", b"c", b"d"]),
        (3, [b"abc", b"d"], [b"abc", b"d"]),
        (4, [b"abc", b"de"], [b"abc", b"d", b"e"]),
    ],
)
def test_reads(split_at: int, reads: list[bytes], messages: list[bytes]) -> None:
    """Each read is a message, except that one is split at the start of the fault."""
    framer = ReadFramer(split_at)
    assert [message for read in reads for message in framer.feed(read, 1)[0]] == messages
    assert framer.flush() == b""


def test_lines() -> None:
    """Each line is a message with its line ending, however it arrives. A carriage return does not end a line."""
    framer = LineFramer()
    assert framer.feed(b"a", 10) == ([], False)
    assert framer.feed(b"b\r\n\nc\rd\ne", 10) == ([b"ab\r\n", b"\n", b"c\rd\n"], False)
    assert framer.flush() == b"e"
    assert framer.flush() == b""


def test_line_that_is_too_long() -> None:
    """The lines before a line that is too long are messages."""
    framer = LineFramer()
    assert framer.feed(b"ab\n" + b"c" * 6, 5) == ([b"ab\n"], True)
    assert framer.flush() == b""
