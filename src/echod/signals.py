"""SIGTERM, SIGINT and SIGHUP, from the first moment of the process on."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Collects signals until there is a loop to act on them: those that stop the process, and SIGHUP.

    To be made before anything is imported that takes time: until then a signal kills the process.
    """

    def __init__(self) -> None:
        self._early: list[signal.Signals] = []
        self._hung_up = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        self._hangup_before = signal.signal(signal.SIGHUP, self._note_hangup)

    def is_stopping(self) -> bool:
        """Tell whether a signal that stops the process has come before there was a loop."""
        return bool(self._early)

    def _note(self, number: int, _: object) -> None:
        if self._early:  # the second one: stop at once; nothing is served yet
            os._exit(128 + number)
        self._early.append(signal.Signals(number))

    def _note_hangup(self, *_: object) -> None:
        self._hung_up = True

    def attach(self, loop: asyncio.AbstractEventLoop, stop: Callable[[int], None], reload: Callable[[], None]) -> None:
        """From now on call `stop` and `reload` in the loop for each signal; at once for one that has come already."""
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, stop, number)
        loop.add_signal_handler(signal.SIGHUP, reload)
        for number in self._early:
            loop.call_soon(stop, number)
        if self._hung_up:
            loop.call_soon(reload)

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take the signals back for the process's last moments: the log is still to be written."""
        self._early.clear()
        numbers = (*STOP_SIGNALS, signal.SIGHUP)
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, self._note_hangup if number == signal.SIGHUP else self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def ignore(self) -> None:
        """Take no more signals: all is done but for the interpreter's own end, which would restore the defaults."""
        for number in (*STOP_SIGNALS, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def release(self) -> None:
        """Let signals do what they do by default, those that came meanwhile too."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        signal.signal(signal.SIGHUP, self._hangup_before)
        for number in self._early:
            signal.raise_signal(number)
        if self._hung_up:
            signal.raise_signal(signal.SIGHUP)
