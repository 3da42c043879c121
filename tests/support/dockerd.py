"""Run a separate dockerd with a base image from debootstrap, without a registry."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import debian
from harness import until

if TYPE_CHECKING:
    from types import TracebackType

    from harness import Event

SOURCE = Path(__file__).parents[2]

# Names the folder in which the base image is cached.
CACHE_VARIABLE = "DOCKER_TEST_CACHE"

BASE_IMAGE = "local/python:3"

_TOOLS = ("containerd", "debootstrap", "docker", "dockerd", "runc", "umount")
_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
_AUTHORITIES = Path("etc/ssl/certs/ca-certificates.crt")


def why_not() -> str | None:
    """Return why dockerd cannot be started, or None if it can."""
    return debian.why_not(*_TOOLS)


class Engine:
    """A running dockerd with the base image, in which only the host's network is available.

    `close` removes all of its containers, processes, mounts and files.
    """

    def __init__(self) -> None:
        # A short path, because the folder contains a socket, and the length of its path is limited.
        self._folder = Path(tempfile.mkdtemp(prefix="echod-docker-"))
        host = f"unix://{self._folder}/socket"
        # Every version of docker has the legacy builder.
        self._env = os.environ | {"DOCKER_HOST": host, "DOCKER_BUILDKIT": "0", "DOCKER_CONFIG": str(self._folder)}
        self._log = (self._folder / "log").open("wb")
        self._daemon = subprocess.Popen(
            [
                *("dockerd", f"--host={host}", f"--pidfile={self._folder}/pid"),
                *(f"--data-root={self._folder}/data", f"--exec-root={self._folder}/exec"),
                *("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        try:
            until(self._is_up)
            self._import_base()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop dockerd and its containers, and remove its files."""
        if self._daemon.poll() is None:
            if names := self.docker("ps", "--all", "--quiet", check=False).stdout.split():
                self.docker("rm", "--force", *names, check=False)
            self._daemon.send_signal(signal.SIGTERM)
            try:
                self._daemon.wait(30)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
        self._log.close()
        # Nested mounts come first.
        for mount in reversed(self._mounts()):
            subprocess.run(["umount", mount], check=True)
        shutil.rmtree(self._folder)

    def docker(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the docker client, and wait for it."""
        done = subprocess.run(
            ["docker", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=debian.LONG,
            env=self._env,
            cwd=SOURCE,
        )
        if check:
            assert done.returncode == 0, f"docker {arguments}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the docker client without waiting for it."""
        return subprocess.Popen(["docker", *arguments], stdout=subprocess.DEVNULL, env=self._env)

    def inspect(self, name: str) -> dict[str, Any]:
        """Return the data of an image or a container."""
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", name).stdout)
        return found[0]

    def _is_up(self) -> bool:
        assert self._daemon.poll() is None, (self._folder / "log").read_text()[-3000:]
        return self.docker("version", check=False).returncode == 0

    def _mounts(self) -> list[str]:
        places = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        return [place for place in places if place.startswith(f"{self._folder}/")]

    def _import_base(self) -> None:
        with _base().open("rb") as tree:
            # This machine may trust more certificate authorities than Debian does, and pip uses its own list by default.
            command = ["docker", "import", "--change", f"ENV PIP_CERT=/{_AUTHORITIES}", "-", BASE_IMAGE]
            subprocess.run(command, stdin=tree, check=True, capture_output=True, timeout=debian.LONG, env=self._env)


class Container:
    """A container of the image under test, with all supported restrictions.

    Args:
        engine: the dockerd to run it.
        name: the name of the container.
        options: options of `docker run`.
        arguments: arguments of echod.

    """

    def __init__(self, engine: Engine, name: str, *options: str, arguments: tuple[str, ...] = ()) -> None:
        self._engine = engine
        self.name = name
        engine.docker(
            *("run", "--detach", f"--name={name}", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
            *(*options, "echod", *arguments),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            sys.stderr.write(self.log())
        self._engine.docker("rm", "--force", self.name)

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self._engine.inspect(self.name)["State"]
        return found

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the container."""
        return self._engine.docker("exec", self.name, *command, check=check)

    def log(self) -> str:
        """Return the log so far."""
        return self._engine.docker("logs", self.name).stderr

    def events(self, name: str) -> list[Event]:
        """Return the events with this name so far."""
        found = []
        for line in self.log().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found += [event for event in [json.loads(line)] if event["event"] == name]
        return found

    def wait_for(self, name: str) -> Event:
        """Wait for the first event with this name."""
        until(lambda: bool(self.events(name)))
        return self.events(name)[0]


def _base() -> Path:
    with debian.cache(CACHE_VARIABLE, "echod-docker-test") as folder:
        return debian.system(folder / "bookworm.tar", _PACKAGES, _pack)


def _pack(root: Path) -> Path:
    if Path("/", _AUTHORITIES).exists():
        shutil.copy(Path("/", _AUTHORITIES), root / _AUTHORITIES)
    packed = root.with_suffix(".tar")
    subprocess.run(["tar", "-C", str(root), "-cf", str(packed), "."], check=True)
    return packed
