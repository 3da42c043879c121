"""Test threads and processes that the system refuses. Each feature degrades, and its next attempt works."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from echod import threads
from echod.loops import loop_factory
from echod.probe import arguments, progress
from echod.probe.load import Interrupt, LoadGenerator
from harness import PATIENCE, Daemon, clean_environment, free_port, until
from refusal import refusing
from watching import WATCHED, scrape

REFUSED = "can't start new thread: raise the process limit (ulimit -u, pids.max, TasksMax=), or free memory"


def descriptors(process: object) -> set[str]:
    return {path.name for path in Path(f"/proc/{process}/fd").iterdir()}


def test_reload(loop_name: str, tmp_path: Path) -> None:
    """Fail the reload without a thread and report its end to systemd. The next reload works."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE)
        manager.bind(str(tmp_path / "notify"))
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with Daemon("--loop", loop_name, module=refusing(reload="--"), env=environment) as daemon:
            assert manager.recv(4096).startswith(b"READY=1\n")
            for count in (1, 2):
                daemon.send_signal(signal.SIGHUP)
                assert daemon.wait_for("reload_failed", count=count)["problems"] == [REFUSED]
                assert manager.recv(4096).startswith(b"RELOADING=1\n")
                ready = manager.recv(4096)
                assert ready.startswith(b"READY=1\n")
                assert REFUSED.encode() in ready
            daemon.send_signal(signal.SIGHUP)
            daemon.wait_for("reloaded")
            daemon.echo(b"x")
            assert daemon.stop() == 0
            assert not daemon.all("reload_queued")
            assert not daemon.all("loop_error")


def test_start(loop_name: str) -> None:
    """End the start with one line and a failure's exit code if the log gets no thread."""
    command = [sys.executable, *refusing(log="-"), "--loop", loop_name, "--listen", "127.0.0.1:0"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment(), check=False
    )
    assert result.stderr == f"echod: the log: {REFUSED}\n"
    assert result.returncode == 1


def test_start_reads_the_settings_itself(loop_name: str) -> None:
    """Start without the thread that would read the settings."""
    with Daemon("--loop", loop_name, module=refusing(settings="-")) as daemon:
        daemon.echo(b"x")
        assert daemon.stop() == 0


def test_another_log(loop_name: str, tmp_path: Path) -> None:
    """Change nothing and leak no descriptor if a reload gets no thread for another log."""
    config, log = tmp_path / "echo.toml", tmp_path / "log"
    config.write_text("")
    with Daemon("--loop", loop_name, "--config", str(config), module=refusing(log="+-")) as daemon:
        config.write_text(f'log.file = "{log}"\nlimits.max_connections = 1\n')
        before = descriptors(daemon.pid)
        daemon.send_signal(signal.SIGHUP)
        assert daemon.wait_for("reload_failed")["problems"] == [REFUSED]
        assert descriptors(daemon.pid) == before
        with daemon.connect() as one, daemon.connect() as two:
            for client in (one, two):
                client.sendall(b"x")
                assert client.recv(1) == b"x"
        daemon.send_signal(signal.SIGHUP)
        until(lambda: log.exists() and '"reloaded"' in log.read_text())
        assert daemon.stop() == 0


def test_rotation(loop_name: str, tmp_path: Path) -> None:
    """Reopen a log file without a new thread, so that a limit of processes cannot prevent it."""
    log = tmp_path / "log"
    listen = f"127.0.0.1:{free_port()}"
    arguments = ("--loop", loop_name, "--log.file", str(log), "--log.format", "json")
    with Daemon(*arguments, listen=listen, module=refusing(reload="-", log="+-----"), read_log=False) as daemon:
        until(lambda: log.exists() and '"listening"' in log.read_text())
        log.rename(tmp_path / "rotated")
        daemon.send_signal(signal.SIGHUP)
        until(lambda: log.exists() and '"reload_failed"' in log.read_text())
        assert "reload" not in (tmp_path / "rotated").read_text()
        assert daemon.stop() == 0
        assert '"stopped"' in log.read_text()


def test_pipe_as_the_log(loop_name: str, tmp_path: Path) -> None:
    """Keep writing to the first FIFO if the FIFO that replaced it gets no thread. The reload goes on."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    listen = f"127.0.0.1:{free_port()}"
    arguments = ("--loop", loop_name, "--log.file", str(fifo), "--log.format", "json")
    data = b""

    def has(text: bytes) -> bool:
        nonlocal data
        assert select.select([reader], [], [], PATIENCE)[0]
        data += os.read(reader, 65536)
        return text in data

    with Daemon(*arguments, listen=listen, module=refusing(log="+-"), read_log=False) as daemon:
        until(lambda: has(b'"listening"'))
        fifo.unlink()
        os.mkfifo(fifo)
        another = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        daemon.send_signal(signal.SIGHUP)
        until(lambda: has(b'"reloaded"'))
        assert f'"log_reopen_failed","file":"{fifo}","error":"{REFUSED}"'.encode() in data
        assert daemon.stop() == 0
        until(lambda: has(b'"stopped"'))
    os.close(reader)
    os.close(another)


def test_metrics(loop_name: str) -> None:
    """Omit only the metrics of the process from a scrape without a thread. The next scrape has them."""
    with Daemon("--loop", loop_name, *WATCHED, module=refusing(admin="-")) as daemon:
        assert {"echod_draining", "process_open_fds"} & {key[0] for key in scrape(daemon)} == {"echod_draining"}
        assert {"echod_draining", "process_open_fds"} <= {key[0] for key in scrape(daemon)}
        assert daemon.stop() == 0
        assert daemon.loud() == []


@pytest.mark.parametrize("granted", [0, 3])
def test_measurement(granted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connect on the available threads in a measurement, or on the main thread if there are none."""
    begin, started = threading.Thread.start, list[str]()

    def start(self: threading.Thread) -> None:
        if len(started) == granted:
            msg = "can't start new thread"
            raise RuntimeError(msg)
        started.append(self.name)
        begin(self)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        options = arguments.parse([f"127.0.0.1:{listening.getsockname()[1]}", "--connections", "20", "--count", "1"])
        with progress.Display(options) as display:
            generator = LoadGenerator(options, Interrupt(), display)
            monkeypatch.setattr(threading.Thread, "start", start)
            generator.connect()
        assert generator.results.connected == 20
        assert len(started) == granted
        generator.finish()


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Omit the progress of a measurement on a terminal if no process can be forked."""

    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(os, "fork", fork)
        before = descriptors("self")
        options = arguments.parse(["127.0.0.1:7", "--count", "1"])
        with progress.Display(options) as display:
            assert descriptors("self") == before
            display.show(seconds=1.0, messages=1, received=1, errors=0, sample=[1])
    os.close(master)


@pytest.mark.parametrize("over", ["cancelled", "closed"])
def test_result_that_is_not_wanted(loop_name: str, over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """End a thread without an error if its result was given up or its loop was closed."""
    errors: list[object] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    loop = loop_factory(loop_name)()
    loop.set_exception_handler(lambda _, context: errors.append(context))
    go = threading.Event()
    future = threads.call(loop, go.wait, "unwanted")
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "unwanted")
    if over == "cancelled":
        future.cancel()
        go.set()
        thread.join(PATIENCE)
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
    else:
        loop.close()
        go.set()
        thread.join(PATIENCE)
    assert not thread.is_alive()
    assert errors == []
