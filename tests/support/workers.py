"""Daemons with several workers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from harness import Daemon, until

if TYPE_CHECKING:
    import socket


def pids(daemon: Daemon) -> dict[int, int]:
    """Return the process of each worker by its number, as the log tells it."""
    return {event["worker"]: event["pid"] for event in daemon.all("worker_ready")}


def spawner(daemon: Daemon) -> int:
    """Return the process of the spawner."""
    return int(parent(next(iter(pids(daemon).values()))))


def parent(pid: int) -> str:
    """Return the parent of a process."""
    return _fields(pid)[1]


def is_alive(pid: int) -> bool:
    """Tell whether a process exists and has not ended."""
    try:
        return _fields(pid)[0] not in {"Z", "X"}
    except OSError:
        return False


def freeze(pid: int) -> None:
    """Send SIGSTOP, and wait until the process has stopped."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: _fields(pid)[0] == "T")


def inheriting(sock: socket.socket, *arguments: str) -> Daemon:
    """Return a daemon that inherits a listening socket as descriptor 3."""
    code = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); "
        "os.execv(sys.executable, [sys.executable, '-m', 'echod', *sys.argv[2:]])"
    )
    module = ("-c", code, str(sock.fileno()))
    return Daemon(*arguments, module=module, listen=None, pass_fds=[sock.fileno()])


def _fields(pid: int) -> list[str]:
    """Return the fields of a process from its state on, as in proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
