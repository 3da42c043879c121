"""Run the command on a pseudo terminal that is its controlling terminal, as a terminal window does."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from harness import PATIENCE, clean_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

COLUMNS = 120


def noon() -> str:
    """Return a time zone in which it is between 12:00 and 13:00, so that the date does not change during a test."""
    return f"NOON{datetime.now(UTC).hour - 12}"


class Terminal:
    """A running command on a terminal of its own, which it has as standard input, output and error.

    Args:
        arguments: arguments of the command.
        command: the command, by default `echod`.
        columns: the width of the terminal.
        env: extra environment variables.
        prepare: called in the child process before it executes the interpreter.
        streams: standard streams that are not the terminal, as arguments of Popen.

    """

    def __init__(
        self,
        *arguments: str,
        command: Sequence[str] = (sys.executable, "-m", "echod"),
        columns: int = COLUMNS,
        env: Mapping[str, str] | None = None,
        prepare: Callable[[], object] = int,
        **streams: Any,
    ) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

        def take_terminal() -> None:
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell without job control ignores it in the background
            prepare()

        self.process = subprocess.Popen(
            [*command, *arguments],
            env=clean_environment({"TERM": "xterm", "TZ": noon(), **(env or {})}),
            start_new_session=True,
            preexec_fn=take_terminal,  # noqa: PLW1509  (no thread of a test holds a lock that the child needs)
            **{"stdin": slave, "stdout": slave, "stderr": slave, **streams},
        )
        os.close(slave)
        self.output = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.close()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until the command has written a text that matches a regular expression."""
        deadline = time.monotonic() + PATIENCE
        while (match := re.search(pattern, self.output)) is None:
            assert self._read(deadline), f"no {pattern!r} on the terminal:\n{self.output}"
        return match

    def wait(self) -> int:
        """Wait until the command has exited, and return its exit code."""
        deadline = time.monotonic() + PATIENCE
        while self._read(deadline):
            pass
        return self.process.wait(PATIENCE)

    def type(self, text: str) -> None:
        """Send keys to the command."""
        os.write(self._master, text.encode())

    def close(self) -> None:
        """Close the terminal, as closing its window does. Idempotent."""
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def screen(self) -> list[str]:
        """Return the lines that the terminal shows: without colours, and without text that was cleared."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.output).replace("\r\n", "\n")
        return [line.rpartition("\r\x1b[K")[2] for line in text.split("\n")]

    def _read(self, deadline: float) -> bool:
        """Read what the command has written. Return False at its end, or after the deadline."""
        if self._master < 0 or not select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            self.output += os.read(self._master, 65536).decode(errors="replace")
        except OSError:  # EIO: no process has the terminal open
            return False
        return True
