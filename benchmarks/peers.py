"""The servers that echod is measured against: which there are, how each is built, how each is started.

Each serves on 127.0.0.1 on one thread, sets TCP_NODELAY, has a backlog of 4096 where that can be set, and reads 64 KiB at
a time or more. The sources are in peers/.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

SOURCES = Path(__file__).parent / "peers"


class Missing(Exception):  # noqa: N818  (a state, not a mistake)
    """A server cannot be built or started here; the text says why."""


class Peer(NamedTuple):
    """A server."""

    name: str
    about: str
    """Language, library and approach, in a line."""
    serious: bool
    """Whether somebody would build a service on it."""
    tls: bool
    """Whether it serves over TLS 1.3 too."""
    serve: Callable[[Path, int, Path | None], list[str]]
    """Takes what `command` takes, and returns that."""
    versions: Callable[[], str]
    """Returns what `version` returns."""


def command(peer: Peer, build: Path, port: int, certificate: Path | None) -> list[str]:
    """Return the command that serves until a signal; what is not built yet is built.

    Args:
        peer: the server.
        build: folder for what is built, and for configuration.
        port: where it serves, on 127.0.0.1.
        certificate: file with the key, the certificate and the ones between it and its authority, PEM. None: no TLS.

    Raises:
        Missing: something that it needs is not here.
        ValueError: it has no TLS.

    """
    if certificate is not None and not peer.tls:
        message = f"{peer.name} has no TLS"
        raise ValueError(message)
    build.mkdir(parents=True, exist_ok=True)
    return peer.serve(build, port, certificate)


def version(peer: Peer) -> str:
    """Return the versions of what `command` starts.

    Raises:
        Missing: it is not here.

    """
    return peer.versions()


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        message = f"{name} is not installed"
        raise Missing(message)
    return path


@cache
def _first_line(*arguments: str) -> str:
    """Return the first line that a tool writes, wherever it writes it to."""
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return next(iter(done.stdout.splitlines()), "")


def _number(text: str) -> str:
    """Return what looks like a version in a line."""
    found = re.search(r"\d+(\.\d+)+", text)
    return found[0] if found else text


def _make(arguments: list[str], target: Path, *sources: Path, env: dict[str, str] | None = None) -> None:
    """Run a compiler, unless the target is newer than its sources.

    Raises:
        Missing: it failed, with the header that is not there, or the last line it wrote.

    """
    if target.exists() and all(source.stat().st_mtime < target.stat().st_mtime for source in sources):
        return
    done = subprocess.run(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=os.environ | (env or {}),
    )
    if done.returncode:
        header = re.search(r"fatal error: (\S+): No such file", done.stdout)
        lines = done.stdout.split("\n") if done.stdout else [f"exit code {done.returncode}"]
        raise Missing(f"{header[1]} is not found" if header else [line for line in lines if line.strip()][-1].strip())


def _options(*parts: str | Path | int | None) -> list[str]:
    return [str(part) for part in parts if part is not None]


# echod.


def _echod(settings: str) -> Callable[[Path, int, Path | None], list[str]]:
    def serve(build: Path, port: int, certificate: Path | None) -> list[str]:
        if certificate is None:
            listening = f'[listeners.echo]\naddress = "127.0.0.1:{port}"\n'
        else:
            listening = (
                f'[listeners.echo]\naddress = "127.0.0.1:{port}"\n[listeners.echo.tls]\ncertificate = "{certificate}"\n'
                f'private_key = "{certificate}"\nminimum_version = "1.3"\n'
            )
        config = build / f"echod-{port}.toml"
        ledger = build / f"echod-{port}.log"
        config.write_text(settings.replace("LEDGER", str(ledger)) + listening)
        return [sys.executable, "-m", "echod", "--config", str(config)]

    return serve


def _echod_versions(loop: str) -> Callable[[], str]:
    return lambda: f"echod {metadata.version('echod')}, {_python(*loop.split())()}"


# Python.


def _python(*packages: str) -> Callable[[], str]:
    def versions() -> str:
        interpreter = f"{platform.python_implementation()} {platform.python_version()}"
        for package in packages:
            _package(package)
        return ", ".join([*(f"{package} {metadata.version(package)}" for package in packages), interpreter])

    return versions


def _package(name: str) -> None:
    if util.find_spec(name) is None:
        message = f"the Python package {name} is not installed"
        raise Missing(message)


def _script(file: str, *arguments: str, needs: str | None = None) -> Callable[[Path, int, Path | None], list[str]]:
    def serve(_: Path, port: int, certificate: Path | None) -> list[str]:
        if needs is not None:
            _package(needs)
        return _options(sys.executable, SOURCES / file, port, *arguments, certificate)

    return serve


def _loop(loop: str, way: str) -> Peer:
    about = {
        "protocol": "a protocol class",
        "sock_*": "one task for each client, loop.sock_recv and loop.sock_sendall",
        "streams": "one task for each client, StreamReader and StreamWriter",
    }
    return Peer(
        f"{loop} {way}",
        f"Python, {loop}, {about[way]}",
        serious=True,
        tls=way == "protocol",
        serve=_script("loops.py", loop, way.removesuffix("_*"), needs=loop),
        versions=_python("uvloop") if loop == "uvloop" else _python(),
    )


# C.


def _c(name: str, *libraries: str) -> Callable[[Path, int, Path | None], list[str]]:
    def serve(build: Path, port: int, _: Path | None) -> list[str]:
        source, target = SOURCES / f"{name}.c", build / name
        flags = ["-O2", "-Wall", "-Wextra"]
        links = [f"-l{library}" for library in libraries]
        _make([_tool("gcc"), *flags, "-o", str(target), str(source), *links], target, source, SOURCES / "listener.h")
        return _options(target, port)

    return serve


def _c_versions(*libraries: str) -> Callable[[], str]:
    def versions() -> str:
        compiler = f"gcc {_first_line(_tool('gcc'), '-dumpfullversion')}"
        found = [f"{name} {_first_line(_tool('pkg-config'), '--modversion', name)}" for name in libraries]
        return ", ".join([*found, compiler])

    return versions


# Go.


def _go(way: str) -> Callable[[Path, int, Path | None], list[str]]:
    def serve(build: Path, port: int, certificate: Path | None) -> list[str]:
        source, target = SOURCES / "echo.go", build / "go"
        offline = {"GOCACHE": str(build / "go-cache"), "GOPROXY": "off", "GOTOOLCHAIN": "local", "GOFLAGS": ""}
        _make([_tool("go"), "build", "-o", str(target), str(source)], target, source, env=offline)
        return _options(target, port, way, certificate)

    return serve


def _go_versions() -> str:
    return f"Go {_number(_first_line(_tool('go'), 'version'))}"


_LEDGER = '[log]\nfile = "LEDGER"\n'

PEERS = (
    Peer(
        "echod",
        "Python, uvloop; its defaults, a line for each connection in a file",
        serious=True,
        tls=True,
        serve=_echod(_LEDGER),
        versions=_echod_versions("uvloop"),
    ),
    Peer(
        "echod, no ledger",
        'Python, uvloop; log.connections = "none"',
        serious=True,
        tls=True,
        serve=_echod('[log]\nfile = "LEDGER"\nconnections = "none"\n'),
        versions=_echod_versions("uvloop"),
    ),
    Peer(
        "echod, asyncio",
        'Python, asyncio; loop = "asyncio", a line for each connection in a file',
        serious=True,
        tls=True,
        serve=_echod('loop = "asyncio"\n' + _LEDGER),
        versions=_echod_versions(""),
    ),
    *(_loop(loop, way) for loop in ("uvloop", "asyncio") for way in ("protocol", "sock_*", "streams")),
    Peer(
        "Go",
        "Go, net; one goroutine for each client, Read and Write of 64 KiB",
        serious=True,
        tls=True,
        serve=_go("loop"),
        versions=_go_versions,
    ),
    Peer(
        "Go, io.Copy",
        "Go, net; one goroutine for each client, io.Copy, which splices",
        serious=True,
        tls=False,
        serve=_go("copy"),
        versions=_go_versions,
    ),
    Peer(
        "epoll",
        "C, epoll; one recv and one send for each client that is ready",
        serious=True,
        tls=False,
        serve=_c("epoll"),
        versions=_c_versions(),
    ),
)
