"""SIGTERM and SIGINT, from the first moment of the process on."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Collects stop signals until there is a loop to act on them.

    To be made before anything is imported that takes time: until then a signal kills the process.
    """

    def __init__(self) -> None:
        self._early: list[signal.Signals] = []
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        if self._early:  # the second one: stop at once; nothing is served yet
            os._exit(128 + number)
        self._early.append(signal.Signals(number))

    def attach(self, loop: asyncio.AbstractEventLoop, act: Callable[[int], None]) -> None:
        """From now on call `act` in the loop for each signal; at once for one that has come already."""
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, act, number)
        for number in self._early:
            loop.call_soon(act, number)

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take the signals back for the process's last moments: the log is still to be written."""
        self._early.clear()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def ignore(self) -> None:
        """Take no more signals: all is done but for the interpreter's own end, which would restore the defaults."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def release(self) -> None:
        """Let signals do what they do by default, those that came meanwhile too."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        for number in self._early:
            signal.raise_signal(number)
