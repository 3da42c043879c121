"""Signals during a measurement, and its progress on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from datagrams import UdpPeer
from harness import PATIENCE, clean_environment, run
from peers import Peer, each, echo, ending, messages

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.once


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_a_measurement(number: signal.Signals, ending: str) -> None:
    """The results so far are printed."""
    enough = threading.Event()

    def act(sock: socket.socket, count: int, message: bytes) -> None:
        sock.sendall(message)
        if count == 500:
            enough.set()

    with Peer(messages(64, act)) as peer:
        command = [sys.executable, "-m", "echod", "probe", peer.target, "--duration", "1000", "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment())
        assert enough.wait(PATIENCE)
        process.send_signal(number)
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    found = json.loads(output)
    assert (found["ending"], found["signal"], found["errors"], errors) == (ending, number.name, {}, b"")
    assert found["messages"] >= 500
    assert 0 < found["seconds"] < PATIENCE


def test_a_signal_ends_connecting() -> None:
    """The measurement ends at once, without any message."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        host, port = listening.getsockname()
        options = ("--tls", "--insecure", "--timeout", "1000", "--count", "1")
        command = [sys.executable, "-m", "echod", "probe", f"{host}:{port}", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment())
        sock, _ = listening.accept()
        with sock:
            assert sock.recv(1)  # the ClientHello
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (130, b"")
    assert b"ended by SIGINT: these are the results so far\n" in output
    assert re.search(rb"messages +0 ", output)


class Terminal:
    """Runs a command in a terminal of 80 columns, and keeps its output."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        self.shown = ""
        self._pid, self._descriptor = pty.fork()
        if self._pid == 0:
            environment = clean_environment({"TERM": "xterm", "COLUMNS": "80", "LINES": "40"} | variables)
            os.execve(sys.executable, [sys.executable, "-m", "echod", *arguments], environment)

    def write(self, text: str) -> None:
        """Type text."""
        os.write(self._descriptor, text.encode())

    def read_until(self, pattern: str) -> None:
        """Read until the output matches a pattern."""
        while not re.search(pattern, self.shown):
            assert self._read(), self.shown

    def wait(self) -> int:
        """Read until the command ends, and return its exit code."""
        while self._read():
            pass
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def _read(self) -> bool:
        assert select.select([self._descriptor], [], [], PATIENCE)[0], self.shown
        try:
            self.shown += os.read(self._descriptor, 65536).decode()
        except OSError:  # EIO: no process has the terminal open
            return False
        return True


def test_progress_on_a_terminal() -> None:
    """The bar moves, Ctrl-C ends the measurement, and the report replaces the bar."""
    with Peer(echo) as peer:
        terminal = Terminal("probe", peer.target, "--duration", "1000", "--connections", "2")
        terminal.read_until(r"0\.[0-9] s  [0-9,]+/s  p50 \S+ .s, max \S+ .s")
        terminal.read_until(r"1\.[0-9] s  [0-9,]+/s")
        terminal.write("\x03")
        assert terminal.wait() == 130
    _, bar, report = terminal.shown.partition("\x1b[?25h")  # the bar ends when the cursor is shown again
    assert bar
    assert "ended by SIGINT" in report
    assert "p99.9" in report
    assert "\x1b[1m" in report  # bold
    assert "Traceback" not in terminal.shown


def test_progress_of_a_count_and_of_a_stream() -> None:
    """The bar of a count shows errors, that of a stream bytes per second."""
    with Peer(each(ending(640), echo)) as peer:
        terminal = Terminal("probe", peer.target, "--rate", "50", "--count", "100", "--connections", "2")
        terminal.read_until("1 error")
        assert terminal.wait() == 1
        assert "early_eof 1" in terminal.shown
    with Peer(echo) as peer:
        terminal = Terminal("probe", peer.target, "--stream", "--duration", "1")
        terminal.read_until(r"0\.[0-9] s  [0-9.]+ .B/s")
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.shown


def test_progress_over_udp() -> None:
    """The bar shows lost datagrams, and a long target does not widen the lines."""
    with UdpPeer(lambda number, datagram: [datagram] if number % 2 else []) as peer:
        terminal = Terminal("probe", peer.target, "--rate", "50", "--count", "60", "--timeout", "0.2")
        terminal.read_until("[1-9][0-9]* lost")
        assert terminal.wait() == 1
    assert re.search("lost +[0-9]+ +[0-9.]+%", STYLE.sub("", terminal.shown))
    assert "Traceback" not in terminal.shown


STYLE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.mark.parametrize(
    "options",
    [("--rate", "1000", "--count", "2000"), ("--stream", "--duration", "300ms"), ("--rate", "10M", "--count", "9")],
)
def test_a_terminal_of_80_columns(tmp_path: Path, options: tuple[str, ...]) -> None:
    """No line of the progress or the report is longer, even for a long target."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"{tmp_path}/socket".ljust(100, "x"))
    sock.listen()
    with Peer(echo, sock) as peer:
        terminal = Terminal("probe", peer.target, *options)
        assert terminal.wait() == 0
    text = STYLE.sub("", terminal.shown)
    assert "errors " in text
    if "1000" in options:
        assert re.search(r"p50 \S+ .s, max \S+ .s *\r", text), text
    assert max(map(len, re.split("[\r\n]+", text))) <= 80


@pytest.mark.parametrize(
    ("variables", "styles"),
    [({}, {"\x1b[36m", "\x1b[1m"}), ({"NO_COLOR": "1"}, {"\x1b[1m"}), ({"TERM": "dumb"}, set())],
)
def test_colours(variables: dict[str, str], styles: set[str]) -> None:
    """NO_COLOR leaves bold text only, and a dumb terminal gets plain text."""
    with Peer(echo) as peer:
        terminal = Terminal("probe", peer.target, "--count", "20", **variables)
        assert terminal.wait() == 0
    assert {style for style in ("\x1b[36m", "\x1b[1m") if style in terminal.shown} == styles
    assert styles or "\x1b" not in terminal.shown
    assert "p99.9" in terminal.shown


def test_no_terminal() -> None:
    """In a pipe the report is plain, unless FORCE_COLOR is set."""
    with Peer(echo) as peer:
        assert "\x1b" not in run("probe", peer.target, "--count", "20").stdout
        environment = {"FORCE_COLOR": "1", "TERM": "xterm"}
        assert "\x1b[36m" in run("probe", peer.target, "--count", "20", env=environment).stdout


def test_help_fits() -> None:
    """The help fits a terminal of 80 columns."""
    terminal = Terminal("probe", "--help")
    assert terminal.wait() == 0
    assert max(map(len, terminal.shown.splitlines())) <= 80
    assert max(map(len, run("probe", "--help", env={"COLUMNS": ""}).stdout.splitlines())) <= 80
