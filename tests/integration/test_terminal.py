"""Test the daemon on a terminal: its lines, Ctrl-C, the progress of a drain, and the end of the terminal."""

from __future__ import annotations

import os
import re
import signal
import socket
from typing import TYPE_CHECKING

import pytest

from echod.daemon import signals
from echod.daemon.signals import HANDLED, Signals
from harness import PATIENCE, UNHURRIED, receive, until
from terminal import COLUMNS, Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any

pytestmark = pytest.mark.once


@pytest.fixture
def run(loop_name: str) -> Iterator[Callable[..., Terminal]]:
    """Return a function that starts the daemon on a terminal, and waits until it listens."""
    terminals: list[Terminal] = []

    def run(*arguments: str, **options: Any) -> Terminal:
        terminal = Terminal("--loop", loop_name, "--listen", "127.0.0.1:0", *arguments, **options)
        terminals.append(terminal)
        return terminal

    yield run
    for terminal in terminals:
        with terminal:
            pass


def connect(port: str) -> socket.socket:
    """Return a client that has got its echo."""
    client = socket.create_connection(("127.0.0.1", int(port)), PATIENCE)
    client.sendall(b"hello")
    assert receive(client, 5) == b"hello"
    return client


def connect_to(terminal: Terminal) -> socket.socket:
    """Return a client of a daemon that logs to its terminal."""
    return connect(terminal.wait_for(r"listening.* 127\.0\.0\.1:(\d+)\r")[1])


class LogFile:
    """A log with JSON lines in a file."""

    def __init__(self, path: Path) -> None:
        self.options = ("--log.file", str(path))
        self._path = path

    def wait_for(self, text: str) -> str:
        """Wait for a line with this text, and return the first one."""
        until(lambda: text in self._text)
        return next(line for line in self._text.splitlines() if text in line)

    def connect(self) -> socket.socket:
        line = self.wait_for('"listening"')
        return connect(line.rpartition(":")[2].rstrip('"}'))

    def events(self) -> list[str]:
        return re.findall(r'"event":"(\w+)"', self._text)

    @property
    def _text(self) -> str:
        """The complete lines so far."""
        return self._path.read_text().rpartition("\n")[0] if self._path.exists() else ""


@pytest.fixture
def log(tmp_path: Path) -> LogFile:
    return LogFile(tmp_path / "log")


def test_lines(run: Callable[..., Terminal]) -> None:
    """A terminal shows the date, and the lines of clients within its width."""
    terminal = run()
    connect_to(terminal).close()
    terminal.wait_for(" eof, ")
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.wait() == 0
    date, *lines, end = terminal.screen()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d UTC[+-]\d{4}", date)
    assert [re.sub(r"^[\d:.]{12}    (\w+) .*", r"\1", line) for line in lines] == [
        *("started", "listening", "closed", "draining", "drained", "stopped")
    ]
    assert re.fullmatch(r"\S+    closed    127\.0\.0\.1:\d+ eof, 5 B echoed in .* m?s, rtt \S+ \S+", lines[2])
    assert max(map(len, lines)) <= COLUMNS
    assert end == ""
    assert "\x1b[" in terminal.output


@pytest.mark.parametrize("variable", ["NO_COLOR", "TERM"])
def test_without_colors(run: Callable[..., Terminal], variable: str) -> None:
    """NO_COLOR turns off colours. A dumb terminal gets no escape sequence at all, in a drain either."""
    terminal = run(*UNHURRIED, env={variable: "dumb"})
    with connect_to(terminal):
        terminal.type("\x03")
        terminal.wait_for("draining")
        terminal.type("\x03")
        assert terminal.wait() == 130
    assert re.findall(r"\x1b\[\d", terminal.output) == []
    assert ("\x1b" in terminal.output) == (variable == "NO_COLOR")


def test_interrupt(run: Callable[..., Terminal]) -> None:
    """Ctrl-C shows the longest time of the drain and then the clients that are left. Another one stops at once."""
    terminal = run("--shutdown.delay", "1", *UNHURRIED)
    with connect_to(terminal) as first, connect_to(terminal):
        terminal.type("\x03")
        terminal.wait_for("draining")
        terminal.wait_for(r"2 clients left, at most \d+ s; Ctrl-C again stops at once")
        first.shutdown(socket.SHUT_WR)
        terminal.wait_for(r"1 client left, at most \d+ s; Ctrl-C again stops at once")
        terminal.type("\x03")
        assert terminal.wait() == 130
    shown = terminal.screen()
    (draining,) = (line for line in shown if "draining" in line)
    assert draining.endswith("draining  after SIGINT: 2 clients, at most 62 s; Ctrl-C again stops at once")
    assert [line for line in shown if "left" in line or "^C" in line] == []
    assert "stopped" in shown[-2]
    assert shown[-1] == ""


def test_progress_beside_a_log_file(run: Callable[..., Terminal], log: LogFile) -> None:
    """If the log is a file, the terminal still shows the progress of a drain, and nothing else."""
    terminal = run(*UNHURRIED, *log.options)
    with log.connect():
        terminal.type("\x03")
        terminal.wait_for("1 client left")
    assert terminal.wait() == 0
    assert terminal.screen() == [""]
    assert log.events()[-1] == "stopped"


def test_no_progress_beside_a_pipe(run: Callable[..., Terminal]) -> None:
    """If the log is a pipe, its reader may write to the terminal, so nothing else does."""
    reading, writing = os.pipe()
    terminal = run("--log.file", "/dev/stdout", stdout=writing)
    os.close(writing)
    with os.fdopen(reading) as lines:
        while '"listening"' not in lines.readline():
            pass
        terminal.type("\x03")
        assert terminal.wait() == 0
        assert '"stopped"' in lines.read()
    assert terminal.screen() == ["^C"]


def test_closed_terminal(run: Callable[..., Terminal], log: LogFile) -> None:
    """Closing the terminal is a graceful stop: no reload, a drain, and exit code 0."""
    terminal = run(*UNHURRIED, *log.options)
    with log.connect() as client:
        terminal.close()
        log.wait_for('"draining"')
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        terminal.process.send_signal(signal.SIGHUP)  # shells send another one
        client.sendall(b"y")
        assert client.recv(1) == b"y"
    assert terminal.wait() == 0
    assert log.events()[2:] in (
        ["draining", *middle, "client_closed", "drained", "stopped"] for middle in ([], ["reload_ignored"])
    )
    assert '"signal":"SIGHUP"' in log.wait_for('"draining"')


def test_closed_terminal_that_has_the_log(run: Callable[..., Terminal]) -> None:
    """A log on a terminal that was closed does not prevent the drain."""
    terminal = run("--shutdown.quiet-period", "0.2")
    with connect_to(terminal) as client:
        terminal.close()
        assert client.recv(1) == b""
    assert terminal.wait() == 0


def test_terminal_that_is_closed_during_a_drain(run: Callable[..., Terminal], log: LogFile) -> None:
    """A SIGHUP does not force a stop that has begun."""
    terminal = run(*UNHURRIED, *log.options)
    with log.connect() as client:
        terminal.type("\x03")
        log.wait_for('"draining"')
        terminal.close()
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    assert terminal.wait() == 0
    assert log.events().count("draining") == 1


def test_reload_in_an_open_terminal(run: Callable[..., Terminal]) -> None:
    """SIGHUP reloads the settings as long as the terminal is open."""
    terminal = run()
    connect_to(terminal).close()
    terminal.process.send_signal(signal.SIGHUP)
    terminal.wait_for("reloaded.* no settings changed")
    connect_to(terminal).close()
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.wait() == 0


def test_nohup(run: Callable[..., Terminal], log: LogFile) -> None:
    """A daemon that was started with SIGHUP ignored, as by nohup(1), survives its terminal."""
    terminal = run(*log.options, prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    log.connect().close()
    terminal.close()
    log.wait_for('"reloaded"')
    log.connect().close()
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.wait() == 0


class Terminals:
    """The terminal of this process, which the test opens and closes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_open: bool | None = True
        monkeypatch.setattr(signals, "_is_terminal_open", lambda: self.is_open)

    def call_later(self, *_: object) -> None:
        """Do nothing: this is the loop too, and the test has the clock."""


@pytest.fixture
def terminals(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminals]:
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    yield Terminals(monkeypatch)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("before", "after", "looks", "stops"),
    [
        (True, False, 0, True),
        (True, False, signals._LOOKS - 1, True),
        (True, False, signals._LOOKS, False),
        (True, None, signals._LOOKS, False),
        (True, True, signals._LOOKS, False),
        (False, False, 0, False),
        (None, False, 0, False),
    ],
)
def test_cause_of_a_hangup(
    terminals: Terminals, before: bool | None, after: bool | None, looks: int, stops: bool
) -> None:
    """SIGHUP stops the daemon only if its terminal was closed a moment ago."""
    terminals.is_open = before
    record = Signals()
    terminals.is_open = after
    for _ in range(looks):
        record._look(terminals)  # type: ignore[arg-type]
    signal.raise_signal(signal.SIGHUP)
    assert record.is_stopping() is stops
    signal.raise_signal(signal.SIGHUP)
    assert record._stops == [signal.SIGHUP] * stops
    assert record.exit_code == 0


def test_terminal_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a descriptor, it is unknown whether there is a terminal."""

    def open_(*_: object) -> int:
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(os, "open", open_)
    assert signals._is_terminal_open() is None
