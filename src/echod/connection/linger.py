"""The linger: discard input after our FIN until the client has all of its echo."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from echod.net import kernel

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from echod.clock import Clock
    from echod.settings.model import ShutdownSettings

# The kernel has no event for "everything is acknowledged", so a linger polls. Seconds.
_FIRST_POLL = 0.002
_LAST_POLL = 0.1


class LingeringSession(Protocol):
    """The part of a session that its linger uses."""

    sock: socket.socket
    eof: bool
    shutdown: ShutdownSettings

    def attempt(self, step: Callable[..., object], *arguments: object) -> None:
        """Run a step. If it raises, reset the connection."""

    def client_closed(self) -> None:
        """Record that the client closed its direction."""

    def count_discarded(self, size: int) -> None:
        """Count bytes that are not echoed."""

    def unacknowledged(self) -> int:
        """Return the number of bytes in the kernel that are not acknowledged."""

    def unread(self) -> bool:
        """Return whether the kernel has input for the session."""

    def lose(self) -> None:
        """Record that the client or the network ended the connection."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Record the end of the connection."""


class Linger(asyncio.Protocol):
    """The protocol of a transport after our FIN.

    It closes the connection when the client has closed its direction and nothing is unacknowledged. It also does so
    when the number of unacknowledged bytes does not fall for `linger_timeout`.

    Args:
        session: gets the counts and the end.
        transport: of the session.
        clock: measures `linger_timeout`.

    """

    __slots__ = ("_clock", "_expiry", "_least", "_poll_after", "_timer", "_transport", "session")

    def __init__(self, session: LingeringSession, transport: asyncio.Transport, clock: Clock) -> None:
        self.session = session
        self._transport = transport
        self._least = session.unacknowledged()
        self._clock = clock
        self._expiry = clock.time() + session.shutdown.linger_timeout
        self._poll_after = _FIRST_POLL
        self._schedule(self._poll_after)
        transport.set_protocol(self)
        if not session.eof:
            transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Discard input."""
        self.session.count_discarded(len(data))

    def eof_received(self) -> bool:
        """Close, unless our last bytes are still unacknowledged."""
        self.session.client_closed()
        self.session.attempt(self._close_if_acknowledged)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop polling and report the end."""
        self._timer.cancel()
        self.session.connection_lost(exc)

    def _schedule(self, seconds: float) -> None:
        self._clock.announce(seconds)
        self._timer = asyncio.get_running_loop().call_later(seconds, self.session.attempt, self._poll)

    def _close_if_acknowledged(self) -> None:
        if not self.session.unacknowledged():
            self._transport.close()

    def _poll(self) -> None:
        # In this order: the last acknowledgement may arrive between the two calls, and such a connection ended well.
        gone = self.session.eof and kernel.is_reset(self.session.sock)
        left = self.session.unacknowledged()
        now = self._clock.time()
        if left < self._least:
            self._least = left
            self._expiry = now + self.session.shutdown.linger_timeout
        if self.session.eof and not left:
            self._transport.close()
        elif gone:
            # After EOF the transport does not poll the socket, so it does not notice a reset.
            self.session.lose()
        elif now >= self._expiry and not (self._clock.late and self.session.unread()):
            self._transport.close()
        else:
            self._poll_after = min(2 * self._poll_after, _LAST_POLL)
            # With everything acknowledged, only the client's EOF is missing, and that is an event.
            delay = min(self._poll_after, self._expiry - now) if left else self._expiry - now
            self._schedule(max(delay, _FIRST_POLL))
