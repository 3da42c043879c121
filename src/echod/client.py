"""One client's life, from accepted to closed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from echod import kernel

if TYPE_CHECKING:
    from echod.session import EchoSession, Reason


class Client:
    """An accepted connection: its session, whence it came, and when it was last seen to move.

    `run` is the body of the client's task. The bytes go past it, through the session; the task only waits for their
    end. That makes the task the one place where a failure of this client comes out.
    """

    __slots__ = ("_left", "_received", "_since", "opened", "peer", "session")

    def __init__(self, session: EchoSession, peer: str, opened: float) -> None:
        self.session = session
        self.peer = peer
        self.opened = opened
        self._since = opened
        self._received = 0
        self._left = 0

    async def run(self) -> None:
        """Serve the client until its connection is closed.

        Raises:
            Exception: whatever failed in the session, save what the network did.

        """
        session = self.session
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(session, session.sock)
        except OSError as error:  # reset before its turn came, where the kernel tells so here
            session.connection_lost(error)
            session.sock.close()
        await session.ended

    def overdue(self, now: float, idle_timeout: float, write_timeout: float) -> Reason | None:
        """Tell why this client has to be closed at the time `now`, if it has to.

        To be asked once each sweep, which is what the timeouts are exact to. What has moved is derived from counters
        here, so that a message costs nothing for it.

        Args:
            now: the loop's time.
            idle_timeout: seconds without a byte either way; 0: for ever.
            write_timeout: seconds in which a client, while it holds up its own reading, takes nothing.

        """
        session = self.session
        if session.received != self._received:
            self._received = session.received
            self._since = now
            self._left = 0
            return None
        silent = now - self._since
        if session.paused:
            reason: Reason = "stalled"
            late = silent >= write_timeout
        elif session.reason is None and idle_timeout and silent >= idle_timeout:
            reason = "idle"
            late = True
        else:
            return None
        # Linux reports a socket as writable in large steps, so the write buffer alone would call a slow reader
        # stalled. The first look at what is left only takes the measure.
        left = session.undelivered()
        if reason == "idle" and kernel.unread(session.sock):
            return None  # it is this process that has been silent
        fell = left < self._left
        unknown = left and not self._left
        self._left = left
        if fell:
            self._since = now
        return reason if late and not fell and not unknown else None
