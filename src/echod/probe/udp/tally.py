"""Decide for each datagram whether it is received or lost. This module does no I/O and has no clock."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

from echod.probe.errors import Mismatch

if TYPE_CHECKING:
    from echod.probe.udp.payload import Payloads

# Lost datagrams that are remembered to recognise their late echoes. Each needs about 100 bytes.
_REMEMBERED = 1 << 20


class Tally:
    """Tracks each datagram by its sequence number, and counts.

    A datagram is in flight until its echo arrives (received) or its timeout ends (lost), so in the end
    sent = received + lost. A further echo of a received datagram is duplicated. An echo of a lost one is late, and the
    datagram stays lost. The oldest lost datagrams are forgotten if there are more than a million.

    Args:
        payloads: makes and recognises the datagrams.
        timeout: the longest wait for an echo, in nanoseconds.

    """

    def __init__(self, payloads: Payloads, timeout: int) -> None:
        self.sent = 0
        self.received = 0
        """Datagrams with an echo in time."""
        self.lost = 0
        """Datagrams without an echo in time."""
        self.late = 0
        """Echoes of lost datagrams."""
        self.duplicated = 0
        """Further echoes of a datagram that has had one."""
        self.reordered = 0
        """Received datagrams with a lower sequence number than an earlier one (RFC 4737, section 3.3)."""
        self.corrupted = 0
        """Echoes with wrong bytes or a wrong length. Each also counts as received, late or duplicated."""
        self.foreign = 0
        """Datagrams that are not echoes of this session."""
        self.mismatch: Mismatch | None = None
        """The first wrong byte of the first corrupted echo."""
        self.stranger = b""
        """The first foreign datagram."""
        self._payloads = payloads
        self._timeout = timeout
        self._flying: collections.OrderedDict[int, tuple[int, int]] = collections.OrderedDict()
        """When each datagram in flight was due and sent, nanoseconds, in the order of sequence numbers."""
        self._missing: collections.OrderedDict[int, None] = collections.OrderedDict()
        """The lost datagrams without an echo so far."""
        self._expected = 0
        """One more than the highest sequence number received: NextExp in RFC 4737."""

    @property
    def in_flight(self) -> int:
        """The number of datagrams that are neither received nor lost."""
        return len(self._flying)

    @property
    def expiry(self) -> int | None:
        """When the next datagram is lost, or None if none is in flight."""
        oldest = next(iter(self._flying.values()), None)
        return None if oldest is None else oldest[1] + self._timeout

    def send(self, due: int, now: int) -> bytes:
        """Count a datagram as sent, and return it.

        Args:
            due: when it was due, nanoseconds. Its round trip counts from then, its timeout from now.
            now: the time.

        """
        self._flying[self.sent] = due, now
        self.sent += 1
        return self._payloads.datagram(self.sent - 1)

    def receive(self, datagram: bytes, now: int) -> int | None:
        """Count a datagram from the server. Return the round trip if it is a first echo in time, else None."""
        sequence = self._sequence(datagram)
        if sequence is None:
            self.foreign += 1
            self.stranger = self.stranger or datagram
            return None
        if datagram != (right := self._payloads.datagram(sequence)):
            self.corrupted += 1
            self.mismatch = self.mismatch or Mismatch.find(right, datagram)
        if flight := self._flying.pop(sequence, None):
            self.received += 1
            self.reordered += sequence < self._expected
            self._expected = max(self._expected, sequence + 1)
            return now - flight[0]
        if sequence in self._missing:
            del self._missing[sequence]
            self.late += 1
        else:
            self.duplicated += 1
        return None

    def expire(self, now: int) -> int:
        """Count datagrams as lost if their timeout has ended. Return the number of those."""
        before = self.lost
        while (expiry := self.expiry) is not None and expiry <= now:
            sequence, _ = self._flying.popitem(last=False)
            self.lost += 1
            self._missing[sequence] = None
            if len(self._missing) > _REMEMBERED:
                self._missing.popitem(last=False)
        return self.lost - before

    def _sequence(self, datagram: bytes) -> int | None:
        """Return the sequence number of a datagram, or None if this session has not sent it.

        If a small datagram has only a part of the number, it is the oldest in flight with that part, or else the newest.
        """
        residue = self._payloads.residue(datagram)
        if residue is None:
            return None
        modulus = self._payloads.modulus
        oldest = next(iter(self._flying), self.sent)
        for sequence in range(oldest + (residue - oldest) % modulus, self.sent, modulus):
            if sequence in self._flying:
                return sequence
        newest = self.sent - 1 - (self.sent - 1 - residue) % modulus
        return newest if newest >= 0 else None
