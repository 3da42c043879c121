"""Find complete request heads in received bytes, without I/O."""

from __future__ import annotations

import re

# Lines of a head (RFC 9112, sections 3 and 5). HTTP/2 begins with a request line, and its client then waits for frames.
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(_TOKEN + rb" [^\x00-\x20\x7f]+ HTTP/1\.\d")
_FIELD_LINE = re.compile(_TOKEN + rb":[^\x00-\x08\x0a-\x1f\x7f]*")
# An incomplete line that can still become one of the two.
_INCOMPLETE_LINE = re.compile(rb"(?:" + _TOKEN + rb"(?:[ :][^\x00-\x08\x0a-\x1f\x7f]*)?)?\r?")

MALFORMED = b"\x00\r\n\r\n"
"""Stands for bytes that cannot become a head. aiohttp answers it with 400 and closes the connection."""


class HeadParser:
    """Split received bytes into request heads."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._line_start = 0
        self._lines: list[bytes] = []

    def feed(self, data: bytes) -> int:
        """Add received bytes. Return the number of bytes that are not yet part of a complete head."""
        self._buffer += data
        return len(self._buffer)

    def next_head(self) -> bytes | None:
        """Remove and return the next head, or return None if it is incomplete.

        A line may end in LF alone, and empty lines before a request are skipped (RFC 9112, section 2.2).
        """
        while (end := self._buffer.find(b"\n", self._line_start)) >= 0:
            line = bytes(self._buffer[self._line_start : end]).removesuffix(b"\r")
            self._line_start = end + 1
            if line:
                if not (_FIELD_LINE if self._lines else _REQUEST_LINE).fullmatch(line):
                    return MALFORMED
                self._lines.append(line)
            elif self._lines:
                head = b"\r\n".join((*self._lines, b"", b""))
                del self._buffer[: self._line_start]
                self._line_start = 0
                self._lines.clear()
                return head
        return None if _INCOMPLETE_LINE.fullmatch(self._buffer, self._line_start) else MALFORMED
