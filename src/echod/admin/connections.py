"""Keep the open connections, and bound their number."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from echod.admin.connection import Connection
from echod.admin.sharing import Turns
from echod.server.listener_task import unwatch

if TYPE_CHECKING:
    import socket

    from aiohttp import web

    from echod.admin.limits import AdminLimits


class Connections:
    """The open connections, in the order of their last requests.

    Args:
        server: aiohttp's server, which makes a protocol for each connection.
        limits: the bounds of the connections.

    """

    def __init__(self, server: web.Server, limits: AdminLimits) -> None:
        self._server = server
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._turns = Turns(limits.answer_interval)
        self._open: dict[web.RequestHandler, Connection] = {}
        self._joining: set[asyncio.Task[None]] = set()
        self._all_lost = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, sock: socket.socket, _: object) -> None:
        """Add an accepted socket. At the limit, it replaces the one that has asked for nothing for the longest time."""
        if len(self._open) >= self._limits.max_connections:
            next(iter(self._open.values())).abort()
        task = self._loop.create_task(self._join(sock))
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)

    def answered(self, http: web.RequestHandler) -> None:
        """Let a connection continue after an answer."""
        if connection := self._open.get(http):
            connection.answered()

    async def close(self) -> None:
        """Let unfinished answers finish within the grace time, then abort all connections."""
        await asyncio.gather(*self._joining)
        self._server.pre_shutdown()
        await self._server.shutdown(self._limits.grace)
        while self._open:
            self._all_lost.clear()
            for connection in self._open.values():
                connection.abort()
            await self._all_lost.wait()

    async def _join(self, sock: socket.socket) -> None:
        http = self._server()
        connection = Connection(http, self._limits, partial(self._take_turn, http), partial(self._remove, http))
        self._open[http] = connection
        try:
            await self._loop.connect_accepted_socket(lambda: connection, sock)
        except OSError:  # the client has reset the connection already
            unwatch(sock)
            sock.close()
            self._remove(http)

    def _take_turn(self, http: web.RequestHandler) -> float:
        """Return the seconds that a request has to wait. Move its connection to the end."""
        self._open[http] = self._open.pop(http)
        return self._turns.take(self._loop.time())

    def _remove(self, http: web.RequestHandler) -> None:
        del self._open[http]
        if not self._open:
            self._all_lost.set()
