"""Test the log on standard output and standard error by name: pipes, sockets and files."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from echod.daemon.logs import Log, refusal
from echod.settings.model import LogSettings
from harness import PATIENCE, clean_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Event

pytestmark = pytest.mark.once


class Output:
    """A pipe or a socket for the standard output or standard error of a command."""

    def __init__(self, kind: str, stack: ExitStack) -> None:
        if kind == "pipe":
            reading, self.writing = os.pipe()
        else:
            reading, self.writing = (end.detach() for end in socket.socketpair())
        self.lines = stack.enter_context(os.fdopen(reading, "rb"))

    def run(self, *arguments: str, stream: str = "stdout") -> subprocess.Popen[bytes]:
        """Run a command, and close our writing end, so that EOF follows when the command exits."""
        streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: self.writing}
        process = subprocess.Popen([sys.executable, "-m", "echod", *arguments], env=clean_environment(), **streams)
        os.close(self.writing)
        return process

    def wait_for(self, event: str) -> Event:
        for line in self.lines:
            found: Event = json.loads(line)
            if found["event"] == event:
                return found
        raise AssertionError(event)


@pytest.fixture(params=["pipe", "socket"])
def output(request: pytest.FixtureRequest) -> Iterator[Output]:
    with ExitStack() as stack:
        yield Output(request.param, stack)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/stderr", "/proc/self/fd/1", "link"])
def test_standard_streams(loop_name: str, output: Output, name: str, tmp_path: Path) -> None:
    """Write the log to a standard stream from the start to the stop, and also after a reload."""
    if name == "link":  # container images do this for programs that log to a file
        name = str(tmp_path / "link")
        Path(name).symlink_to("/dev/stdout")
    arguments = ("--log.file", name, "--listen", "127.0.0.1:0", "--loop", loop_name)
    with output.run(*arguments, stream="stderr" if name == "/dev/stderr" else "stdout") as process:
        try:
            output.wait_for("listening")
            process.send_signal(signal.SIGHUP)
            output.wait_for("reloaded")
            process.send_signal(signal.SIGTERM)
            output.wait_for("stopped")
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


def test_check_of_standard_streams(output: Output) -> None:
    """Accept standard output as the log file in `check`."""
    with output.run("check", "--log.file", "/dev/stdout") as process:
        assert process.wait(PATIENCE) == 0
    assert output.lines.readline() == b"configuration OK: the command line; no file was checked\n"


def test_fifo_that_has_a_reader(loop_name: str, tmp_path: Path) -> None:
    """Open the FIFO once at the start, so that its reader sees no EOF before the first line."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    command = [sys.executable, "-m", "echod", "--log.file", str(fifo), "--listen", "127.0.0.1:0", "--loop", loop_name]
    with subprocess.Popen(command, env=clean_environment()) as process:
        try:
            assert select.select([reader], [], [], PATIENCE)[
                0
            ]  # readable because of a line, or of EOF from the first writer
            assert b'"started"' in os.read(reader, 65536)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    assert b'"stopped"' in os.read(reader, 65536)
    os.close(reader)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_pipe_of_another_user() -> None:
    """Log to standard output even if the user cannot open it, as in a container without root."""
    program = """
import ctypes, os
from echod.daemon.logs import Log
from echod.settings.model import LogSettings
os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: as after an execve(2), /proc/self is this user's
log = Log(LogSettings(file="/dev/stdout", format="logfmt"))
log.logger.info("hello")
log.close()
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert result.stdout.endswith("level=info event=hello\n")


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Drop the privileges of root during the test."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder with a file in it. Only root can write to both."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        (path / "old").touch(0o444)
        path.chmod(0o555)
        yield path
        path.chmod(0o755)


@pytest.mark.parametrize("name", ["old", "new"])
@pytest.mark.usefixtures("folder", "unprivileged")
def test_file_without_permission(folder: Path, name: str) -> None:
    """Report a missing permission of the file or its folder in `check`, with the same reason as `serve`."""
    file = str(folder / name)
    error = refusal(file)
    assert error is not None
    with pytest.raises(PermissionError) as caught:
        Log(LogSettings(file=file))
    assert error.strerror == caught.value.strerror == "Permission denied"


def test_folder_without_unnamed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept a writable folder on a file system without O_TMPFILE."""
    opened, begin = [], os.open

    def open_(path: Any, flags: int, *arguments: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            opened.append(path)
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return begin(path, flags, *arguments)

    monkeypatch.setattr(os, "open", open_)
    assert refusal(str(tmp_path / "new")) is None
    assert opened == [tmp_path]
