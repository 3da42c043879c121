"""Test what happens if a part of a daemon with several workers fails. Each daemon runs with a defect."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from harness import PATIENCE, UNHURRIED, receive, until
from watching import status
from workers import is_alive, pids

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Command, Daemon, Start

pytestmark = pytest.mark.once


def start_with(start: Start, defect: str, *arguments: str, **options: Any) -> Daemon:
    """Start a daemon with two workers after running some code."""
    code = f"{defect}\nfrom echod.cli import main\nimport sys\nsys.exit(main())"
    return start("--workers", "2", *UNHURRIED, *arguments, module=("-c", code), **options)


def test_no_process_for_the_spawner(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start fails if the system refuses the process that starts the workers."""

    def refuse() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    result = command("--workers", "2", "--listen", "127.0.0.1:0")
    assert (result.returncode, result.stderr) == (1, "echod: the workers: Resource temporarily unavailable\n")


def test_refused_process(start: Start) -> None:
    """A worker that the system refuses is started again."""
    defect = """
import errno, os
calls, fork = [], os.fork
def refuse():
    calls.append(1)
    if len(calls) == 2:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
    return fork()
os.fork = refuse
"""
    daemon = start_with(start, defect)
    assert daemon.wait_for("worker_failed")["error"] == "EAGAIN"
    daemon.echo(b"served")
    assert daemon.stop() == 0


def test_abort_during_the_start(start: Start) -> None:
    """A worker that is forked after an abort gets no sockets, and ends."""
    defect = """
import os, time
calls, fork = [], os.fork
def delay():
    calls.append(1)
    if len(calls) > 1:
        time.sleep(1)
    return fork()
os.fork = delay
"""
    daemon = start("--workers", "2", module=("-c", f"{defect}\nfrom echod.cli import main\nmain()"), read_log=False)
    assert b'"started"' in daemon.log_pipe.readline()
    daemon.send_signal(signal.SIGQUIT)
    assert b'"draining"' in daemon.log_pipe.readline()
    assert b'"clients":0' in daemon.log_pipe.readline().replace(b" ", b"")
    daemon.process.wait(PATIENCE)


def test_stop_before_a_restart(start: Start) -> None:
    """A stop starts a worker that waits for its restart, because connections may wait in its queue."""
    daemon = start_with(start, "from echod.workers import restarts\nrestarts._FIRST_DELAY = 600")
    os.kill(pids(daemon)[0], signal.SIGKILL)
    daemon.wait_for("worker_failed")
    clients = [daemon.connect() for _ in range(30)]
    for client in clients:
        client.sendall(b"x")
    daemon.send_signal()
    for client in clients:
        assert receive(client, 1) == b"x"
        client.close()
    assert daemon.wait() == 0
    assert daemon.wait_for("stopped")["connections"] == 30


def test_worker_that_cannot_reload(start: Start, tmp_path: Path) -> None:
    """A worker that cannot put new settings in force is replaced by one that starts with them."""
    file = tmp_path / "echo.toml"
    table = '[listeners.a]\naddress = "127.0.0.1:0"\nmode = "{}"\n'
    file.write_text(table.format("stream"))
    defect = "from echod.workers.worker import Worker\ndef fail(self): raise OSError\nWorker._commit = fail"
    code = f"{defect}\nfrom echod.cli import main\nmain()"
    daemon = start("--workers", "2", "--config", str(file), module=("-c", code), listen=None)
    file.write_text(table.format("info"))
    daemon.send_signal(signal.SIGHUP)
    for number in range(2):
        assert daemon.wait_for("crashed", worker=number)["level"] == "error"
        assert daemon.wait_for("worker_failed", worker=number)["code"] == 1
        daemon.wait_for("worker_ready", worker=number, count=2)
    with daemon.connect() as client:
        assert receive(client, 1) == b"{"
    assert daemon.stop() == 0


def test_failed_server_and_drain(start: Start, tmp_path: Path) -> None:
    """A worker with a failed task ends after a drain and is replaced. A drain that fails is reported."""
    defect = f"""
import asyncio, os
from echod.server.drain import Drain
from echod.server.timeouts import Sweep
from echod.workers.worker import Worker
run, beat = Sweep.run, Worker._beat
async def fail_once(self):
    try:
        os.mkdir({str(tmp_path / "once")!r})
    except FileExistsError:
        await run(self)
    raise RuntimeError("sweep")
async def fail(self, shutdown):
    raise RuntimeError("drain")
def complain(self, loop):
    loop.call_exception_handler({{"message": "strange"}})
    beat(self, loop)
Sweep.run, Drain.run, Worker._beat = fail_once, fail, complain
"""
    daemon = start_with(start, defect)
    crashed = daemon.wait_for("crashed")
    assert "RuntimeError: sweep" in crashed["exception"]
    assert daemon.wait_for("worker_failed")["code"] == 1
    daemon.wait_for("worker_ready", count=3)
    assert daemon.wait_for("loop_error")["message"] == "strange"
    assert daemon.stop() == 1
    assert "RuntimeError: drain" in daemon.wait_for("stop_failed", worker=0)["exception"]


def test_failed_admin_listener(start: Start) -> None:
    """A defect of the admin listener ends the daemon after a drain, also if it cannot be closed."""
    defect = """
from echod.admin.history import History
from echod.admin.http import Admin
async def fail(self):
    raise RuntimeError("broken")
History.run = Admin.close = fail
"""
    daemon = start_with(start, defect, "--admin.address", "127.0.0.1:0", read_log=False)
    events = [json.loads(line) for line in daemon.log_pipe]
    assert daemon.process.wait(PATIENCE) == 1
    failed = [event["event"] for event in events if event["level"] == "error" and event["listener"] == "admin"]
    assert failed == ["crashed", "stop_failed"]
    assert events[-1]["event"] == "stopped"


def test_status_before_the_first_figures(start: Start) -> None:
    """Without an answer of any worker, the counts are 0."""
    defect = """
from echod.workers import supervisor
from echod.workers.worker import Worker
async def ignore(self): pass
Worker._count = ignore
supervisor._FIGURES = 0.01
"""
    daemon = start_with(start, defect, "--admin.address", "127.0.0.1:0", "--limits.max-connections", "100000000")
    assert daemon.wait_for("descriptor_limit")["max_connections"] == 100_000_000
    daemon.echo(b"served")
    (listener,) = status(daemon)["listeners"]
    assert (listener["accepted"], listener["received"]) == (0, 0)
    assert [worker["answers"] for worker in status(daemon)["workers"]] == [False, False]
    assert daemon.stop() == 0


def test_spawner_and_a_broken_worker() -> None:
    """A worker with a defect ends with 1 and its traceback. A spawner that does not end is killed."""
    code = """
import select, signal, socket
from echod.workers import spawner
def fail(_): raise RuntimeError("broken")
def answer(parent):
    poll = select.poll(); poll.register(parent.sock, select.POLLIN); poll.poll()
    return parent.report()
with spawner.Spawner.start(fail) as parent:
    one, other = socket.socketpair()
    parent.fork(3, other)
    print(answer(parent).kind, answer(parent).value)
spawner._PATIENCE = 0.01
def hang(*_): signal.pause()
spawner._obey = hang
with spawner.Spawner.start(fail) as parent:
    pass
print("killed")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "forked 256\nkilled\n"
    assert "RuntimeError: broken" in done.stderr
    assert done.returncode == 0


def test_workers_that_end_early(start: Start, tmp_path: Path) -> None:
    """A worker that ends before it accepts, or before it has checked settings, is replaced by one with the new settings."""
    file = tmp_path / "echo.toml"
    table = '[listeners.a]\naddress = "127.0.0.1:0"\nmode = "{}"\n'
    file.write_text(table.format("stream"))
    defect = f"""
import os, time
from echod.workers.worker import Worker
prepare, run = Worker._prepare, Worker.run
def is_first(what):
    try:
        os.mkdir(f"{tmp_path}/{{what}}")
    except FileExistsError:
        return False
    return True
def prepare_once(self, loaded):
    if self._number:
        time.sleep(2)  # the other worker is replaced meanwhile
    elif is_first("prepare"):
        os._exit(3)
    return prepare(self, loaded)
async def run_once(self, sock):
    if is_first("run"):
        os._exit(4)
    return await run(self, sock)
Worker._prepare, Worker.run = prepare_once, run_once
"""
    code = f"{defect}\nfrom echod.cli import main\nmain()"
    daemon = start("--workers", "2", "--config", str(file), module=("-c", code), listen=None)
    assert daemon.wait_for("worker_failed")["code"] == 4
    file.write_text(table.format("info"))
    daemon.send_signal(signal.SIGHUP)
    assert daemon.wait_for("worker_failed", code=3)["worker"] == 0
    daemon.wait_for("reloaded")
    daemon.wait_for("worker_ready", count=3)
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("reloaded", count=2)
    for _ in range(10):
        with daemon.connect() as client:
            assert receive(client, 1) == b"{"
    assert daemon.stop() == 0


def test_worker_that_refuses_settings(start: Start) -> None:
    """If a worker cannot use other settings, the reload fails as a whole."""
    defect = """
from echod.settings.problems import Problem, SettingsError
from echod.workers import worker
acquire, calls = worker.acquire, []
def refuse(*args, **options):
    calls.append(1)
    if len(calls) > 1:
        raise SettingsError([Problem("echo.toml:1", "loop", "refused")])
    return acquire(*args, **options)
worker.acquire = refuse
"""
    daemon = start_with(start, defect)
    daemon.send_signal(signal.SIGHUP)
    assert daemon.wait_for("reload_failed")["problems"] == ["echo.toml:1: loop: refused"]
    daemon.echo(b"served")
    assert daemon.stop() == 0


def test_spawner_lost_during_the_start(start: Start) -> None:
    """A spawner that ends at its first order ends the daemon."""
    defect = """
import os
calls, fork = [], os.fork
def end():
    calls.append(1)
    return fork() if len(calls) == 1 else os._exit(1)
os.fork = end
"""
    daemon = start_with(start, defect, read_log=False)
    events = [json.loads(line)["event"] for line in daemon.log_pipe]
    assert daemon.process.wait(PATIENCE) == 1
    assert events == ["started", "spawner_lost", "draining", "drained", "stopped"]


def test_parent_lost_in_a_drain(start: Start) -> None:
    """Workers whose parent is killed in a drain finish the drain."""
    daemon = start_with(start, "")
    processes = list(pids(daemon).values())
    with daemon.connect() as client:
        client.sendall(b"before")
        assert receive(client, 6) == b"before"
        daemon.send_signal()
        daemon.wait_for("draining")
        until(lambda: not daemon.listens())
        daemon.send_signal(signal.SIGKILL)
        client.sendall(b"after")
        assert receive(client, 5) == b"after"
    until(lambda: not any(map(is_alive, processes)))
    daemon.wait()
    assert daemon.wait_for("client_closed")["received"] == 11
    assert daemon.all("parent_lost") == []


def test_connection_that_cannot_become_a_client(start: Start) -> None:
    """A connection that fails at once takes no room away from others."""
    defect = """
from echod.server.server import Server
new, calls = Server._new_session, []
def fail_once(self, client, sock):
    calls.append(1)
    if len(calls) == 1:
        raise RuntimeError("broken")
    return new(self, client, sock)
Server._new_session = fail_once
"""
    daemon = start_with(start, defect, "--limits.max-connections", "1")
    echoed = 0
    while not echoed:
        with daemon.connect() as client:
            client.sendall(b"x")
            try:
                echoed = len(receive(client, 1))
            except ConnectionResetError:
                continue
    daemon.wait_for("accept_failed")
    assert daemon.stop() == 0
