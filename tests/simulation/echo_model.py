"""The echo that a client must get, computed from its own bytes and independently of echod's code."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from scenario import FAULTS

if TYPE_CHECKING:
    from scenario import Listener

_LENGTH = 1_000_003
_PATTERN = random.Random(862).randbytes(_LENGTH)
_TWICE = _PATTERN * 2


def pattern(offset: int, size: int) -> bytes:
    """Return bytes of the endless pattern that clients send, at most a million of them."""
    start = offset % _LENGTH
    return _TWICE[start : start + size]


def is_prefix(listener: Listener) -> bool:
    """Tell whether the echo is always a prefix of the client's bytes."""
    return listener.mode != "info" and listener.fault not in {"doubling", "halving", "flipping"}


def _lines(data: bytes) -> list[bytes]:
    """Return the lines with their endings, and the unfinished line at the end."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines


def echo_size(listener: Listener, max_line: int, data: bytes) -> int:
    """Return the size of the complete echo of a listener whose echo is a prefix."""
    if listener.mode == "line":
        size = 0
        for line in _lines(data):
            if len(line) > max_line:
                break
            size += len(line)
        return size
    return min(len(data), int(FAULTS.get(listener.fault, {}).get("after_bytes", len(data))))


def is_echo(listener: Listener, data: bytes, reply: bytes, *, at_eof: bool) -> bool:
    """Tell whether a reply is the complete echo of a faulty listener in mode line.

    Args:
        listener: the listener.
        data: the bytes that the daemon received.
        reply: the bytes that the client got.
        at_eof: whether the client ended the connection. If not, the unfinished line is no message.

    """
    lines = _lines(data)
    rest = b"" if at_eof else lines.pop()
    if listener.fault == "doubling":
        return reply == b"".join(2 * line for line in lines) + rest
    if listener.fault == "halving":
        return reply == b"".join(line[: len(line) // 2] for line in lines) + rest
    if len(reply) != len(data):
        return False
    place = 0
    for line in lines:
        flipped = sum((a ^ b).bit_count() for a, b in zip(line, reply[place : place + len(line)], strict=True))
        if flipped != bool(line):
            return False
        place += len(line)
    return reply[place:] == rest
