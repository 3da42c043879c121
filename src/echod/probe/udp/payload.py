"""The datagrams of a probe: a header, and bytes that depend on it. This module does no I/O."""

from __future__ import annotations

# The header: magic, session, sequence number.
_MAGIC = b"\x9eCHO"
SESSION = 6
_SEQUENCE = 6
HEADER = len(_MAGIC) + SESSION + _SEQUENCE

# Distance in the pattern between the bytes of one datagram and the next. It is prime.
_STEP = 7919


class Payloads:
    """Makes the datagrams of one session, and recognises them.

    A datagram is the header and a slice of the pattern. The sequence number determines the start of the slice. A datagram
    smaller than the header consists of the last bytes of the header.

    Args:
        session: six bytes, random for each probe.
        pattern: bytes derived from the session, at least as many as the period and one datagram.
        period: number of places in the pattern at which a datagram may start.
        size: bytes per datagram.

    """

    def __init__(self, session: bytes, pattern: bytes, period: int, size: int) -> None:
        self.size = size
        self._prefix = (_MAGIC + session)[max(0, HEADER - size) :]
        self._pattern = pattern
        self._period = period
        self._digits = min(size, _SEQUENCE)
        self.modulus = 1 << 8 * self._digits
        """A datagram has the sequence number modulo this."""

    def datagram(self, sequence: int) -> bytes:
        """Return the datagram with a sequence number."""
        header = self._prefix + (sequence % self.modulus).to_bytes(self._digits, "big")
        place = sequence * _STEP % self._period
        return header + self._pattern[place : place + self.size - len(header)]

    def residue(self, datagram: bytes) -> int | None:
        """Return the sequence number modulo `modulus`, or None if the datagram is not of this session.

        Only the header is compared. A datagram without a complete header must have the right size.
        """
        start = len(self._prefix)
        end = start + self._digits
        if not datagram.startswith(self._prefix) or len(datagram) < end:
            return None
        if self.size < HEADER and len(datagram) != self.size:
            return None
        return int.from_bytes(datagram[start:end], "big")
