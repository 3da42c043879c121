"""Pass requests to aiohttp one at a time, and close slow connections."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from echod.admin.heads import HeadParser

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from echod.admin.limits import AdminLimits


class Connection(asyncio.Protocol):
    """A protocol between a transport and aiohttp's protocol. aiohttp gets the next request once one is answered.

    Args:
        http: aiohttp's protocol.
        limits: the bounds of this connection.
        take_turn: returns the seconds that a request has to wait.
        lost: called once the connection is lost.

    """

    def __init__(
        self, http: web.RequestHandler, limits: AdminLimits, take_turn: Callable[[], float], lost: Callable[[], None]
    ) -> None:
        self._http = http
        self._limits = limits
        self._take_turn = take_turn
        self._on_lost = lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._heads = HeadParser()
        self._answering = False
        self._writing_paused = False
        self._eof = False
        self._lost = False
        self._expiry = self._loop.call_later(limits.patience, self.abort)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports do not inherit from it
        self._http.connection_made(transport)
        _ = self._http.peername  # aiohttp caches it; after a reset, uvloop fails to return it

    def data_received(self, data: bytes) -> None:
        """Collect request heads. Abort the connection if they exceed the limit."""
        if self._heads.feed(data) > self._limits.max_head:
            self.abort()
        else:
            self._handle_next()

    def eof_received(self) -> bool:
        """Keep the connection open until all requests received before the half-close are answered."""
        self._eof = True
        return self._answering

    def pause_writing(self) -> None:
        """Stop handling requests until the client reads its answers."""
        self._writing_paused = True
        self._http.pause_writing()

    def resume_writing(self) -> None:
        """Handle requests again."""
        self._writing_paused = False
        self._http.resume_writing()
        self._handle_next()

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the loss to aiohttp and to the owner."""
        self._expiry.cancel()
        self._lost = True
        # aiohttp fails if a request that it has just received finds the connection lost: report it one iteration later.
        self._loop.call_soon(self._report_loss, exc)

    def answered(self) -> None:
        """Handle the next request, as the current one is answered."""
        self._answering = False
        self._handle_next()

    def abort(self) -> None:
        """Reset the connection. Idempotent."""
        if self._transport is not None:
            self._transport.abort()

    def _handle_next(self) -> None:
        if self._answering or self._writing_paused:
            return
        if (head := self._heads.next_head()) is not None:
            self._answering = True
            self._expiry.cancel()
            self._expiry = self._loop.call_later(self._limits.patience, self.abort)
            if delay := self._take_turn():
                self._loop.call_later(delay, self._pass_on, head)
            else:
                self._pass_on(head)
        elif self._eof and self._transport is not None:
            self._transport.close()

    def _pass_on(self, head: bytes) -> None:
        if not self._lost:
            self._http.data_received(head)

    def _report_loss(self, exc: Exception | None) -> None:
        self._http.connection_lost(exc)
        self._on_lost()
