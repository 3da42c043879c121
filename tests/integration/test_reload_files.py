"""Test reloads with pipes, log files that are always reopened, and settings that are applied as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE, Daemon, free_port, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from certificates import Certificates
    from harness import Command, Start

pytestmark = pytest.mark.once

ONE_EACH = "[limits]\nmax_connections_per_client = 1\n"

ONCE = "is empty now: a pipe can be read only once; use a regular file if the settings are to be reloaded"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Yield the writing end and the reading end of a pipe. The test closes the writing end."""
    reading, writing = os.pipe()
    yield writing, reading
    os.close(reading)


def is_limited(daemon: Daemon) -> bool:
    """Tell whether ONE_EACH is in force, so that a second client of an address is closed at once."""
    with daemon.connect() as first, daemon.connect() as second:
        for client in (first, second):
            client.sendall(b"x")
        assert first.recv(1) == b"x"
        try:
            return second.recv(1) == b""
        except ConnectionResetError:  # the byte was not read
            return True


@pytest.mark.parametrize("way", ["option", "variable", "standard input"])
def test_settings_from_a_pipe(start: Start, pipe: tuple[int, int], way: str) -> None:
    """Keep settings from a pipe in force. A reload fails and logs the reason."""
    writing, reading = pipe
    os.write(writing, ONE_EACH.encode())
    os.close(writing)
    file = f"/dev/fd/{reading}"
    if way == "option":
        daemon = start("--config", file, pass_fds=[reading])
    elif way == "variable":
        daemon = start(env={"ECHOD_CONFIG": file}, pass_fds=[reading])
    else:
        file = "/dev/stdin"
        daemon = start("--config", file, prepare=lambda: os.dup2(reading, 0))
    assert is_limited(daemon)
    for count in (1, 2):
        daemon.send_signal(signal.SIGHUP)
        assert daemon.wait_for("reload_failed", count=count)["problems"] == [f"{file}: {ONCE}"]
    assert is_limited(daemon)
    assert daemon.stop() == 0
    assert not daemon.all("reloaded")


def test_terminal_as_settings(start: Start) -> None:
    """Keep settings typed at the start in force if a reload reads only EOF."""
    master, slave = os.openpty()
    end = b"\x04"
    os.write(master, ONE_EACH.encode() + end)
    daemon = start("--config", "/dev/stdin", prepare=lambda: os.dup2(slave, 0))
    os.write(master, end)
    daemon.send_signal(signal.SIGHUP)
    assert daemon.wait_for("reload_failed")["problems"] == [f"/dev/stdin: {ONCE}"]
    assert is_limited(daemon)
    for descriptor in (master, slave):
        os.close(descriptor)


@pytest.mark.parametrize("kind", ["pipe", "null", "file"])
def test_empty_settings(start: Start, pipe: tuple[int, int], tmp_path: Path, kind: str) -> None:
    """Accept an empty source if it was empty at the start or is a regular file."""
    writing, reading = pipe
    os.close(writing)
    file = tmp_path / "echo.toml"
    file.write_text(ONE_EACH)
    path = {"pipe": f"/dev/fd/{reading}", "null": "/dev/null", "file": str(file)}[kind]
    daemon = start("--config", path, pass_fds=[reading])
    file.write_text("")
    daemon.send_signal(signal.SIGHUP)
    changed = ["limits.max_connections_per_client"] if kind == "file" else []
    assert daemon.wait_for("reloaded")["changed"] == changed
    assert not is_limited(daemon)


HASTY = "import sys; from echod.daemon import reload; reload.LOOKS = 1; from echod.cli import main; sys.exit(main())"


def test_reload_that_times_out(loop_name: str, tmp_path: Path) -> None:
    """Give up reading settings that do not end. A later reload works."""
    config = tmp_path / "echo.toml"
    config.write_text("")
    with Daemon("--loop", loop_name, "--config", str(config), module=("-c", HASTY)) as daemon:
        config.unlink()
        os.mkfifo(config)  # open(2) waits for a writer
        daemon.send_signal(signal.SIGHUP)
        (problem,) = daemon.wait_for("reload_failed")["problems"]
        assert problem.startswith("not read within 1 seconds: ")
        config.rename(tmp_path / "fifo")
        config.write_text(ONE_EACH)
        daemon.send_signal(signal.SIGHUP)
        daemon.wait_for("reloaded")
        (tmp_path / "fifo").write_text("limits.max_connections_per_client = 0")  # too late to count
        assert is_limited(daemon)
        assert daemon.stop() == 0
        assert daemon.loud() == [daemon.wait_for("reload_failed")]


LARGE = "it is larger than 16 MiB"


def test_endless_settings(start: Start, tmp_path: Path) -> None:
    """Fail the reload for a device without an end, instead of using up the memory."""
    config = tmp_path / "echo.toml"
    config.write_text(ONE_EACH)
    daemon = start("--config", str(config))
    before = daemon.memory()
    config.unlink()
    config.symlink_to("/dev/zero")
    daemon.send_signal(signal.SIGHUP)
    assert daemon.wait_for("reload_failed")["problems"] == [f"{config}: cannot be read: {LARGE}"]
    assert daemon.memory() - before < 100_000_000
    assert is_limited(daemon)
    assert daemon.stop() == 0


@pytest.mark.parametrize("key", ["certificate", "private_key", "client_ca"])
def test_endless_certificates(start: Start, tmp_path: Path, certificates: Certificates, key: str) -> None:
    """Fail the reload also if a TLS file is a device without an end."""
    config = tmp_path / "echo.toml"
    files = {
        "certificate": str(certificates.certificate),
        "private_key": str(certificates.key),
        "client_ca": str(certificates.ca),
    }
    table = '[listeners.x]\naddress = "127.0.0.1:0"\n[listeners.x.tls]\n'

    def text() -> str:
        return table + "".join(f'{name} = "{file}"\n' for name, file in files.items())

    config.write_text(text())
    daemon = start("--config", str(config), listen=None)
    files[key] = "/dev/zero"
    config.write_text(text())
    daemon.send_signal(signal.SIGHUP)
    line = config.read_text()[: config.read_text().index(f"{key} =")].count("\n") + 1
    problem = f"{config}:{line}: listeners.x.tls.{key}: '/dev/zero' cannot be read: {LARGE}"
    assert daemon.wait_for("reload_failed")["problems"] == [problem]
    assert daemon.stop() == 0


class Logged:
    """A daemon that logs to a file, and its settings file."""

    def __init__(self, start: Start, folder: Path) -> None:
        self.log = folder / "log"
        self.rotated = folder / "rotated"
        self.config = folder / "echo.toml"
        self.table = f'log.file = "{self.log}"\nlog.format = "json"\n'
        self.config.write_text(self.table)
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.address = sock.getsockname()
        self.daemon = start(
            "--config", str(self.config), "--listen", "{}:{}".format(*self.address), listen=None, read_log=False
        )
        self.wait_for("listening")

    def wait_for(self, text: str) -> None:
        until(lambda: self.log.exists() and text in self.log.read_text())

    def rotate(self) -> None:
        """Rename the log file and send SIGHUP, as logrotate does."""
        self.log.rename(self.rotated)
        self.daemon.send_signal(signal.SIGHUP)


@pytest.mark.parametrize(
    "change",
    [
        "limits.backlog = 0",
        "this is not TOML",
        'listeners.x = {address = "127.0.0.1:0", tls = {certificate = "none", private_key = "none"}}',
        'log.file = "/none/log"',
        None,
    ],
)
def test_log_is_reopened_even_if_the_reload_fails(start: Start, tmp_path: Path, change: str | None) -> None:
    """Write every line after a rotation to the new file, even if the settings are refused."""
    logged = Logged(start, tmp_path)
    if change is None:
        logged.config.unlink()
    elif change.startswith("log.file"):
        logged.config.write_text(change)
    else:
        logged.config.write_text(logged.table + change)
    logged.rotate()
    logged.wait_for('"reload_failed"')
    with socket.create_connection(logged.address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    assert logged.daemon.stop() == 0
    assert '"client_closed"' in logged.log.read_text()
    assert '"stopped"' in logged.log.read_text()
    assert logged.rotated.read_text().splitlines()[-1].count('"listening"') == 1


def test_rotation_of_a_full_log(start: Start, tmp_path: Path) -> None:
    """Start the new file with a whole line if a full disk truncated the old one's last line."""
    largest = 2000
    log, config = tmp_path / "log", tmp_path / "echo.toml"
    config.write_text("")
    limits = (largest, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    daemon = start("--config", str(config), prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    config.write_text(f'log.file = "{log}"\nlog.format = "json"\n')
    daemon.send_signal(signal.SIGHUP)
    until(lambda: log.exists() and '"reloaded"' in log.read_text())
    while log.stat().st_size < largest:
        daemon.echo(b"x")
    daemon.settle()
    log.rename(tmp_path / "rotated")
    daemon.send_signal(signal.SIGHUP)
    until(lambda: log.exists() and '"reloaded"' in log.read_text())
    assert daemon.stop() == 0
    assert (tmp_path / "rotated").stat().st_size == largest
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events[-1] == "stopped"


def test_log_is_reopened_while_settings_are_read(start: Start, tmp_path: Path) -> None:
    """Reopen the log without waiting for settings that are slow to read."""
    logged = Logged(start, tmp_path)
    logged.config.unlink()
    os.mkfifo(logged.config)
    logged.rotate()
    until(logged.log.exists)  # so the two signals do not become one
    logged.rotate()
    logged.wait_for('"reload_queued"')
    assert logged.daemon.stop() == 0
    assert '"stopped"' in logged.log.read_text()


def test_log_is_reopened_during_a_stop(start: Start, tmp_path: Path) -> None:
    """Reopen the log during a drain too."""
    logged = Logged(start, tmp_path)
    logged.config.write_text(logged.table + "shutdown = {quiet_period = 60, drain_timeout = 60}\n")
    logged.daemon.send_signal(signal.SIGHUP)
    logged.wait_for('"reloaded"')
    with socket.create_connection(logged.address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        logged.daemon.send_signal()
        logged.wait_for('"draining"')
        logged.rotate()
        logged.wait_for('"reload_ignored"')
    assert logged.daemon.wait() == 0
    assert '"drained"' in logged.log.read_text()


def test_log_that_cannot_be_reopened(start: Start, tmp_path: Path) -> None:
    """Keep writing to the open file if the log cannot be reopened, and log the reason there."""
    logged = Logged(start, tmp_path)
    logged.log.rename(logged.rotated)
    logged.log.mkdir()
    logged.config.write_text("limits.backlog = 0")
    logged.daemon.send_signal(signal.SIGHUP)
    until(lambda: '"reload_failed"' in logged.rotated.read_text())
    assert f'"log_reopen_failed","file":"{logged.log}","error":"Is a directory"' in logged.rotated.read_text()
    logged.log.rmdir()
    logged.daemon.send_signal(signal.SIGHUP)
    logged.wait_for('"reload_failed"')
    assert logged.daemon.stop() == 0


def test_log_that_has_become_a_pipe_without_a_reader(start: Start, command: Command, tmp_path: Path) -> None:
    """A reload fails with the words of `check` until the FIFO has a reader. Lines still go to the open file."""
    logged = Logged(start, tmp_path)
    logged.log.rename(logged.rotated)
    os.mkfifo(logged.log)
    logged.daemon.send_signal(signal.SIGHUP)
    until(lambda: logged.rotated.read_text().endswith("]}\n"))  # the end of both lines about a reload
    lines = [json.loads(line) for line in logged.rotated.read_text().splitlines()][-2:]
    assert [line["event"] for line in lines] == ["log_reopen_failed", "reload_failed"]
    (problem,) = lines[-1]["problems"]
    assert command("check", "--config", str(logged.config)).stderr == f"echod: {problem}\n"
    reader = os.open(logged.log, os.O_RDONLY | os.O_NONBLOCK)
    logged.daemon.send_signal(signal.SIGHUP)
    read_until(reader, b'"reloaded"')
    assert logged.daemon.stop() == 0
    read_until(reader, b'"stopped"')
    os.close(reader)


def read_until(reader: int, text: bytes) -> None:
    """Read from a pipe until the text arrives."""
    data = b""
    while text not in data:
        assert select.select([reader], [], [], PATIENCE)[0]
        data += os.read(reader, 65536)


def test_fifo_is_reopened(start: Start, tmp_path: Path) -> None:
    """Write all further lines, those of listeners included, to a new FIFO, even if the reload fails."""
    fifo, config = tmp_path / "fifo", tmp_path / "echo.toml"
    config.write_text("")
    daemon = start("--config", str(config))
    readers = []
    for text in (f'log.file = "{fifo}"\nlog.format = "json"\n', "limits.backlog = 0"):
        fifo.unlink(missing_ok=True)
        os.mkfifo(fifo)
        readers.append(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK))
        config.write_text(text)
        daemon.send_signal(signal.SIGHUP)
        read_until(readers[-1], b'"reloaded"' if len(readers) == 1 else b'"reload_failed"')
    daemon.echo(b"x")
    read_until(readers[1], b'"client_closed"')
    assert daemon.stop() == 0
    assert os.read(readers[0], 65536) == b""
    for reader in readers:
        os.close(reader)


def full_fifo(path: Path) -> int:
    """Make a FIFO, fill it, and return its reading end."""
    os.mkfifo(path)
    reading = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while os.write(reading, bytes(4096)):
            pass
    return reading


# Print each timeout with which the stop waits for a log thread. Its clock advances by that timeout only.
RECORDED_WAITS = """
import sys, threading, time, types
from echod.daemon import logs
join, now = threading.Thread.join, 0.0
def recorded(thread, timeout=None):
    global now
    join(thread, timeout)
    if thread.name == "log":
        now += timeout
        print(timeout, file=sys.stderr, flush=True)
threading.Thread.join = recorded
logs.time = types.SimpleNamespace(**{**vars(time), "monotonic": lambda: now})
from echod.cli import main
sys.exit(main())
"""


def stop_and_read_waits(daemon: Daemon) -> list[float]:
    """Stop a daemon that runs RECORDED_WAITS, and return the timeouts of its waits for log threads."""
    daemon.send_signal()
    assert daemon.process.wait(PATIENCE) == 0
    return [float(line) for line in daemon.log_pipe.read().split()]


def test_reloads_under_a_full_pipe(start: Start, tmp_path: Path) -> None:
    """Use no more threads or descriptors in a reload if the log's reader stalls. The stop waits for one second."""
    reading = full_fifo(tmp_path / "fifo")
    listen = f"127.0.0.1:{free_port()}"
    module = ("-c", RECORDED_WAITS)
    daemon = start("--log.file", str(tmp_path / "fifo"), listen=listen, read_log=False, module=module)
    looks = []
    until(lambda: listens(listen))
    for _ in range(8):
        daemon.settle()
        daemon.send_signal(signal.SIGHUP)
        daemon.settle()
        looks.append([count(daemon, kind) for kind in ("task", "fd")])
    assert looks == looks[:1] * 8
    assert stop_and_read_waits(daemon) == [1]
    os.close(reading)


def test_stop_under_many_full_pipes(start: Start, tmp_path: Path) -> None:
    """Wait for one second in total in a stop after each reload opened another pipe with a stalled reader."""
    fifo = tmp_path / "fifo"
    readers = [full_fifo(fifo)]
    listen = f"127.0.0.1:{free_port()}"
    daemon = start("--log.file", str(fifo), listen=listen, read_log=False, module=("-c", RECORDED_WAITS))
    until(lambda: listens(listen))
    for _ in range(8):
        fifo.unlink()
        readers.append(full_fifo(fifo))
        daemon.settle()
        daemon.send_signal(signal.SIGHUP)
        daemon.settle()
    assert count(daemon, "task") > len(readers)  # each pipe has a thread that waits for its reader
    assert stop_and_read_waits(daemon) == [1, *[0] * 8]
    for reading in readers:
        os.close(reading)


def count(daemon: Daemon, kind: str) -> int:
    """Count the threads ("task") or descriptors ("fd") of the daemon."""
    return len(list(Path(f"/proc/{daemon.pid}/{kind}").iterdir()))


def listens(address: str) -> bool:
    """Tell whether a connection succeeds."""
    host, _, port = address.partition(":")
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port)), PATIENCE):
        return True
    return False


FAILING_LISTEN = """
import errno, json, os, socket, sys
listen, refused = socket.socket.listen, 0
def failing(self, backlog):
    global refused
    print(json.dumps({"event": "listen", "port": self.getsockname()[1], "backlog": backlog}), file=sys.stderr, flush=True)
    if backlog == 77:
        refused += 1
        if refused == 2:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    listen(self, backlog)
socket.socket.listen = failing
from echod.cli import main
sys.exit(main())
"""


def test_backlog_that_is_refused(loop_name: str, tmp_path: Path) -> None:
    """Restore the backlog of one listener if listen(2) fails for the other. No setting changes."""
    config, log = tmp_path / "echo.toml", tmp_path / "log"
    listeners = "".join(f'[listeners.{name}]\naddress = "127.0.0.1:0"\n' for name in ("a", "b"))
    config.write_text(f"limits.backlog = 11\n{listeners}")
    text = f'log.file = "{log}"\nlimits = {{backlog = 77, max_connections_per_client = 1}}\n{listeners}'
    arguments = ("--loop", loop_name, "--config", str(config))
    with Daemon(*arguments, listen=None, module=("-c", FAILING_LISTEN)) as daemon:
        daemon.wait_for("listening", listener="b")
        ports = [event["port"] for event in daemon.all("listen")]
        config.write_text(text)
        daemon.send_signal(signal.SIGHUP)
        problem = f"{config}:2: limits.backlog: cannot be set on b: Cannot allocate memory"
        assert daemon.wait_for("reload_failed")["problems"] == [problem]
        made = [(event["port"], event["backlog"]) for event in daemon.all("listen")]
        in_force = {port: backlog for port, backlog in made if (port, backlog) != (ports[1], 77)}
        assert in_force == dict.fromkeys(ports, 11)
        assert made.count((ports[0], 77)) == 1
        assert not log.exists()
        assert not is_limited(daemon)
        daemon.send_signal(signal.SIGHUP)
        until(lambda: log.exists() and '"reloaded"' in log.read_text())
        assert is_limited(daemon)
        assert daemon.stop() == 0


def test_log_that_is_refused(loop_name: str, tmp_path: Path) -> None:
    """Restore the backlogs if the last step of a reload, opening the log file, fails."""
    config, link = tmp_path / "echo.toml", tmp_path / "fifo"
    config.write_text("limits.backlog = 11\n")
    with Daemon("--loop", loop_name, "--config", str(config), module=("-c", FAILING_LISTEN)) as daemon:
        os.mkfifo(link)  # only open(2) shows that it has no reader
        config.write_text(f'log.file = "{link}"\nlimits.backlog = 12\n')
        daemon.send_signal(signal.SIGHUP)
        reason = "No such device or address: no process reads this FIFO; start its reader first"
        problem = f"{config}:1: log.file: '{link}' cannot be written: {reason}"
        assert daemon.wait_for("reload_failed")["problems"] == [problem]
        assert [event["backlog"] for event in daemon.all("listen")] == [11, 12, 11]
        assert daemon.stop() == 0
