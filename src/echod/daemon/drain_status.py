"""The status line on the terminal during a drain."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from echod.daemon.console import again
from echod.text import count

if TYPE_CHECKING:
    from collections.abc import Callable

    from echod.daemon.logs import Log

# Seconds between two status lines.
_INTERVAL = 0.5


class DrainStatus:
    """Show the clients that are left, and the longest time until they are closed, if there is a terminal.

    Args:
        log: of the process.
        clients: returns the number of clients.
        signal_name: of the signal that caused the stop, or None.

    """

    def __init__(self, log: Log, clients: Callable[[], int], signal_name: str | None) -> None:
        self._log = log
        self._clients = clients
        self._again = again(signal_name)

    def show(self, seconds: float) -> None:
        """Show the status from now on, in the running loop. `seconds` is the longest time that is left."""
        clients = count(self._clients(), "client")
        self._log.show_status(f"{clients} left, at most {math.ceil(seconds)} s; {self._again} stops at once")
        self._timer: asyncio.TimerHandle = asyncio.get_running_loop().call_later(
            _INTERVAL, self.show, max(0.0, seconds - _INTERVAL)
        )

    def clear(self) -> None:
        """Remove the status."""
        self._timer.cancel()
        self._log.show_status("")
