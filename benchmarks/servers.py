"""List the servers of the benchmark, with the commands that build and start them.

Each server listens on 127.0.0.1 and runs on one thread. If it has the options, TCP_NODELAY is on, the backlog is
4096, and a read takes 64 KiB or more. The sources are in peers/.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = Path(__file__).parent / "peers"

CRATES = Path("/usr/share/cargo/registry")
"""The folder of Debian's packages of Rust libraries."""

Serve = Callable[[Path, int, Path | None], list[str]]


class Missing(Exception):  # noqa: N818  (a state, not an error)
    """A server cannot be built or started here. The text gives the reason."""


class Peer(NamedTuple):
    """A server to measure."""

    name: str
    about: str
    """Language, library and approach in one line."""
    serious: bool
    """Whether it is meant for services with many clients."""
    tls: bool
    """Whether it supports TLS 1.3."""
    serve: Serve
    """Implements `command`: takes `build`, `port` and `certificate`."""
    versions: Callable[[], str]
    """Implements `version`."""


def command(peer: Peer, build: Path, port: int, certificate: Path | None) -> list[str]:
    """Build a server if necessary, and return the command that runs it until SIGTERM.

    Some servers fork for each client. The caller must kill those processes.

    Args:
        peer: The server.
        build: Folder for built programs and configuration.
        port: Port on 127.0.0.1.
        certificate: PEM file with a key and its certificate chain, or None for no TLS.

    Raises:
        Missing: A tool, library or header is not installed.
        ValueError: The server has no TLS.

    """
    if certificate is not None and not peer.tls:
        message = f"{peer.name} has no TLS"
        raise ValueError(message)
    build.mkdir(parents=True, exist_ok=True)
    return peer.serve(build.resolve(), port, certificate and certificate.resolve())


def version(peer: Peer) -> str:
    """Return the versions of the server and its libraries.

    Raises:
        Missing: The server or a tool is not installed.

    """
    return peer.versions()


def _arguments(*parts: str | Path | int | None) -> list[str]:
    return [str(part) for part in parts if part is not None]


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        message = f"{name} is not installed, or not in PATH"
        raise Missing(message)
    return path


@cache
def _number(*arguments: str) -> str:
    """Return the first version number in the output of a command."""
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    return found[0] if found else "(unknown version)"


def _make(target: Path, sources: list[Path], arguments: list[str], **options: Any) -> None:
    """Run a compiler, unless the target is newer than its sources.

    Raises:
        Missing: The compiler failed. The text names the missing header, or repeats the last line of output.

    """
    if target.exists() and all(source.stat().st_mtime < target.stat().st_mtime for source in sources):
        return
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    if done.returncode:
        header = re.search(r"fatal error: (\S+): No such file", done.stdout)
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        last = lines[-1] if lines else f"{arguments[0]} ended with {done.returncode}"
        raise Missing(f"{header[1]} is not found" if header else last)


# Python.


def _need(package: str) -> None:
    if util.find_spec(package) is None:
        message = f"the Python package {package} is not installed"
        raise Missing(message)


# Names on the package index, if they are not those of the package.
_DISTRIBUTIONS = {"echod": "echod-server"}


def _python_versions(*packages: str) -> str:
    for package in packages:
        _need(package)
    interpreter = f"{platform.python_implementation()} {platform.python_version()}"
    found = {package: metadata.version(_DISTRIBUTIONS.get(package, package)) for package in packages}
    return ", ".join([*(f"{package} {number}" for package, number in found.items()), interpreter])


def _serve_echod(settings: str, build: Path, port: int, certificate: Path | None) -> list[str]:
    config, ledger = build / f"echod-{port}.toml", build / f"echod-{port}.log"
    text = f'{settings}file = "{ledger}"\n[listeners.echo]\naddress = "127.0.0.1:{port}"\n'
    if certificate is not None:
        text += f'[listeners.echo.tls]\ncertificate = "{certificate}"\nprivate_key = "{certificate}"\n'
        text += 'minimum_version = "1.3"\n'
    config.write_text(text)
    return _arguments(sys.executable, "-m", "echod", "--config", config)


def _echod(name: str, about: str, settings: str, *packages: str) -> Peer:
    return Peer(
        name,
        f"Python, {about}",
        serious=True,
        tls=True,
        serve=partial(_serve_echod, settings),
        versions=partial(_python_versions, "echod", *packages),
    )


def _serve_python(
    package: str | None, script: str, options: tuple[str, ...], _: Path, port: int, certificate: Path | None
) -> list[str]:
    if package is not None:
        _need(package)
    return _arguments(sys.executable, SOURCES / script, port, *options, certificate)


def _loop(loop: str, way: str, about: str) -> Peer:
    packages = ("uvloop",) if loop == "uvloop" else ()
    return Peer(
        f"{loop} {way}",
        f"Python, {loop}; {about}",
        serious=True,
        tls=way == "protocol",
        serve=partial(_serve_python, loop, "loops.py", (loop, way.removesuffix("_*"))),
        versions=partial(_python_versions, *packages),
    )


def _framework(name: str, about: str) -> Peer:
    package = name.lower()
    return Peer(
        name,
        f"Python, {name}; {about}",
        serious=True,
        tls=False,
        serve=partial(_serve_python, package, f"{package}_echo.py", ()),
        versions=partial(_python_versions, package),
    )


# Go.


def _serve_go(way: str, build: Path, port: int, certificate: Path | None) -> list[str]:
    source, target = SOURCES / "echo.go", build / "go"
    offline = {"GOCACHE": str(build / "go-cache"), "GOPROXY": "off", "GOTOOLCHAIN": "local", "GOFLAGS": ""}
    _make(target, [source], _arguments(_tool("go"), "build", "-o", target, source), env=os.environ | offline)
    return _arguments(target, port, way, certificate)


def _go_versions() -> str:
    return f"Go {_number(_tool('go'), 'version')}"


# Rust.


def _rust() -> tuple[str, str]:
    """Return the first cargo that runs, and its rustc. rustup's proxies fail if no toolchain is installed."""
    for folder in os.get_exec_path():
        cargo, rustc = (shutil.which(name, path=folder) for name in ("cargo", "rustc"))
        if cargo is not None and rustc is not None and _runs(cargo) and _runs(rustc):
            return cargo, rustc
    message = "cargo and rustc are not installed, or not in PATH"
    raise Missing(message)


@cache
def _runs(tool: str) -> bool:
    return subprocess.run([tool, "--version"], capture_output=True, check=False).returncode == 0


def _crate() -> Path:
    found = max(CRATES.glob("tokio-[0-9]*"), default=None)
    if found is None:
        message = f"tokio is not found in {CRATES}: install Debian's librust-tokio-dev"
        raise Missing(message)
    return found


def _serve_tokio(build: Path, port: int, _: Path | None) -> list[str]:
    cargo, rustc = _rust()
    _crate()
    files = [Path("Cargo.toml"), Path("src") / "main.rs"]
    folder = build / "tokio"
    target = folder / "target" / "release" / "echo"
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(SOURCES / "tokio" / file, folder / file)
    (folder / "Cargo.lock").unlink(missing_ok=True)  # cargo may not read the lock file of another version
    (folder / ".cargo").mkdir(exist_ok=True)
    (folder / ".cargo" / "config.toml").write_text(
        f'[source.crates-io]\nreplace-with = "debian"\n[source.debian]\ndirectory = "{CRATES}"\n'
    )
    _make(
        target,
        [folder / file for file in files],
        _arguments(cargo, "build", "--release", "--offline", "--quiet", "--target-dir", folder / "target"),
        cwd=folder,
        env=os.environ | {"RUSTC": rustc},
    )
    return _arguments(target, port)


def _tokio_versions() -> str:
    _, rustc = _rust()
    return f"{_crate().name.replace('-', ' ')}, rustc {_number(rustc, '--version')}"


# C.


def _serve_c(name: str, libraries: tuple[str, ...], build: Path, port: int, _: Path | None) -> list[str]:
    source, target = SOURCES / f"{name}.c", build / name
    links = [f"-l{library}" for library in libraries]
    arguments = _arguments(_tool("gcc"), "-O2", "-Wall", "-Wextra", "-o", target, source, *links)
    _make(target, [source, SOURCES / "listener.h"], arguments)
    return _arguments(target, port)


def _serve_uring(build: Path, port: int, certificate: Path | None) -> list[str]:
    arguments = _serve_c("uring", ("uring",), build, port, certificate)
    tried = subprocess.run(arguments[:1], stderr=subprocess.PIPE, text=True, check=False)
    if tried.returncode:
        message = f"the kernel does not support it: {tried.stderr.strip()}"
        raise Missing(message)
    return arguments


def _c_versions(*libraries: str) -> str:
    parts = [f"gcc {_number(_tool('gcc'), '-dumpfullversion')}", f"Linux {platform.release()}"]
    if shutil.which("pkg-config"):
        parts[:0] = [f"{name} {_number('pkg-config', '--modversion', name)}" for name in libraries]
    return ", ".join(parts)


# Command-line tools.


def _serve_socat(_: Path, port: int, certificate: Path | None) -> list[str]:
    kind = "TCP-LISTEN" if certificate is None else "OPENSSL-LISTEN"
    address = f"{kind}:{port},bind=127.0.0.1,fork,reuseaddr,backlog=4096,nodelay"
    if certificate is not None:
        address += f",cert={certificate},key={certificate},verify=0,openssl-min-proto-version=TLS1.3"
    # socat never reads from PIPE again once a slow client has filled it, so use EXEC. Without -t, socat drops the rest of
    # the echo half a second after the client's EOF.
    return _arguments(_tool("socat"), "-b", 65536, "-t", 60, address, "EXEC:cat")


def _serve_ncat(_: Path, port: int, certificate: Path | None) -> list[str]:
    tls = () if certificate is None else ("--ssl", "--ssl-cert", certificate, "--ssl-key", certificate)
    return _arguments(_tool("ncat"), "-l", "-k", "-m", 10000, "-e", _tool("cat"), *tls, "127.0.0.1", port)


_XINETD = """\
defaults
{
    instances = UNLIMITED
    per_source = UNLIMITED
    cps = 0 0
}
service echo
{
    type = INTERNAL UNLISTED
    socket_type = stream
    protocol = tcp
    wait = no
    bind = 127.0.0.1
    port = %d
}
"""


def _serve_xinetd(build: Path, port: int, _: Path | None) -> list[str]:
    config, log, pid = (build / f"xinetd-{port}.{ending}" for ending in ("conf", "log", "pid"))
    config.write_text(_XINETD % port)
    return _arguments(_tool("xinetd"), "-dontfork", "-f", config, "-filelog", log, "-pidfile", pid)


def _tool_versions(name: str, *options: str) -> str:
    return f"{name} {_number(_tool(name), *options)}"


_WAYS = {
    "protocol": "a protocol, data_received and transport.write",
    "sock_*": "a task per client, loop.sock_recv and loop.sock_sendall",
    "streams": "a task per client, StreamReader and StreamWriter",
}

PEERS = (
    _echod("echod", "uvloop; default settings, a log line per connection in a file", "[log]\n", "uvloop"),
    _echod("echod, no ledger", 'uvloop; log.connections = "none"', '[log]\nconnections = "none"\n', "uvloop"),
    _echod("echod, asyncio", 'asyncio; loop = "asyncio", otherwise as echod', 'loop = "asyncio"\n[log]\n'),
    *(_loop(loop, way, about) for loop in ("uvloop", "asyncio") for way, about in _WAYS.items()),
    _framework("Twisted", "a protocol, dataReceived and transport.write"),
    _framework("Trio", "a task per client, receive_some and send_all"),
    _framework("gevent", "a greenlet per client, recv and sendall"),
    Peer(
        "Go",
        "Go, net; a goroutine per client, Read and Write",
        serious=True,
        tls=True,
        serve=partial(_serve_go, "loop"),
        versions=_go_versions,
    ),
    Peer(
        "Go, io.Copy",
        "Go, net; a goroutine per client, io.Copy, which uses splice(2)",
        serious=True,
        tls=False,
        serve=partial(_serve_go, "copy"),
        versions=_go_versions,
    ),
    Peer(
        "tokio",
        "Rust, tokio on one thread; a task per client, read and write_all",
        serious=True,
        tls=False,
        serve=_serve_tokio,
        versions=_tokio_versions,
    ),
    Peer(
        "libuv",
        "C, libuv; uv_try_write from the read callback",
        serious=True,
        tls=False,
        serve=partial(_serve_c, "libuv", ("uv",)),
        versions=partial(_c_versions, "libuv"),
    ),
    Peer(
        "epoll",
        "C, no library; epoll_wait, one recv and one send per ready client",
        serious=True,
        tls=False,
        serve=partial(_serve_c, "epoll", ()),
        versions=_c_versions,
    ),
    Peer(
        "io_uring",
        "C, liburing; multishot accept and recv, provided buffers",
        serious=True,
        tls=False,
        serve=_serve_uring,
        versions=partial(_c_versions, "liburing"),
    ),
    Peer(
        "socat",
        "a process and a cat per client",
        serious=False,
        tls=True,
        serve=_serve_socat,
        versions=partial(_tool_versions, "socat", "-V"),
    ),
    Peer(
        "ncat",
        "a process and a cat per client",
        serious=False,
        tls=True,
        serve=_serve_ncat,
        versions=partial(_tool_versions, "ncat", "--version"),
    ),
    Peer(
        "xinetd",
        "its internal echo, a process per client",
        serious=False,
        tls=False,
        serve=_serve_xinetd,
        versions=partial(_tool_versions, "xinetd", "-version"),
    ),
)
"""All servers, in the order of the page."""
