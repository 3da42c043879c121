"""Map the kernel's counts of ciphertext to plaintext: how much of the echo has arrived?"""

from __future__ import annotations

from bisect import bisect_right

# The largest plaintext of a TLS record (RFC 8446, section 5.1).
RECORD = 16 * 1024

# Marks that a connection keeps before it drops those that it does not need.
MAX_MARKS = 512


class PlaintextMap:
    """How much plaintext lies in the first N bytes of ciphertext.

    The map has one mark per write, at the end of the write's ciphertext. A pruned map may return less than the truth,
    but never more.
    """

    __slots__ = ("_marks", "_merged")

    def __init__(self) -> None:
        # Ciphertext and plaintext up to the end of a write.
        self._marks: list[tuple[int, int]] = [(0, 0)]
        # This many of the marks after the first one stand for several writes each.
        self._merged = 0

    def __len__(self) -> int:
        """Return the number of marks."""
        return len(self._marks)

    def add(self, ciphertext: int, plaintext: int) -> None:
        """Add a write of this much plaintext. `ciphertext` counts everything up to its end."""
        self._marks.append((ciphertext, self._marks[-1][1] + plaintext))

    def plaintext(self, ciphertext: int) -> int:
        """Return how many bytes of plaintext the first N bytes of ciphertext hold in complete records.

        The client cannot use a part of a record.
        """
        index = self._find(ciphertext)
        if index < 0:
            return 0  # dropped marks: a unix socket was reset, and nothing is known to have arrived
        start, plain = self._marks[index]
        following = index + 1
        if following == len(self._marks) or following <= self._merged:
            return plain
        end, plain_end = self._marks[following]
        # All records of a large write are full, except the last one. The rest of the ciphertext is the records' overhead,
        # and perhaps a message of TLS itself before them. The result is a lower bound if all of it comes first.
        overhead = (end - start) - (plain_end - plain)
        return plain + max(0, ciphertext - start - overhead) // RECORD * RECORD

    def prune(self, arrived: int) -> None:
        """Drop the marks of ciphertext that has arrived. If most marks remain, merge them in pairs."""
        # Of a unix socket the kernel counts buffers, so `arrived` may be negative.
        dropped = max(0, self._find(arrived))
        del self._marks[:dropped]
        self._merged = max(0, self._merged - dropped)
        if len(self._marks) > MAX_MARKS // 2:
            last = self._marks[-1]
            self._marks[1:] = self._marks[2::2]
            self._merged = len(self._marks) - 1
            if self._marks[-1] != last:
                self._marks.append(last)

    def _find(self, ciphertext: int) -> int:
        """Return the index of the last mark within the first N bytes of ciphertext."""
        return bisect_right(self._marks, ciphertext, key=lambda mark: mark[0]) - 1
