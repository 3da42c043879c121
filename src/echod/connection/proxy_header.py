"""The PROXY header, read before a session or its TLS."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from echod.connection.state import Phase
from echod.net import proxy_protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from echod.connection.echo import EchoSession
    from echod.connection.tls import TlsLayer


class HeaderReader(asyncio.Protocol):
    """The first protocol of a TCP transport if its client must begin with a PROXY header.

    After the header, the next protocol takes its place and gets the data that was read after the header.

    Args:
        session: rejects the client if its header is wrong or incomplete.
        following: the next protocol: the session or its TLS.
        identify: returns whether the client that the header names is accepted. If not, it has closed the session.

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
        """Give the session its transport now, so that it can be ended before the header is complete."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports do not inherit from it
        self.session.expect(Phase.PROXY_HEADER)
        self._following.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Collect the header."""
        self.session.count_overhead(len(data))
        self._data += data
        try:
            size = proxy_protocol.size(self._data)
            if size is None or len(self._data) < size:
                return
            header = proxy_protocol.parse(self._data[:size])
        except proxy_protocol.ProxyError as error:
            self.session.reject("proxy_header", str(error))
            return
        if self._identify(header):
            self._hand_over(self._data[size:])

    def eof_received(self) -> bool:
        """Reject an incomplete header. A client that sends nothing, such as a health check, ends well."""
        self.session.client_closed()
        if self._data:
            self.session.reject("proxy_header", "the client closed the connection in the middle of its header")
        else:
            self.session.close("eof")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end."""
        self._following.connection_lost(exc)

    def _hand_over(self, rest: bytes) -> None:
        assert self._transport is not None
        # uvloop chooses its way to read from the protocol's type when reading begins, so reading must begin again.
        self._transport.pause_reading()
        self._transport.set_protocol(self._following)
        self._transport.resume_reading()
        self._following.take_over(rest)
