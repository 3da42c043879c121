"""The signal that ends a measurement."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


class Interrupt:
    """Records the signal that ends the measurement."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def install(self) -> None:
        """Handle SIGINT and SIGTERM from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._record)

    def is_set(self) -> bool:
        """Tell whether a signal has arrived."""
        return self.signal is not None

    def _record(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
