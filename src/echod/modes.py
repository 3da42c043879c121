"""What a listener may do instead of returning every byte at once: whole lines, or what it sees of the connection."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from echod.session import EchoSession, SessionSettings

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable


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
        whole = data.rfind(b"\n") + 1
        if len(self._tail) + len(data) > self.settings.max_line:
            # Only now may a line be too long.
            self._tail += data
            self._echo_lines_that_fit()
            return
        if whole:
            self._write(bytes(self._tail) + data[:whole] if self._tail else data[:whole])
            self._tail = bytearray(data[whole:])
        else:
            self._tail += data

    def conclude(self) -> None:
        """Echo the unfinished line."""
        if self._tail:
            self._write(bytes(self._tail))
            self._tail.clear()

    def _echo_lines_that_fit(self) -> None:
        longest, tail = self.settings.max_line, self._tail
        end = 0
        while (line_feed := tail.find(b"\n", end, end + longest)) >= 0:
            end = line_feed + 1
        too_long = len(tail) - end > longest
        if end:
            self._write(bytes(tail[:end]))
        if too_long:
            tail.clear()
            self.finish("line_too_long")
        else:
            del tail[:end]

    def _write(self, data: bytes) -> None:
        self._written += len(data)
        self._connected.write(data)
        if len(data) > self._large:
            self._weigh()


class InfoSession(EchoSession):
    """Say in one JSON object and a newline what the server sees of the connection, and close it.

    Args:
        sock: connected.
        settings: what a session takes of the settings.
        ended: done at the end.
        describe: returns what is to be said.

    """

    __slots__ = ("_describe", "_written")

    def __init__(
        self,
        sock: socket.socket,
        settings: SessionSettings,
        ended: asyncio.Future[None],
        describe: Callable[[], dict[str, object]],
    ) -> None:
        super().__init__(sock, settings, ended)
        self._describe: Callable[[], dict[str, object]] | None = describe
        self._written = 0

    @property
    def written(self) -> int:
        """How many bytes were given to the transport so far."""
        return self._written

    def begin(self) -> None:
        """Say it."""
        super().begin()
        if self.reason is None and self._describe is not None:
            line = json.dumps(self._describe(), ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
            self._written = len(line)
            self._connected.write(line)
            self.finish("info")

    def data_received(self, data: bytes) -> None:
        """Count and drop."""
        self.discarded += len(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the final counts, and let go of the client, which has this session."""
        self._describe = None
        super().connection_lost(exc)
