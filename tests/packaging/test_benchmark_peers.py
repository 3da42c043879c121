"""Test that the servers of the benchmark can be built and echo, and that missing tools are named."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import servers
from harness import PATIENCE, free_port, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from certificates import Certificates
    from servers import Peer

pytestmark = pytest.mark.once

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DATA = os.urandom(1 << 20)
STEP = 16384
# With much data outstanding, ncat and cat wait for each other. ncat also drops the echo after a half-close.
SHAKY = {"ncat"}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the built servers."""
    return tmp_path_factory.mktemp("build")


@pytest.fixture
def pem(certificates: Certificates, tmp_path: Path) -> Path:
    """Return a file with the key and the certificate of the server."""
    file = tmp_path / "server.pem"
    file.write_bytes(certificates.key.read_bytes() + certificates.certificate.read_bytes())
    return file


@contextlib.contextmanager
def serving(peer: Peer, build: Path, certificate: Path | None) -> Iterator[socket.socket]:
    """Start a server and yield a connected client. At the end, kill the server's process group."""
    port = free_port()
    try:
        command = servers.command(peer, build, port, certificate)
        assert servers.version(peer)
    except servers.Missing as missing:
        pytest.skip(str(missing))
    client = socket.socket()
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
    try:

        def connected() -> bool:
            assert process.poll() is None, process.communicate()[1].decode()
            return client.connect_ex(("127.0.0.1", port)) == 0

        until(connected)
        client.settimeout(PATIENCE)
        with client:
            yield client
    finally:
        client.close()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def exchange(client: socket.socket) -> bytes:
    """Send all data and half-close, while receiving until EOF."""

    def send() -> None:
        client.sendall(DATA)
        client.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    received = bytearray()
    while data := client.recv(65536):
        received += data
    sender.join()
    return bytes(received)


def exchange_in_steps(client: socket.socket) -> bytes:
    """Send the data in steps, and receive each step before the next."""
    received = b""
    for begin in range(0, len(DATA), STEP):
        client.sendall(DATA[begin : begin + STEP])
        while len(received) < begin + STEP and (data := client.recv(65536)):
            received += data
    return received


@pytest.mark.parametrize("peer", servers.PEERS, ids=lambda peer: peer.name)
def test_all_data_is_echoed(peer: Peer, build: Path) -> None:
    """A server echoes a megabyte, and then sends EOF."""
    with serving(peer, build, None) as client:
        assert (exchange_in_steps if peer.name in SHAKY else exchange)(client) == DATA


@pytest.mark.parametrize("peer", [peer for peer in servers.PEERS if peer.tls], ids=lambda peer: peer.name)
def test_all_data_is_echoed_over_tls(peer: Peer, build: Path, pem: Path, certificates: Certificates) -> None:
    """A server echoes a megabyte over TLS 1.3."""
    with serving(peer, build, pem) as plain:
        client = certificates.context().wrap_socket(plain, server_hostname="localhost")
        with client:
            assert client.version() == "TLSv1.3"
            assert exchange_in_steps(client) == DATA  # an SSLSocket cannot send and receive at the same time


@pytest.mark.parametrize("peer", [peer for peer in servers.PEERS if peer.tls], ids=lambda peer: peer.name)
def test_older_tls_is_refused(peer: Peer, build: Path, pem: Path, certificates: Certificates) -> None:
    """Every server except ncat can be limited to TLS 1.3."""
    if peer.name == "ncat":
        pytest.skip("ncat has no option for the minimum version")
    with serving(peer, build, pem) as plain, pytest.raises((ssl.SSLError, ConnectionError)):
        certificates.context(version="TLSv1_2").wrap_socket(plain, server_hostname="localhost").close()


def test_tls_without_support_is_an_error(build: Path, pem: Path) -> None:
    """A server without TLS raises an error instead of serving in clear."""
    peer = next(peer for peer in servers.PEERS if not peer.tls)
    with pytest.raises(ValueError, match="has no TLS"):
        servers.command(peer, build, 1, pem)


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("Go", "go"),
        ("tokio", "cargo and rustc"),
        ("libuv", "gcc"),
        ("epoll", "gcc"),
        ("io_uring", "gcc"),
        ("socat", "socat"),
        ("ncat", "ncat"),
        ("xinetd", "xinetd"),
    ],
)
def test_a_missing_tool_is_named(name: str, tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an empty PATH, both functions name the missing tool."""
    monkeypatch.setenv("PATH", "")
    peer = next(peer for peer in servers.PEERS if peer.name == name)
    with pytest.raises(servers.Missing, match=f"^{tool} (is|are) not installed"):
        servers.command(peer, tmp_path, 1, None)
    with pytest.raises(servers.Missing, match=f"^{tool} (is|are) not installed"):
        servers.version(peer)


@pytest.mark.parametrize("name", ["uvloop protocol", "Twisted", "Trio", "gevent"])
def test_a_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a Python package is not installed, both functions name it."""
    package = name.split(maxsplit=1)[0].lower()
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    peer = next(peer for peer in servers.PEERS if peer.name == name)
    with pytest.raises(servers.Missing, match=f"package {package} is not installed"):
        servers.command(peer, tmp_path, 1, None)
    with pytest.raises(servers.Missing, match=f"package {package} is not installed"):
        servers.version(peer)


def compiler(folder: Path, script: str, name: str = "gcc") -> None:
    """Create an executable shell script that replaces a tool."""
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_a_missing_header_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the missing header instead of repeating the compiler's output."""
    compiler(tmp_path, "echo 'uring.c:9:10: fatal error: liburing.h: No such file or directory'; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    peer = next(peer for peer in servers.PEERS if peer.name == "io_uring")
    with pytest.raises(servers.Missing, match=r"^liburing\.h is not found$"):
        servers.command(peer, tmp_path, 1, None)


def test_another_compiler_error_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any other failure, the message is the last line of the compiler's output."""
    compiler(tmp_path, "echo 'much'; echo 'ld: cannot find -luv'; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    peer = next(peer for peer in servers.PEERS if peer.name == "libuv")
    with pytest.raises(servers.Missing, match=r"^ld: cannot find -luv$"):
        servers.command(peer, tmp_path, 1, None)


def test_a_kernel_without_io_uring_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built server checks the kernel first, because io_uring may be disabled."""
    compiler(tmp_path, "echo 'io_uring_setup: Operation not permitted' >&2; exit 1", "built")
    compiler(tmp_path, f'while [ "$1" != -o ]; do shift; done; /bin/cp {tmp_path}/built "$2"')
    monkeypatch.setenv("PATH", str(tmp_path))
    peer = next(peer for peer in servers.PEERS if peer.name == "io_uring")
    with pytest.raises(
        servers.Missing, match=r"^the kernel does not support it: io_uring_setup: Operation not permitted$"
    ):
        servers.command(peer, tmp_path, 1, None)


def test_a_missing_crate_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the missing Debian package. A cargo that does not run is skipped."""
    broken, working = tmp_path / "broken", tmp_path / "working"
    for folder, script in ((broken, "exit 1"), (working, "exit 0")):
        folder.mkdir()
        compiler(folder, script, "cargo")
        compiler(folder, script, "rustc")
    monkeypatch.setenv("PATH", f"{broken}:{working}")
    monkeypatch.setattr(servers, "CRATES", tmp_path)
    assert servers._rust() == (str(working / "cargo"), str(working / "rustc"))
    peer = next(peer for peer in servers.PEERS if peer.name == "tokio")
    with pytest.raises(servers.Missing, match="librust-tokio-dev"):
        servers.command(peer, tmp_path, 1, None)


@pytest.mark.parametrize("source", sorted((BENCHMARKS / "peers").glob("*.c")), ids=lambda source: source.name)
def test_no_warning(source: Path, tmp_path: Path) -> None:
    """The servers in C compile without warnings."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-c", str(source), "-o", str(tmp_path / "object")]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No such file" in done.stderr:
        pytest.skip(done.stderr.splitlines()[0])
    assert done.stderr == ""
