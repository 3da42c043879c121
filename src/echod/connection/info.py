"""Mode info: describe the connection to the client."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from echod.connection.echo import EchoSession
from echod.connection.state import Phase

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable

    from echod.settings.model import LimitsSettings, ShutdownSettings


class InfoSession(EchoSession):
    """Send a description of the connection as one line of JSON, and close.

    Args:
        sock: a connected socket.
        limits: the limits of the server.
        shutdown: the timeouts of the server's stop.
        ended: a future that the session completes when the connection is closed.
        describe: returns the description.

    """

    __slots__ = ("_describe", "_written")

    def __init__(
        self,
        sock: socket.socket,
        limits: LimitsSettings,
        shutdown: ShutdownSettings,
        ended: asyncio.Future[None],
        describe: Callable[[], dict[str, object]],
    ) -> None:
        super().__init__(sock, limits, shutdown, ended)
        self._describe: Callable[[], dict[str, object]] | None = describe
        self._written = 0

    @property
    def written(self) -> int:
        """The number of bytes that the session has written to its transport."""
        return self._written

    def begin(self) -> None:
        """Send the description."""
        super().begin()
        if self.phase is Phase.OPEN and self._describe is not None:
            line = json.dumps(self._describe(), ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
            self._written = len(line)
            self._connected.write(line)
            self.close("info")

    def data_received(self, data: bytes) -> None:
        """Discard input."""
        self.count_discarded(len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the final counts, and break the reference cycle with the client."""
        self._describe = None
        super().connection_lost(exc)
