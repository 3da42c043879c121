"""The servers that the benchmark compares are built, serve, and say what is missing."""

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
from typing import TYPE_CHECKING, Any

import pytest

from harness import PATIENCE, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from certificates import Certificates

pytestmark = pytest.mark.once

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DATA = os.urandom(1 << 20)
STEP = 16384
# These hang where much is on its way (ncat waits for cat to read, cat for ncat), and drop it where the client half-closes.
SHAKY = {"ncat"}


def load() -> Any:
    """Return benchmarks/servers.py."""
    spec = importlib.util.spec_from_file_location("servers", BENCHMARKS / "servers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


peers = load()


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder where servers are built, once."""
    return tmp_path_factory.mktemp("build")


@pytest.fixture
def pem(certificates: Certificates, tmp_path: Path) -> Path:
    """Return the server's key and certificate in one file."""
    file = tmp_path / "server.pem"
    file.write_bytes(certificates.key.read_bytes() + certificates.certificate.read_bytes())
    return file


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def serving(peer: Any, build: Path, certificate: Path | None) -> Iterator[socket.socket]:
    """Start a server and connect a client; end the server and all it has forked."""
    port = free_port()
    try:
        command = peers.command(peer, build, port, certificate)
        assert peers.version(peer)
    except peers.Missing as missing:
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
    """Send it all, half-close, and meanwhile receive until EOF."""

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
    """Send a little, receive as much, and so on."""
    received = b""
    for begin in range(0, len(DATA), STEP):
        client.sendall(DATA[begin : begin + STEP])
        while len(received) < begin + STEP and (data := client.recv(65536)):
            received += data
    return received


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_all_comes_back(peer: Any, build: Path) -> None:
    """A megabyte is echoed, and then EOF."""
    with serving(peer, build, None) as client:
        assert (exchange_in_steps if peer.name in SHAKY else exchange)(client) == DATA


@pytest.mark.parametrize("peer", [peer for peer in peers.PEERS if peer.tls], ids=lambda peer: peer.name)
def test_all_comes_back_over_tls(peer: Any, build: Path, pem: Path, certificates: Certificates) -> None:
    """A megabyte is echoed over TLS 1.3."""
    with serving(peer, build, pem) as plain:
        client = certificates.context().wrap_socket(plain, server_hostname="localhost")
        with client:
            assert client.version() == "TLSv1.3"
            assert exchange_in_steps(client) == DATA  # an SSLSocket cannot send and receive at a time


@pytest.mark.parametrize("peer", [peer for peer in peers.PEERS if peer.tls], ids=lambda peer: peer.name)
def test_older_tls_is_refused(peer: Any, build: Path, pem: Path, certificates: Certificates) -> None:
    """What is compared is TLS 1.3 everywhere; ncat cannot be told so."""
    if peer.name == "ncat":
        pytest.skip("ncat has no such option")
    with serving(peer, build, pem) as plain, pytest.raises((ssl.SSLError, ConnectionError)):
        certificates.context(version="TLSv1_2").wrap_socket(plain, server_hostname="localhost").close()


def test_tls_is_not_left_out_silently(build: Path, pem: Path) -> None:
    """A server without TLS does not serve in plain text where TLS is wanted."""
    peer = next(peer for peer in peers.PEERS if not peer.tls)
    with pytest.raises(ValueError, match="has no TLS"):
        peers.command(peer, build, 1, pem)


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
    """With nothing in PATH, both calls say what they look for."""
    monkeypatch.setenv("PATH", "")
    peer = next(peer for peer in peers.PEERS if peer.name == name)
    with pytest.raises(peers.Missing, match=f"^{tool} (is|are) not installed"):
        peers.command(peer, tmp_path, 1, None)
    with pytest.raises(peers.Missing, match=f"^{tool} (is|are) not installed"):
        peers.version(peer)


@pytest.mark.parametrize("name", ["uvloop protocol", "Twisted", "Trio", "gevent"])
def test_a_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a package of Python is not installed, both calls say which."""
    package = name.split(maxsplit=1)[0].lower()
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    peer = next(peer for peer in peers.PEERS if peer.name == name)
    with pytest.raises(peers.Missing, match=f"package {package} is not installed"):
        peers.command(peer, tmp_path, 1, None)
    with pytest.raises(peers.Missing, match=f"package {package} is not installed"):
        peers.version(peer)


def compiler(folder: Path, script: str, name: str = "gcc") -> None:
    """Put a compiler into a folder."""
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_a_missing_header_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler says at length is that a header is not found."""
    compiler(tmp_path, "echo 'uring.c:9:10: fatal error: liburing.h: No such file or directory'; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    peer = next(peer for peer in peers.PEERS if peer.name == "io_uring")
    with pytest.raises(peers.Missing, match=r"^liburing\.h is not found$"):
        peers.command(peer, tmp_path, 1, None)


def test_a_compiler_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another failure, the last line is told."""
    compiler(tmp_path, "echo 'much'; echo 'ld: cannot find -luv'; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    peer = next(peer for peer in peers.PEERS if peer.name == "libuv")
    with pytest.raises(peers.Missing, match=r"^ld: cannot find -luv$"):
        peers.command(peer, tmp_path, 1, None)


def test_a_kernel_without_io_uring_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was built is tried, as the kernel, or who runs it, may forbid it."""
    compiler(tmp_path, "echo 'io_uring_setup: Operation not permitted' >&2; exit 1", "built")
    compiler(tmp_path, f'while [ "$1" != -o ]; do shift; done; /bin/cp {tmp_path}/built "$2"')
    monkeypatch.setenv("PATH", str(tmp_path))
    peer = next(peer for peer in peers.PEERS if peer.name == "io_uring")
    with pytest.raises(peers.Missing, match=r"^the kernel does not do it: io_uring_setup: Operation not permitted$"):
        peers.command(peer, tmp_path, 1, None)


def test_a_missing_crate_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Debian's package, its name is told; a cargo that does not run is passed over."""
    broken, working = tmp_path / "broken", tmp_path / "working"
    for folder, script in ((broken, "exit 1"), (working, "exit 0")):
        folder.mkdir()
        compiler(folder, script, "cargo")
        compiler(folder, script, "rustc")
    monkeypatch.setenv("PATH", f"{broken}:{working}")
    monkeypatch.setattr(peers, "CRATES", tmp_path)
    assert peers._rust() == (str(working / "cargo"), str(working / "rustc"))
    peer = next(peer for peer in peers.PEERS if peer.name == "tokio")
    with pytest.raises(peers.Missing, match="librust-tokio-dev"):
        peers.command(peer, tmp_path, 1, None)


@pytest.mark.parametrize("source", sorted((BENCHMARKS / "peers").glob("*.c")), ids=lambda source: source.name)
def test_no_warning(source: Path, tmp_path: Path) -> None:
    """The compiler has nothing to say to the servers in C."""
    if shutil.which("gcc") is None:
        pytest.skip("not installed: gcc")
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-c", str(source), "-o", str(tmp_path / "object")]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No such file" in done.stderr:
        pytest.skip(done.stderr.splitlines()[0])
    assert done.stderr == ""
