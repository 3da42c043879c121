"""Run real systemd in a container with its own network, by debootstrap and systemd-nspawn."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import debian
from harness import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from types import TracebackType

    from harness import Event

Result = TypeVar("Result")

SOURCE = Path(__file__).parents[2]

# Names the folder in which the root file system and the wheels are cached.
CACHE_VARIABLE = "SYSTEMD_TEST_CACHE"

_PACKAGES = "systemd,systemd-sysv,dbus,procps,python3,python3-venv"
_TOOLS = ("debootstrap", "systemd-nspawn", "nsenter", "setpriv")
_CLONE_NEWNET = 0x40000000


def why_not() -> str | None:
    """Return why the container cannot be started, or None if it can."""
    return debian.why_not(*_TOOLS)


class Container:
    """A running container with systemd. Changes to its root file system are discarded.

    The project's source is mounted read-only at /src, and the wheels of its dependencies at /wheels.
    """

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        # The lock of the cache allows only one container at a time.
        cache = self._held.enter_context(debian.cache(CACHE_VARIABLE, "echod-systemd-test"))
        root, wheels = debian.system(cache / "root", _PACKAGES), _wheels(cache)
        self._network: ThreadPoolExecutor | None = None
        self._output = self._held.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  (entered by the stack)
        self._nspawn = subprocess.Popen(
            [
                # The container ends even if this process is killed.
                *("setpriv", "--pdeathsig=KILL"),
                *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network"),
                *(f"--directory={root}", "--volatile=overlay", "--console=pipe"),
                *(f"--bind-ro={SOURCE}:/src", f"--bind-ro={wheels}:/wheels"),
                *("--boot", "systemd.unit=multi-user.target"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        try:
            wait(self._is_up)
            self._network = ThreadPoolExecutor(64, "network", self._enter_network)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                sys.stderr.write(self.run("journalctl", "--no-pager", "-n", "60", check=False).stdout)
        finally:
            self.close()

    def close(self) -> None:
        """Stop the container."""
        # When init dies, the kernel kills all other processes, and systemd-nspawn removes the mounts.
        for child in self._children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            self._nspawn.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait()
        if self._network is not None:
            self._network.shutdown(cancel_futures=True)
        self._held.close()

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the container."""
        done = subprocess.run(
            ["nsenter", f"--target={self._init}", "--all", "--wdns=/src", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=debian.LONG,
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        )
        if check:
            assert done.returncode == 0, f"{command} in the container: {done.stdout}{done.stderr}"
        return done

    def shell(self, script: str) -> None:
        """Run a shell script in the container until a command fails. pip installs from /wheels only."""
        self.run("env", "PIP_NO_INDEX=1", "PIP_FIND_LINKS=/wheels", "sh", "-euc", script)

    def write(self, path: str, text: str) -> None:
        """Write a file in the container, and create its folders."""
        self.run("sh", "-euc", 'mkdir -p "$(dirname "$1")"; printf %s "$2" >"$1"', "sh", path, text)

    def property(self, name: str, unit: str = "echod.service") -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", f"--property={name}", "--value", unit).stdout.strip()

    def journal(self, *matches: str) -> list[dict[str, str]]:
        """Return the journal's entries of the service, and of systemd about it."""
        output = self.run("journalctl", "--unit=echod", "--output=json", "--no-pager", *matches).stdout
        return [json.loads(line) for line in output.splitlines()]

    def events(self, name: str, *matches: str) -> list[Event]:
        """Return the daemon's events with this name in the journal."""
        lines = [entry["MESSAGE"] for entry in self.journal(*matches) if entry["MESSAGE"].startswith("{")]
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def connect(self, host: str = "127.0.0.1", port: int = 7) -> socket.socket:
        """Return a client connected in the container's network."""
        return self.spawn(lambda: socket.create_connection((host, port), PATIENCE)).result()

    def spawn(self, function: Callable[[], Result]) -> Future[Result]:
        """Call a function in a thread within the container's network."""
        assert self._network is not None
        return self._network.submit(function)

    def _is_up(self) -> bool:
        """Find the container's init, and return whether systemd has started.

        Before init, systemd-nspawn has another child process for a while.
        """
        assert self._nspawn.poll() is None, self._nspawn_output()
        for child in self._children():
            self._init = child
            state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
            if state in {"running", "degraded"}:
                return True
        return False

    def _children(self) -> list[int]:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text()
            return [int(pid) for pid in children.split()]
        return []

    def _nspawn_output(self) -> str:
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def _enter_network(self) -> None:
        with Path(f"/proc/{self._init}/ns/net").open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")


def wait(find: Callable[[], Result]) -> Result:
    """Poll until `find` returns a true value, and return it. `find` runs a command, as a container sends no events."""
    deadline = time.monotonic() + PATIENCE
    while not (found := find()):
        assert time.monotonic() < deadline, f"nothing was found within {PATIENCE} s"
        time.sleep(0.05)
    return found


def _wheels(cache: Path) -> Path:
    """Download missing wheels of the project's dependencies for the container's Python. Return their folder."""
    folder = cache / "wheels"
    version = (cache / "root/usr/bin/python3").readlink().name.removeprefix("python")
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())
    requirements = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    fetch += ["--only-binary=:all:", f"--python-version={version}", f"--dest={folder}", f"--find-links={folder}"]
    folder.mkdir(exist_ok=True)
    if subprocess.run([*fetch, "--no-index", *requirements], capture_output=True).returncode:
        done = subprocess.run([*fetch, *requirements], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder
