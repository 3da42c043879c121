"""The PROXY header, read in front of a session or of its TLS."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from echod.connection.tls import TlsLayer
from echod.net import proxy_protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from echod.connection.echo import EchoSession


class HeaderReader(asyncio.Protocol):
    """The first protocol of a TCP transport whose client begins with a PROXY header.

    When the header is whole, who is next takes this one's place, and gets what was read behind the header.

    Args:
        session: told of what is wrong with the header, and of an end before it is whole.
        following: the session, or its TLS.
        identify: takes the header and says whether its client is served; if not, it has ended the session.

    """

    __slots__ = ("_data", "_following", "_identify", "_transport", "session")

    def __init__(
        self, session: EchoSession, following: EchoSession | TlsLayer, identify: Callable[[proxy_protocol.Header], bool]
    ) -> None:
        self.session = session
        self._following = following
        self._identify = identify
        self._data = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the session have its transport, though the header is still to come."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by inheritance
        self._following.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Collect the header."""
        self.session.overhead_bytes += len(data)
        self._data += data
        try:
            size = proxy_protocol.size(self._data)
            if size is None or len(self._data) < size:
                return
            header = proxy_protocol.parse(self._data[:size])
        except proxy_protocol.ProxyError as error:
            self._end(str(error))
            return
        if self._identify(header):
            self._hand_over(self._data[size:])

    def eof_received(self) -> bool:
        """End a connection whose header is not whole; without a byte of one, it was just a look at the port."""
        self.session.eof = True
        if self._data:
            self._end("the client closed the connection in the middle of its header")
        else:
            self.session.close("eof")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass on the end."""
        self._following.connection_lost(exc)

    def _end(self, detail: str) -> None:
        self.session.detail = detail
        self.session.close("proxy_header")

    def _hand_over(self, rest: bytes) -> None:
        assert self._transport is not None
        # uvloop decides what to do with a read when reading begins.
        self._transport.pause_reading()
        self._transport.set_protocol(self._following)
        self._transport.resume_reading()
        if isinstance(self._following, TlsLayer):
            self.session.stage = "handshake"
            if rest:
                self.session.overhead_bytes -= len(rest)  # which it is going to count itself
                self._following.feed(rest)
        else:
            self.session.begin()
            if rest:
                self._following.data_received(rest)
