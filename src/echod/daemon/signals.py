"""Handle the signals that stop and reload the daemon, from the start of the process to its end."""

from __future__ import annotations

import errno
import os
import signal

TYPE_CHECKING = False  # importing the constant from typing would cost time

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
HANDLED = (*STOP_SIGNALS, signal.SIGHUP)

_LOOK_EVERY = 1.0

# Looks after the terminal was closed until a SIGHUP has another cause. Shells and the kernel send it at once.
_LOOKS = 5


class Signals:
    """Record signals, and pass them on once there is a loop to act on them.

    Create this before any import that takes time: until then, each of these signals ends the process.

    The record is the only thing that a handler writes. The loop reads it whenever the wake-up pipe is readable. A full pipe is
    readable too, so a burst of signals cannot hide one of them. The loop also reads it once a second.

    SIGHUP is a request to reload, unless the controlling terminal has been closed: then it is a stop.
    """

    def __init__(self) -> None:
        self._stops: list[signal.Signals] = []
        self._hung_up = False
        self._attached = False
        self._looks_without_terminal = 0
        self._has_terminal = False
        self._before = {number: signal.signal(number, self._note_stop) for number in STOP_SIGNALS}
        self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._note_hangup)
        # The parent may have blocked these signals. A child inherits the mask, and blocked signals are not delivered.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        # Whether closing the terminal sends a SIGHUP that is a stop. nohup(1) leaves that signal ignored.
        self._has_terminal = self._before[signal.SIGHUP] is not signal.SIG_IGN and _is_terminal_open() is True

    def is_stopping(self) -> bool:
        """Tell whether a signal that stops the process has arrived."""
        return bool(self._stops)

    @property
    def exit_code(self) -> int:
        """Exit code of a stop before any listener was opened."""
        return 128 + signal.SIGQUIT if signal.SIGQUIT in self._stops else 0

    def _note_stop(self, number: int, _: object) -> None:
        if self._stops and not self._attached:  # a second signal, before the loop is attached or after it is detached
            os._exit(128 + number)
        self._stops.append(signal.Signals(number))

    def _note_hangup(self, *_: object) -> None:
        if self._has_terminal and _is_terminal_open() is False:
            self._has_terminal = False  # the shell and the kernel may each send a SIGHUP, which is one stop
            self._stops.append(signal.SIGHUP)
        else:
            self._hung_up = True

    def attach(self, loop: asyncio.AbstractEventLoop, stop: Callable[[int], None], reload: Callable[[], None]) -> None:
        """Call `stop` and `reload` in the running loop for each signal, including those already recorded."""
        self._stop, self._reload = stop, reload
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        loop.add_reader(self._reader, self._wake)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._attached = True
        self._timer: asyncio.Handle = loop.call_soon(self._look, loop)

    def _wake(self) -> None:
        try:  # noqa: SIM105  (importing contextlib would delay the handlers)
            os.read(self._reader, 4096)
        except OSError:  # the byte only wakes the loop; the record has the signal
            pass
        self._act()

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Act on signals once a second. The kernel may have had no memory to write a byte to the pipe."""
        self._timer = loop.call_later(_LOOK_EVERY, self._look, loop)
        if self._has_terminal and _is_terminal_open() is False:
            # A process in the background may get no SIGHUP when its terminal closes. Then a later one is a request.
            self._looks_without_terminal += 1
            self._has_terminal = self._looks_without_terminal < _LOOKS
        self._act()

    def _act(self) -> None:
        # A handler may run between any two of these lines.
        while self._stops:
            self._stop(self._stops.pop(0))
        if self._hung_up:
            self._hung_up = False
            self._reload()

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Stop acting on signals. While the log is written, a second stop signal ends the process."""
        self._attached = False
        self._stops.clear()
        self._timer.cancel()
        signal.set_wakeup_fd(self._wakeup_before)
        loop.remove_reader(self._reader)
        os.close(self._reader)
        os.close(self._writer)

    def ignore(self) -> None:
        """Ignore signals from now on. Otherwise the interpreter restores the defaults while it exits."""
        for number in HANDLED:
            signal.signal(number, signal.SIG_IGN)

    def release(self) -> None:
        """Restore the default actions, and raise again each signal that has been recorded."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # A shell ignores SIGINT for background commands. `probe` and `check` must still end on it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stop in self._stops:
            signal.raise_signal(stop)
        if self._hung_up:
            signal.raise_signal(signal.SIGHUP)


def _is_terminal_open() -> bool | None:
    """Tell whether the process has a controlling terminal that is open. Return None if that is unknown."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        # ENXIO: no controlling terminal, or it was closed (tty(4)). EIO: it is being closed.
        return False if error.errno in {errno.ENXIO, errno.EIO} else None
    return True
