"""What the service manager hears of this process: sd_notify(3), fed by the loop itself, and sd_watchdog_enabled(3)."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

from echod.logs import STDERR
from echod.render import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from structlog.typing import FilteringBoundLogger

# Seconds between two messages; a third of the watchdog's time, where that is shorter.
_SERVING_INTERVAL = 10.0
_DRAINING_INTERVAL = 1.0
_FULL_INTERVAL = 0.1

# The stop may take this much longer from each message on, where TimeoutStopSec= is over: many intervals, since a machine
# that has much to do is no reason to be killed.
_EXTENSION_USEC = 30_000_000

# systemd ignores a message of more than 4096 bytes, and a character has four at most.
_LONGEST_VALUE = 900

# The most digits of a number of 64 bits, which the time of the watchdog is.
_LONGEST_INTERVAL = 20


class Manager(NamedTuple):
    """Who is to be told."""

    address: str
    """A datagram socket: a path, or "@" and a name in the abstract namespace."""
    watchdog: float | None
    """Seconds without a message after which the process is killed; None: never."""


def find_manager(warn: Callable[..., object]) -> Manager | None:
    """Take the manager from the environment: from NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID.

    The variables are removed, since they are meant for this process alone.

    Args:
        warn: logs a warning, about a time of the watchdog that is none.

    """
    address, interval, pid = (os.environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"))
    if not address:
        return None
    watchdog = None
    if interval and pid in {"", str(os.getpid())}:
        if interval.isascii() and interval.isdecimal() and len(interval) <= _LONGEST_INTERVAL and int(interval):
            watchdog = int(interval) / 1e6
        else:
            warn("watchdog_unusable", WATCHDOG_USEC=interval, expected="microseconds, more than 0")
    return Manager(address, watchdog)


def message(fields: Mapping[str, object]) -> bytes:
    """Render a message: a line for each field, its value cut short where it is very long."""
    return "".join(f"{name}={printable(str(value))[:_LONGEST_VALUE]}\n" for name, value in fields.items()).encode()


def count(number: int, noun: str) -> str:
    """Return a number of things in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Notifier:
    """Tells the manager of the process's phases, its numbers, and that its loop turns.

    One timer does it all, at ten seconds or a third of the watchdog's time, and at a second during a drain. A message
    that the socket does not take is dropped; the phase in it goes out with the next one. Without a manager nothing
    happens at all.

    Args:
        manager: who is to be told.
        numbers: renders what is going on, in a few words.
        logger: returns the one in force, which is told of a manager that cannot be reached.

    """

    def __init__(
        self, manager: Manager | None, numbers: Callable[[], str], logger: Callable[[], FilteringBoundLogger]
    ) -> None:
        self._manager = manager
        self._numbers = numbers
        self._logger = logger
        self._phase = "Starting"
        self._note = ""
        self._receipt = ""
        self._owed: dict[str, int] = {}
        self._draining = False
        self._unreachable = False
        self._timer: asyncio.TimerHandle | None = None
        if manager is not None:
            self._loop = asyncio.get_running_loop()
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)  # noqa: FBT003  (its only parameter)
            if manager.watchdog is not None:
                # Its SIGABRT then leaves in the journal where the loop was stuck.
                faulthandler.enable(STDERR)

    def ready(self) -> None:
        """Every listener listens."""
        self._phase = "Serving"
        self._tell(READY=1)

    def reloading(self) -> None:
        """Settings are being read again."""
        self._phase = "Reloading"
        self._tell(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)

    def reloaded(self, problems: Sequence[str]) -> None:
        """They are in force, or those before are still, because of some problems."""
        self._phase = "Serving"
        self._note = "; settings reloaded"
        if problems:
            self._note = f"; settings not reloaded, {count(len(problems), 'problem')}: {problems[0]}"
        self._tell(READY=1)

    def stopping(self) -> None:
        """The first signal to stop has come."""
        self._phase, self._note = "Draining", ""
        self._draining = True
        self._tell(STOPPING=1)

    def drained(self, receipt: Mapping[str, object]) -> None:
        """Say the last word: what became of the clients."""
        self._receipt = "Drained: " + " ".join(f"{name}={value}" for name, value in receipt.items())
        self._tell()
        if self._timer is not None:
            self._timer.cancel()
            self._socket.close()

    def _tell(self, **phase: int) -> None:
        """Send a message of a new phase, or of none, and see to the next."""
        manager = self._manager
        if manager is None:
            return
        self._owed = phase or self._owed
        fields: dict[str, object] = dict(self._owed)
        fields["STATUS"] = self._receipt or f"{self._phase}: {self._numbers()}{self._note}"
        if self._draining:
            fields["EXTEND_TIMEOUT_USEC"] = _EXTENSION_USEC
        interval = _DRAINING_INTERVAL if self._draining else _SERVING_INTERVAL
        if manager.watchdog is not None:
            fields["WATCHDOG"] = 1
            interval = min(interval, manager.watchdog / 3)
        if self._send(message(fields), manager.address):
            self._owed = {}
        else:
            interval = min(interval, _FULL_INTERVAL)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(interval, self._tell)

    def _send(self, data: bytes, address: str) -> bool:
        """Send, and return whether it was taken; True too where nobody is there to take it."""
        name = os.fsencode(address)
        try:
            self._socket.sendto(data, b"\0" + name[1:] if address.startswith("@") else name)
        except BlockingIOError:  # its queue is full
            return False
        except OSError as error:
            if not self._unreachable:
                self._unreachable = True
                self._logger().warning("notify_failed", NOTIFY_SOCKET=address, error=error.strerror or str(error))
        else:
            self._unreachable = False
        return True
