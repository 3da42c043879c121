"""The drain: clients are served on, then closed, then cut off."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from echod.clock import Clock
from echod.connection.state import Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from echod.server.client import Client
    from echod.settings.model import ShutdownSettings

# A drain checks its clients this many times per `quiet_period`, within these bounds in seconds.
_TICKS = 4
_SHORTEST_TICK = 0.01
_LONGEST_TICK = 0.25


class Drain:
    """The stop of one server: end its clients gracefully, or at once after `abort`.

    Args:
        clients: the connected clients: a live view.
        accept_rest: accepts all pending connections; returns True once the backlog is empty.
        source: returns the time in seconds.

    """

    def __init__(
        self,
        clients: Collection[Client],
        accept_rest: Callable[[], bool],
        source: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clients = clients
        self._accept_rest = accept_rest
        self._clock = Clock(source)
        self._woken = asyncio.Event()
        self._emptied = False
        self._aborted = False
        self._silence: dict[Client, tuple[int, float]] = {}

    def client_left(self) -> None:
        """Check again if a client's departure can matter: it was the last one, or has freed a descriptor."""
        if not (self._emptied and self._clients):
            self._woken.set()

    def abort(self) -> None:
        """Reset all clients now, or as soon as `run` begins. Idempotent."""
        self._aborted = True
        self._woken.set()

    async def delay(self, seconds: float) -> None:
        """Wait before the drain, unless it is aborted."""
        end = self._clock.time() + seconds
        while not self._aborted and self._clock.time() < end:
            await self._wait_until(end)

    async def run(self, shutdown: ShutdownSettings) -> bool:
        """Drain; return whether the backlog was emptied.

        Return when every client has left or has been closed for good. The last steps of the clients' tasks may follow,
        and the kernel may still send data after a close. This takes at most `drain_timeout` + `linger_timeout`, plus the pauses
        of the process.
        """
        cut = self._clock.time() + shutdown.drain_timeout
        tick = min(max(shutdown.quiet_period / _TICKS, _SHORTEST_TICK), _LONGEST_TICK)
        next_check = 0.0
        self._emptied = not self._aborted and self._accept_rest()
        while not self._aborted and (now := self._clock.time()) < cut:
            self._emptied = self._emptied or self._accept_rest()
            if self._emptied and not self._clients:
                break
            if now >= next_check:
                self.close_quiet(now, shutdown.quiet_period)
                next_check = now + tick
            await self._wait_until(min(next_check, cut))
        await self._catch_up()
        if not self._aborted:
            for client in self._clients:
                client.session.attempt(client.session.close, "cut")
        end = cut + shutdown.linger_timeout
        while self._clients and not self._aborted and self._clock.time() < end:
            await self._wait_until(min(end, self._clock.time() + tick))
        await self._catch_up()
        for client in self._clients:
            if self._aborted:
                client.session.attempt(client.session.abort, "aborted")
            else:
                client.session.attempt(client.session.stop_lingering)
        return self._emptied

    async def _catch_up(self) -> None:
        """Give the loop one turn after a pause of this process: clients may have sent data, or read, in the meantime."""
        if self._clients and not self._aborted and self._clock.late:
            await self._wait_until(self._clock.time())

    def close_quiet(self, now: float, quiet_period: float) -> None:
        """Close each client that has been silent for `quiet_period` and has all its echo."""
        for client in self._clients:
            client.session.attempt(self._close_if_quiet, client, now, quiet_period)

    def _close_if_quiet(self, client: Client, now: float, quiet_period: float) -> None:
        session = client.session
        if session.phase > Phase.OPEN:
            return
        bytes_seen, since = self._silence.get(client, (-1, now))
        if session.bytes_seen != bytes_seen or session.paused or session.undelivered():
            self._silence[client] = (session.bytes_seen, now)
        elif now - since >= quiet_period:
            # After a pause of this process, unread input proves that the client was not silent.
            if session.unread():
                self._silence[client] = (bytes_seen, now)
            else:
                session.close("quiet")

    async def _wait_until(self, when: float) -> None:
        seconds = max(0.0, when - self._clock.time())
        self._clock.announce(seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        self._woken.clear()
