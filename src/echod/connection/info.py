"""Mode info: describe the connection to the client."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from echod.connection.echo import EchoSession, SessionSettings

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable


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
            self.close("info")

    def data_received(self, data: bytes) -> None:
        """Count and drop."""
        self.discarded += len(data)

    def eof_received(self) -> bool:
        """Answer a client all the same that closes its own direction before its turn has come."""
        if self.stage is not None:
            return super().eof_received()
        self.eof = True
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the final counts, and let go of the client, which has this session."""
        self._describe = None
        super().connection_lost(exc)
