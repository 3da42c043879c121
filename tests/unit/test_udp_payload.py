"""The datagrams of a UDP probe."""

from __future__ import annotations

import pytest

from echod.probe.udp.payload import HEADER, SESSION, Payloads

pytestmark = pytest.mark.once

ONE, OTHER = bytes(range(SESSION)), bytes(range(1, SESSION + 1))
PATTERN = bytes(range(251)) * 300


def payloads(size: int, session: bytes = ONE) -> Payloads:
    return Payloads(session, PATTERN, 251, size)


@pytest.mark.parametrize("size", [*range(HEADER + 2), 64, 65507])
def test_sizes(size: int) -> None:
    """A datagram of any size has as much of its sequence number as fits, and the rest of its bytes differ too."""
    own = payloads(size)
    for sequence in (0, 1, 255, 256, 65536, 1 << 40):
        datagram = own.datagram(sequence)
        assert len(datagram) == size
        assert own.residue(datagram) == sequence % own.modulus == sequence % 256 ** min(size, 6)
    if size > HEADER:
        assert own.datagram(0)[HEADER:] != own.datagram(1)[HEADER:]


@pytest.mark.parametrize("size", range(7, 20))
def test_sessions(size: int) -> None:
    """A datagram that has a part of the session is recognised in its own session only."""
    assert payloads(size, OTHER).residue(payloads(size).datagram(5)) is None


@pytest.mark.parametrize("size", [3, 15, 16, 64])
def test_lengths(size: int) -> None:
    """A datagram without a complete header has the right length, or is not recognised. Others need only the header."""
    own = payloads(size)
    datagram = own.datagram(7)
    recognised = 7 if size >= HEADER else None
    assert own.residue(datagram + b"x") == recognised
    assert own.residue(datagram[: HEADER - 1 if size >= HEADER else size - 1]) is None
    assert own.residue(datagram[:HEADER]) == 7


def test_another_protocol() -> None:
    """A datagram without the magic is not recognised."""
    own = payloads(64)
    assert own.residue(b"") is None
    assert own.residue(b"\0" + own.datagram(3)[1:]) is None
