"""Divide reads into messages. A message is the data of one read, or a line with its line ending."""

from __future__ import annotations

from echod.connection.line import whole_lines


class ReadFramer:
    """Return each read as a message, or as two: a read is split at the byte at which the fault starts.

    Args:
        split_at: number of bytes before the split.

    """

    __slots__ = ("_before_split",)

    def __init__(self, split_at: int) -> None:
        self._before_split = split_at

    def feed(self, data: bytes, max_line: int) -> tuple[list[bytes], bool]:  # noqa: ARG002  (for LineFramer)
        """Return the messages in a read. The second value is False: a read is never too long."""
        split = self._before_split
        self._before_split -= len(data)
        return ([data[:split], data[split:]] if 0 < split < len(data) else [data]), False

    def flush(self) -> bytes:
        """Return nothing: a read is always a complete message."""
        return b""


class LineFramer:
    """Return each complete line as a message. Keep the unfinished line."""

    __slots__ = ("_unfinished",)

    def __init__(self) -> None:
        self._unfinished = bytearray()

    def feed(self, data: bytes, max_line: int) -> tuple[list[bytes], bool]:
        """Return the lines that the data completes, and whether the next line is longer than `max_line`."""
        lines, too_long = whole_lines(self._unfinished, data, max_line)
        # Not splitlines(), which splits at carriage returns too.
        return [line + b"\n" for line in lines.split(b"\n")[:-1]], too_long

    def flush(self) -> bytes:
        """Remove and return the unfinished line."""
        unfinished = bytes(self._unfinished)
        self._unfinished.clear()
        return unfinished
