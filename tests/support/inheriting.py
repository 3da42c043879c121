"""Daemons that inherit sockets, as from systemd."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

from harness import PATIENCE, Daemon, clean_environment

if TYPE_CHECKING:
    import socket

# Passes descriptors on as in sd_listen_fds(3), and executes the daemon.
HAND_OVER = """
import os, sys
names, descriptors, arguments = sys.argv[1], [int(text) for text in sys.argv[2].split(",")], sys.argv[3:]
high = [os.dup2(descriptor, 200 + place) for place, descriptor in enumerate(descriptors)]
for place, descriptor in enumerate(high):
    os.dup2(descriptor, 3 + place)
    os.close(descriptor)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = str(len(descriptors))
if names:
    os.environ["LISTEN_FDNAMES"] = names
os.execv(sys.executable, [sys.executable, "-m", "echod", *arguments])
"""


def module(sockets: list[Any], names: str) -> tuple[str, ...]:
    """Return the interpreter's arguments for a daemon that inherits these sockets."""
    return ("-c", HAND_OVER, names, ",".join(str(sock.fileno()) for sock in sockets))


def hand_over(sockets: list[socket.socket], names: str, *arguments: str, loop_name: str) -> Daemon:
    """Start a daemon that inherits sockets."""
    descriptors = [sock.fileno() for sock in sockets]
    options = ("--loop", loop_name, *arguments)
    return Daemon(*options, module=module(sockets, names), listen=None, pass_fds=descriptors)


def refusal(sockets: list[Any], names: str, *arguments: str, code: int = 69) -> list[str]:
    """Return the lines of a command that refuses its inherited sockets with an exit code."""
    result = subprocess.run(
        [sys.executable, *module(sockets, names), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=clean_environment(),
        pass_fds=[sock.fileno() for sock in sockets],
    )
    assert result.returncode == code
    return result.stderr.splitlines()
