"""Type the commands of a page into terminals, and compare the output with the page.

A page has one daemon at a time. A `console` block with a command that starts a daemon belongs to the daemon's terminal, and
so does a block without a command, which shows further lines. `^C` is typed. Other commands run one after another in
other terminals. After `nc`, lines are typed and echoed in turns. A last line `^C` ends it; otherwise it stays connected.

The commands of echod in an `sh` block run against a separate daemon with default settings, and have to succeed.
A block of another kind is a file if its first line names one in a comment. The daemon gets free ports instead of those on the page.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING

from harness import PATIENCE, Daemon, clean_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# A longer line would continue on the next one, at a word that depends on the figures before it.
COLUMNS = 200
BLOCK = re.compile(r"^```(console|sh|toml|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# (\S+\.(?:toml|py))\n")
STARTED = re.compile(r"echod(?! (?:probe|check|config)\b)(.*)")
ADDRESS = re.compile(r"127\.0\.0\.1:\d+")

# Parts of the output that differ in each run, and their replacements.
VARYING = (
    (re.compile(r"\d{4}-\d\d-\d\d UTC[+-]\d{4}"), "DATE"),
    (re.compile(r"\d\d:\d\d:\d\d\.\d{3}"), "TIME"),
    (re.compile(r"[\d.,]+ ?(?:µs|ms|s)\b"), "DURATION"),
    (re.compile(r"pid \d+"), "pid N"),
    (re.compile(r" +\[100%\]"), " [100%]"),  # at the right margin
    (re.compile(r"Python [\d.]+"), "Python VERSION"),
    (ADDRESS, "ADDRESS"),
)


def same(line: str) -> str:
    """Return a line without the parts that differ in each run."""
    for pattern, replacement in VARYING:
        line = pattern.sub(replacement, line)
    return line.rstrip()


class Terminal:
    """A command in a terminal of its own, with its output as lines.

    Args:
        command: the command line.
        folder: the working directory.

    """

    def __init__(self, command: str, folder: Path) -> None:
        environment = {
            name: value
            for name, value in clean_environment().items()
            if not name.startswith(("COVERAGE_", "PYTEST_")) and name not in {"NO_COLOR", "FORCE_COLOR"}
        }
        environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TERM": "xterm"}
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, COLUMNS, 0, 0))
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", f"exec {command}"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  (it calls the kernel only)
        )
        os.close(slave)
        self._output = b""
        self._read = 0

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def lines(self, count: int) -> list[str]:
        """Return the next lines, once there are as many as wanted."""
        self._wait(lambda: self._screen().count("\n") >= self._read + count)
        found = self._screen().split("\n")[self._read : self._read + count]
        self._read += count
        return found

    def rest(self) -> list[str]:
        """Wait until the command has ended, and return the remaining lines."""
        self._wait(lambda: False)
        self._process.wait(PATIENCE)
        return self._screen().split("\n")[self._read : -1]

    @property
    def code(self) -> int | None:
        """Return the exit code of a command that has ended."""
        return self._process.returncode

    def end(self) -> None:
        """Kill the command if it still runs, and close the terminal."""
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def _screen(self) -> str:
        """Return the output without colours, and without text that has been overwritten or erased."""
        text = re.sub(r"\x1b\[[\d;]*m", "", self._output.decode(errors="replace").replace("\r\n", "\n"))
        return re.sub(r"[^\n]*(?:\r|\x1b\[K)(?!\n)", "", text).replace("\x1b[K", "")

    def _wait(self, done: Callable[[], bool]) -> None:
        """Read until a condition holds or the command has closed the terminal."""
        deadline = time.monotonic() + PATIENCE
        while not done():
            readable, _, _ = select.select([self._master], [], [], deadline - time.monotonic())
            assert readable, f"the terminal shows only:\n{self._screen()}"
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:  # EIO: no process has the terminal open
                data = b""
            if not data:
                return
            self._output += data


class Walkthrough:
    """A reader that types the commands of one page.

    Args:
        folder: the working directory.

    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemon: Terminal | None = None
        self._clients: list[Terminal] = []
        self._ports: dict[str, str] = {}
        self.commands: list[str] = []

    def follow(self, page: str) -> None:
        """Type all commands of a page, and compare the output."""
        try:
            for kind, block in BLOCK.findall(page):
                if kind == "console":
                    self._console(block.splitlines())
                elif kind == "sh":
                    self._succeed(line for line in block.splitlines() if line.startswith("echod "))
                elif named := FILE.match(block):
                    (self._folder / named[1]).write_text(ADDRESS.sub("127.0.0.1:0", block))
        finally:
            for terminal in [*self._clients, *([self._daemon] if self._daemon else [])]:
                terminal.end()

    def _console(self, lines: list[str]) -> None:
        if not lines[0].startswith("$ "):
            self._continue(lines)
            return
        for command, output in _sessions(lines):
            self.commands.append(command)
            if started := STARTED.fullmatch(command):
                self._start(started[1], output)
            else:
                self._run(command, output)

    def _succeed(self, commands: Iterable[str]) -> None:
        for command in commands:
            self.commands.append(command)
            with Daemon() as daemon:
                typed = command.replace("127.0.0.1:8000", "{}:{}".format(*daemon.address))
                terminal = Terminal(typed, self._folder)
                self._clients.append(terminal)
                output = terminal.rest()
                assert terminal.code == 0, output

    def _start(self, arguments: str, output: list[str]) -> None:
        assert self._daemon is None, "there is a daemon already"
        listen = "" if "--config" in arguments else " --listen 127.0.0.1:0"
        self._daemon = Terminal(f"echod{ADDRESS.sub('127.0.0.1:0', arguments)}{listen}", self._folder)
        found = self._daemon.lines(len(output))
        _compare(found, output)
        written, real = (ADDRESS.findall("\n".join(text)) for text in (output, found))
        self._ports = dict(zip(written, real, strict=True))

    def _continue(self, lines: list[str]) -> None:
        assert self._daemon, "there is no daemon"
        stop = lines.index("^C") if "^C" in lines else len(lines)
        _compare(self._daemon.lines(stop), lines[:stop])
        if stop < len(lines):
            self._daemon.type("\x03")
            found = [line.removeprefix("^C") for line in self._daemon.rest()]
            _compare([line for line in found if line], lines[stop + 1 :])
            self._daemon.end()
            self._daemon = None

    def _run(self, command: str, output: list[str]) -> None:
        for written, real in self._ports.items():
            command = command.replace(written, real).replace(written.replace(":", " "), real.replace(":", " "))
        terminal = Terminal(command, self._folder)
        self._clients.append(terminal)
        if shlex.split(command)[0] != "nc":
            _compare(terminal.rest(), output)
            return
        for typed in output[: len(output) // 2 * 2 : 2]:
            terminal.type(f"{typed}\n")
            _compare(terminal.lines(2), [typed, typed])
        if output[-1] == "^C":
            terminal.type("\x03")
            terminal.rest()


def _sessions(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a block with its output."""
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield lines[start].removeprefix("$ "), lines[start + 1 : end]


def _compare(found: list[str], written: list[str]) -> None:
    assert [same(line) for line in found] == [same(line) for line in written], "\n".join(
        ["the terminal shows:", *found]
    )
