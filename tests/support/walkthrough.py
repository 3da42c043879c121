"""Type the commands of a page into terminals, and compare the output with the page.

A page has one daemon at a time. A `console` block with a command that starts a daemon belongs to the daemon's terminal, and
so does a block without a command, which shows further lines. `^C` is typed. Other commands run one after another in
other terminals. After `nc`, lines are typed and echoed in turns. A last line `^C` ends it; otherwise it stays connected.

The commands of echod in an `sh` block run against a separate daemon with default settings, and have to succeed.
A block of another kind is a file if its first line names one in a comment. The daemon gets free ports instead of those on the page.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import TYPE_CHECKING

from harness import Daemon
from terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

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
    (re.compile(r"(?:under )?[\d.,]+ ?(?:µs|ms|s)\b"), "DURATION"),
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


def terminal(command: str, folder: Path) -> Terminal:
    """Run a command line in a terminal."""
    return Terminal(command=("/bin/sh", "-c", f"exec {command}"), columns=COLUMNS, cwd=folder)


class Screen:
    """The lines of a terminal, read one after another."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self._count = 0

    def lines(self, count: int) -> list[str]:
        """Return the next lines, once there are as many as wanted."""
        start, self._count = self._count, self._count + count
        self.terminal.wait_for(rf"(?:[^\n]*\n){{{self._count}}}")
        return self.terminal.screen()[start : self._count]

    def rest(self) -> list[str]:
        """Wait until the command has ended, and return the remaining lines."""
        self.terminal.wait()
        return self.terminal.screen()[self._count : -1]


class Walkthrough:
    """A reader of one page that types its commands.

    Args:
        folder: the working directory.

    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemon: Screen | None = None
        self._ports: dict[str, str] = {}
        self._open = ExitStack()
        self.commands: list[str] = []

    def follow(self, page: str) -> None:
        """Type all commands of a page, and compare the output."""
        with self._open:
            for kind, block in BLOCK.findall(page):
                lines = block.splitlines()
                if kind == "sh":
                    self._succeed(line for line in lines if line.startswith("echod "))
                elif kind == "console":
                    self._console(lines)
                elif named := FILE.match(block):
                    (self._folder / named[1]).write_text(ADDRESS.sub("127.0.0.1:0", block))

    def _run(self, command: str) -> Screen:
        return Screen(self._open.enter_context(terminal(command, self._folder)))

    def _succeed(self, commands: Iterable[str]) -> None:
        for command in commands:
            self.commands.append(command)
            with Daemon() as daemon:
                screen = self._run(ADDRESS.sub("{}:{}".format(*daemon.address), command))
                assert screen.terminal.wait() == 0, screen.terminal.output

    def _console(self, lines: list[str]) -> None:
        if not lines[0].startswith("$ "):
            self._continue(lines)
            return
        for command, output in _sessions(lines):
            self.commands.append(command)
            if started := STARTED.fullmatch(command):
                self._start(started[1], output)
            else:
                self._type(command, output)

    def _start(self, arguments: str, output: list[str]) -> None:
        assert self._daemon is None, "there is a daemon already"
        listen = "" if "--config" in arguments else " --listen 127.0.0.1:0"
        self._daemon = self._run(f"echod{ADDRESS.sub('127.0.0.1:0', arguments)}{listen}")
        found = self._daemon.lines(len(output))
        _compare(found, output)
        written, real = (ADDRESS.findall("\n".join(text)) for text in (output, found))
        self._ports = dict(zip(written, real, strict=True))

    def _continue(self, lines: list[str]) -> None:
        assert self._daemon, "there is no daemon"
        stop = lines.index("^C") if "^C" in lines else len(lines)
        _compare(self._daemon.lines(stop), lines[:stop])
        if stop < len(lines):
            self._daemon.terminal.type("\x03")
            _compare(self._daemon.rest(), lines[stop + 1 :])
            self._daemon = None

    def _type(self, command: str, output: list[str]) -> None:
        for written, real in self._ports.items():
            command = command.replace(written, real).replace(written.replace(":", " "), real.replace(":", " "))
        screen = self._run(command)
        if not command.startswith("nc "):
            _compare(screen.rest(), output)
            return
        for typed in output[: len(output) // 2 * 2 : 2]:
            screen.terminal.type(f"{typed}\n")
            _compare(screen.lines(2), [typed, typed])
        if output[-1] == "^C":
            screen.terminal.type("\x03")
            screen.rest()


def _sessions(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a block with its output."""
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield lines[start].removeprefix("$ "), lines[start + 1 : end]


def _compare(found: list[str], written: list[str]) -> None:
    assert [same(line) for line in found] == [same(line) for line in written], "\n".join(
        ["the terminal shows:", *found]
    )
