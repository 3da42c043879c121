"""The sweep: one timer that closes overdue clients, instead of work per message."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from echod.clock import Clock
from echod.connection.state import Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from echod.server.client import Client
    from echod.settings.model import LimitsSettings

# Bounds of the time between two sweeps, seconds.
_LONGEST_SWEEP = 1.0
_SHORTEST_SWEEP = 0.01


class Sweep:
    """Close idle clients and those with an overdue handshake; reset stalled ones.

    Args:
        clients: the connected clients: a live view.
        limits: the timeouts.
        source: returns the time in seconds.

    """

    def __init__(
        self,
        clients: Collection[Client],
        limits: LimitsSettings,
        source: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clients = clients
        self._limits = limits
        self._clock = Clock(source)

    def reconfigure(self, limits: LimitsSettings) -> None:
        """Apply other timeouts from the next sweep on."""
        self._limits = limits

    async def run(self) -> None:
        """Sweep until cancelled, at least four times per timeout."""
        while True:
            limits = self._limits
            timeouts = (limits.idle_timeout, limits.write_timeout, limits.handshake_timeout)
            pause = min(_LONGEST_SWEEP, *(timeout / 4 for timeout in timeouts if timeout))
            pause = max(_SHORTEST_SWEEP, pause)
            self._clock.announce(pause)
            await asyncio.sleep(pause)
            self.sweep()

    def sweep(self) -> None:
        """Close or reset each client that is overdue now."""
        now, limits = self._clock.time(), self._limits
        clients = self._clients
        if not limits.idle_timeout:
            # No other client can be overdue. With ten thousand clients, each check counts.
            clients = [one for one in clients if one.session.paused or one.session.phase < Phase.OPEN]
        for client in clients:
            client.session.attempt(_close_if_overdue, client, now, limits)


def _close_if_overdue(client: Client, now: float, limits: LimitsSettings) -> None:
    reason = client.overdue(now, limits)
    if reason == "stalled":
        client.session.abort(reason)
    elif reason is not None:
        client.session.close(reason)
