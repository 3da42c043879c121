"""Notify the service manager from the event loop, as in sd_notify(3) and sd_watchdog_enabled(3)."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

from echod.text import count, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from structlog.typing import FilteringBoundLogger

_STDERR = 2

# Seconds between messages. A third of the watchdog timeout applies instead if it is shorter.
_SERVING_INTERVAL = 10.0
_DRAINING_INTERVAL = 1.0
_FULL_INTERVAL = 0.1

# Each message during a drain extends the stop timeout by this much. It is many intervals long, so that a busy machine
# does not cause a kill.
_EXTENSION_USEC = 30_000_000

# systemd ignores messages of more than 4096 bytes, and a character takes at most four bytes.
_LONGEST_VALUE = 900

# The most digits of a number of 64 bits, which the time of the watchdog is.
_LONGEST_INTERVAL = 20


class Manager(NamedTuple):
    """The service manager of this process."""

    address: str
    """Its datagram socket: a path, or "@" and a name in the abstract namespace."""
    watchdog: float | None
    """Seconds without a message after which it kills the process, or None for no limit."""


def find_manager(warn: Callable[..., object]) -> Manager | None:
    """Read the manager from NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID.

    The variables are removed from the environment, because they apply to this process only.

    Args:
        warn: logs a warning if WATCHDOG_USEC is invalid.

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
    """Render a message with one line per field. Long values are truncated."""
    return "".join(f"{name}={printable(str(value))[:_LONGEST_VALUE]}\n" for name, value in fields.items()).encode()


class Notifier:
    """Send the process's phase, status and watchdog messages to the service manager.

    One timer sends a message every ten seconds, or every second during a drain. A watchdog shortens this to a third of
    its timeout. If the socket is full, the message is dropped, and its phase is sent with the next one. Without a
    manager, nothing is sent.

    Args:
        manager: the service manager to notify.
        numbers: returns the figures for the status, in a few words.
        logger: returns the current logger, for a warning if the manager cannot be reached.
        is_healthy: while it returns False, the watchdog gets no message.

    """

    def __init__(
        self,
        manager: Manager | None,
        numbers: Callable[[], str],
        logger: Callable[[], FilteringBoundLogger],
        is_healthy: Callable[[], bool] = lambda: True,
    ) -> None:
        self._is_healthy = is_healthy
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
                # The watchdog sends SIGABRT; the journal then shows where the loop was stuck.
                faulthandler.enable(_STDERR)

    def ready(self) -> None:
        """Report that all listeners are listening."""
        self._phase = "Serving"
        self._tell(READY=1)

    def reloading(self) -> None:
        """Report that the settings are being reloaded."""
        self._phase = "Reloading"
        self._tell(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)

    def reloaded(self, problems: Sequence[str]) -> None:
        """Report the end of a reload. If it had problems, the previous settings stay in force."""
        self._phase = "Serving"
        self._note = "; settings reloaded"
        if problems:
            self._note = f"; settings not reloaded, {count(len(problems), 'problem')}: {problems[0]}"
        self._tell(READY=1)

    def stopping(self) -> None:
        """Report that the drain has begun."""
        self._phase, self._note = "Draining", ""
        self._draining = True
        self._tell(STOPPING=1)

    def drained(self, receipt: Mapping[str, object]) -> None:
        """Send the receipt as the final status, and stop notifying."""
        self._receipt = "Drained: " + " ".join(f"{name}={value}" for name, value in receipt.items())
        self._tell()
        if self._timer is not None:
            self._timer.cancel()
            self._socket.close()

    def _tell(self, **phase: int) -> None:
        """Send a message, with the new phase if there is one, and schedule the next."""
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
            if self._is_healthy():
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
        """Send a message. Return False only if the socket is full."""
        name = os.fsencode(address)
        try:
            self._socket.sendto(data, b"\0" + name[1:] if address.startswith("@") else name)
        except BlockingIOError:  # the socket's queue is full
            return False
        except OSError as error:
            if not self._unreachable:
                self._unreachable = True
                self._logger().warning("notify_failed", NOTIFY_SOCKET=address, error=error.strerror or str(error))
        else:
            self._unreachable = False
        return True
