"""Share the loop's time fairly: answers take turns, and expensive results are shared."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from echod.admin.limits import AdminLimits


class Turns:
    """Give turns that are at least an interval apart.

    Args:
        interval: in seconds.

    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._next = 0.0

    def take(self, now: float) -> float:
        """Take the next free turn, and return the seconds until it comes."""
        turn = max(now, self._next)
        self._next = turn + self._interval
        return turn - now


class Shared:
    """Share a result that is expensive to make among all callers that wait for it.

    Args:
        make: makes the result.
        limits: how long to rest between two results.

    """

    def __init__(self, make: Callable[[], Awaitable[bytes]], limits: AdminLimits) -> None:
        self._make = make
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._making = asyncio.Lock()
        self._next: asyncio.Task[bytes] | None = None
        self._rest_until = 0.0

    async def get(self) -> bytes:
        """Return a result that is not begun before this call."""
        if self._next is None:
            self._next = self._loop.create_task(self._work())
        return await asyncio.shield(self._next)

    async def _work(self) -> bytes:
        async with self._making:
            await asyncio.sleep(max(0.0, self._rest_until - self._loop.time()))
            self._next = None  # from now on, a caller gets the next result
            began = self._loop.time()
            try:
                return await self._make()
            finally:
                ended = self._loop.time()
                self._rest_until = ended + min(self._limits.rest_factor * (ended - began), self._limits.longest_rest)
