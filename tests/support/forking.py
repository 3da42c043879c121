"""Run the command in a fork instead of a new interpreter. `fork_server.py` forks."""

from __future__ import annotations

import array
import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SCRIPT = Path(__file__).with_name("fork_server.py")


class ForkServer:
    """The process that forks commands. It ends with this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Only the children are measured. Other processes measure the imports.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", SCRIPT, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment
            )
        atexit.register(self._close)

    def ask(self, request: Mapping[str, Any], descriptors: Sequence[int] = ()) -> int:
        """Send a request, and return the answer."""
        attached = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        with self._lock:
            self._control.sendmsg([json.dumps(request).encode()], attached)
            answer = self._control.recv(32)
        assert answer, "the fork server has ended"
        return int(answer)

    def _close(self) -> None:
        self._control.close()
        self._process.wait()


@functools.cache
def fork_server() -> ForkServer:
    """Return the fork server of this process, which is started on first use."""
    return ForkServer()


class ForkedProcess:
    """A forked command, with the methods of `subprocess.Popen` that tests use.

    Args:
        arguments: arguments of the command.
        env: all environment variables.
        output: the descriptors of its standard output and standard error.
        pass_fds: descriptors that it inherits.

    """

    def __init__(
        self, arguments: Sequence[str], env: Mapping[str, str], output: tuple[int, int], pass_fds: Sequence[int] = ()
    ) -> None:
        request = {
            "arguments": arguments,
            "environment": env,
            "directory": str(Path.cwd()),
            "descriptors": [0, 1, 2, *pass_fds],
        }
        self.pid = fork_server().ask(request, [0, *output, *pass_fds])
        self.returncode: int | None = None
        self._pidfd = os.pidfd_open(self.pid)
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Return the exit code, or None if the process is running."""
        return self._reap(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process has exited, and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it has not exited after `timeout` seconds.

        """
        if (code := self._reap(timeout)) is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has exited."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _reap(self, timeout: float | None) -> int | None:
        with self._lock:
            if self.returncode is None:
                waiting = select.poll()  # a pidfd is readable once its process has exited
                waiting.register(self._pidfd, select.POLLIN)
                if waiting.poll(None if timeout is None else timeout * 1000):
                    self.returncode = fork_server().ask({"reap": self.pid})
                    os.close(self._pidfd)
            return self.returncode


def run(arguments: Sequence[str], env: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run the command in a fork, and wait until it exits.

    Raises:
        subprocess.TimeoutExpired: it has not exited after `timeout` seconds. It is killed.

    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = ForkedProcess(arguments, env, (output.fileno(), errors.fileno()))
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, code, output.read(), errors.read())
