"""Mode line: echo whole lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echod.connection.echo import EchoSession

if TYPE_CHECKING:
    import asyncio
    import socket

    from echod.settings.model import LimitsSettings, ShutdownSettings


def whole_lines(tail: bytearray, data: bytes, longest: int) -> tuple[bytes, bool]:
    """Return all complete lines in one piece, and whether the line after them is too long.

    Args:
        tail: the unfinished line from earlier data. It is updated, and emptied if it is too long.
        data: the new data.
        longest: the maximum length of a line in bytes, including its ending.

    """
    if len(tail) + len(data) > longest:
        # Only in this case can a line be too long.
        tail += data
        return _lines_that_fit(tail, longest)
    end = data.rfind(b"\n") + 1
    if not end:
        tail += data
        return b"", False
    whole = bytes(tail) + data[:end] if tail else data[:end]
    tail[:] = data[end:]
    return whole, False


def _lines_that_fit(tail: bytearray, longest: int) -> tuple[bytes, bool]:
    end = 0
    # Each step searches backwards from the longest possible line. All lines before the match fit, so a flood of short
    # lines takes few steps.
    while (line_feed := tail.rfind(b"\n", end, end + longest)) >= 0:
        end = line_feed + 1
    too_long = len(tail) - end > longest
    whole = bytes(tail[:end])
    del tail[: len(tail) if too_long else end]
    return whole, too_long


class LineSession(EchoSession):
    """Echo each line when its line feed arrives. At the end, echo the unfinished line.

    The result does not depend on how TCP splits or joins the client's writes. A line longer than `max_line`, including
    its ending, closes the connection after the lines before it.
    """

    __slots__ = ("_tail", "_written")

    def __init__(
        self, sock: socket.socket, limits: LimitsSettings, shutdown: ShutdownSettings, ended: asyncio.Future[None]
    ) -> None:
        super().__init__(sock, limits, shutdown, ended)
        self._tail = bytearray()
        self._written = 0

    @property
    def written(self) -> int:
        """The number of bytes that the session has written to its transport."""
        return self._written

    def data_received(self, data: bytes) -> None:
        """Echo up to the last line feed, and keep the rest."""
        self.received += len(data)
        whole, too_long = whole_lines(self._tail, data, self.limits.max_line)
        if whole:
            self._write(whole)
        if too_long:
            self.close("line_too_long")

    def _flush(self) -> None:
        """Echo the unfinished line, then send FIN."""
        if self._tail:
            self._write(bytes(self._tail))
            self._tail.clear()
        super()._flush()

    def _write(self, data: bytes) -> None:
        self._written += len(data)
        self._connected.write(data)
        if len(data) > self._large:
            self._pause_if_unsent()
