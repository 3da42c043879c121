"""Mode line: echo whole lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echod.connection.echo import EchoSession, SessionSettings

if TYPE_CHECKING:
    import asyncio
    import socket


def whole_lines(tail: bytearray, data: bytes, longest: int) -> tuple[bytes, bool]:
    """Return the lines that are whole with this data, in one piece, and whether what follows is too long for one.

    Args:
        tail: what came before, without a line feed; what is left without one is there afterwards, and nothing if it is
            too long.
        data: what has come now.
        longest: bytes that a line may have, its ending included.

    """
    if len(tail) + len(data) > longest:
        # Only now may a line be too long.
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
    # From the far end of what may be one line: all lines before that fit, and a flood of short ones is few steps.
    while (line_feed := tail.rfind(b"\n", end, end + longest)) >= 0:
        end = line_feed + 1
    too_long = len(tail) - end > longest
    whole = bytes(tail[:end])
    del tail[: len(tail) if too_long else end]
    return whole, too_long


class LineSession(EchoSession):
    """Return whole lines, each when its line feed has come; at the end, what is left without one.

    How TCP splits or joins what the client writes makes no difference. A line that is longer than `max_line`, its
    ending included, ends the session behind the lines before it.
    """

    __slots__ = ("_tail", "_written")

    def __init__(self, sock: socket.socket, settings: SessionSettings, ended: asyncio.Future[None]) -> None:
        super().__init__(sock, settings, ended)
        self._tail = bytearray()
        self._written = 0

    @property
    def written(self) -> int:
        """How many bytes were given to the transport so far."""
        return self._written

    def data_received(self, data: bytes) -> None:
        """Echo up to the last line feed, and keep the rest."""
        self.received += len(data)
        whole, too_long = whole_lines(self._tail, data, self.settings.max_line)
        if whole:
            self._write(whole)
        if too_long:
            self.close("line_too_long")

    def conclude(self) -> None:
        """Echo the unfinished line, and send FIN."""
        if self._tail:
            self._write(bytes(self._tail))
            self._tail.clear()
        super().conclude()

    def _write(self, data: bytes) -> None:
        self._written += len(data)
        self._connected.write(data)
        if len(data) > self._large:
            self._pause_if_unsent()
