"""The end of a server's clients: served on, then closed, then cut off, and all of them waited for."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, NamedTuple

from echod.clock import Clock
from echod.connection.state import Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from echod.server.client import Client

# How often a drain looks at its clients, as a share of `quiet_period`, within these bounds in seconds.
_TICKS = 4
_SHORTEST_TICK = 0.01
_LONGEST_TICK = 0.25


class DrainSettings(NamedTuple):
    """How long a stop may take, each in seconds."""

    delay: float
    """Still accepting, already not ready."""
    quiet_period: float
    """A client that has been silent this long, and has all its echo, counts as done."""
    drain_timeout: float
    """Then the rest is cut off."""
    linger_timeout: float
    """After the cut, for the clients to take what is on its way to them."""


class Drain:
    """Bring the clients of one server to their ends.

    Args:
        clients: those that are connected: a live view.
        accept_rest: take in who still waits in the backlog; returns whether nobody does any more.
        settings: the timeouts.

    """

    def __init__(self, clients: Collection[Client], accept_rest: Callable[[], bool], settings: DrainSettings) -> None:
        self._clients = clients
        self._accept_rest = accept_rest
        self._settings = settings
        self._clock = Clock(asyncio.get_running_loop().time)
        self._woken = asyncio.Event()
        self._emptied = False
        self._hurried = False
        self._silence: dict[Client, tuple[int, float]] = {}

    def client_left(self) -> None:
        """Be told that a client has left, and with it a descriptor."""
        if not (self._emptied and self._clients):
            self._woken.set()

    def hurry(self) -> None:
        """Reset all clients now, and let `run` come to its end."""
        self._hurried = True
        self._woken.set()

    async def run(self) -> bool:
        """Drain; return whether the backlog was emptied.

        Returns when every client has left or was told to; not waited for are the last steps of the clients' tasks,
        and what the kernel goes on sending after a close. It takes `drain_timeout` + `linger_timeout` at most, and the time
        for which the process was paused.
        """
        cut = self._clock.time() + self._settings.drain_timeout
        tick = min(max(self._settings.quiet_period / _TICKS, _SHORTEST_TICK), _LONGEST_TICK)
        next_look = 0.0
        self._emptied = not self._hurried and self._accept_rest()
        while not self._hurried and (now := self._clock.time()) < cut:
            self._emptied = self._emptied or self._accept_rest()
            if self._emptied and not self._clients:
                break
            if now >= next_look:
                self._dismiss_quiet(now)
                next_look = now + tick
            await self._wait_until(min(next_look, cut))
        if not self._hurried:
            for client in self._clients:
                client.session.attempt(client.session.close, "cut")
        end = cut + self._settings.linger_timeout
        while self._clients and not self._hurried and self._clock.time() < end:
            await self._wait_until(min(end, self._clock.time() + tick))
        for client in self._clients:
            if self._hurried:
                client.session.attempt(client.session.abort, "aborted")
            else:
                client.session.attempt(client.session.stop_lingering)
        return self._emptied

    def _dismiss_quiet(self, now: float) -> None:
        for client in self._clients:
            client.session.attempt(self._dismiss_if_quiet, client, now)

    def _dismiss_if_quiet(self, client: Client, now: float) -> None:
        session = client.session
        if session.phase > Phase.OPEN:
            return
        heard, since = self._silence.get(client, (-1, now))
        if session.bytes_seen != heard or session.paused or session.undelivered():
            self._silence[client] = (session.bytes_seen, now)
        elif now - since >= self._settings.quiet_period:
            # After a stall of this process, unread input proves that the client was not silent.
            if session.unread():
                self._silence[client] = (heard, now)
            else:
                session.close("quiet")

    async def _wait_until(self, when: float) -> None:
        seconds = max(0.0, when - self._clock.time())
        self._clock.announce(seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        self._woken.clear()
