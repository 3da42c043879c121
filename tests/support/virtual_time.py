"""An event loop with a clock that jumps to the next timer, so that tests need not wait."""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


class VirtualLoop(asyncio.SelectorEventLoop):
    """Run on a virtual clock, which starts at 0. A wait takes no real time, and the clock advances by exactly its length.

    Use it for one thread only: the loop does not wait for peers outside it.
    """

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_NonBlockingSelector(self._advance))

    def time(self) -> float:
        return self._now

    def _advance(self, seconds: float) -> None:
        self._now += seconds


class _NonBlockingSelector(selectors.SelectSelector):
    def __init__(self, advance: Callable[[float], None]) -> None:
        super().__init__()
        self._advance = advance

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        assert events or timeout is not None, "the loop waits for an event that cannot come"
        if not events and timeout is not None and timeout > 0:
            self._advance(timeout)
        return events


def run_virtually(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main)
