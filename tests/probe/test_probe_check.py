"""The quick check of `echod probe`, against the daemon and against faulty servers."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from echod.probe import arguments
from echod.probe import check as quick_check
from echod.probe.model import Outcome
from harness import PATIENCE, clean_environment, run
from peers import Peer, change, echo, ending, resetting, silent
from probing import CHECK, REFUSED, UNANSWERED, check, measure

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Start

pytestmark = pytest.mark.once


@pytest.mark.parametrize("arguments", [(), ("--half-close",)])
def test_check(start: Start, arguments: tuple[str, ...]) -> None:
    """The check prints one line, and the daemon sees an ordinary client."""
    daemon = start("--log.connections", "all")
    host, port = daemon.address
    result = run("probe", f"{host}:{port}", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert CHECK.fullmatch(result.stdout)
    closed = daemon.wait_for("client_closed")
    assert (closed["received"], closed["acked"], closed["reason"]) == (64, 64, "eof")


def test_check_sends_a_line() -> None:
    """The message is a line, so a server that echoes whole lines passes. It is new, so a repeated old answer fails."""
    lines = []

    def handler(sock: socket.socket) -> None:
        with sock.makefile("rb") as file:
            lines.append(file.readline())
        sock.sendall(lines[0])

    with Peer(handler) as peer:
        assert run("probe", peer.target).returncode == 0
        assert run("probe", peer.target).returncode == 1
    assert re.fullmatch(rb"echod probe [0-9a-f]{50}\r\n", lines[0])
    assert lines[0] != lines[1]


def test_check_imports_little() -> None:
    """The check runs often as a health check, so it imports neither settings, event loop, TLS nor measurement."""
    code = "import sys; from echod.cli import main; sys.argv[1:] = ['probe', sys.argv[1]]; print(main(), *sys.modules)"
    with Peer(echo) as peer:
        command = [sys.executable, "-c", code, peer.target]
        # Coverage measurement would import some of the modules itself.
        environment = {name: value for name, value in clean_environment().items() if not name.startswith("COVERAGE_")}
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    exit_code, *modules = result.stdout.splitlines()[1].split()
    assert exit_code == "0"
    heavy = {"pydantic", "structlog", "uvloop", "asyncio", "ssl", "json", "random", "rich", "hdrh", "echod.settings"}
    assert not heavy.intersection(modules)


def test_check_finds_wrong_bytes() -> None:
    with Peer(change(17, to=0xFE)) as peer:
        assert re.fullmatch("wrong echo at offset 17: expected 0x[0-9a-f]{2}, got 0xfe", check(peer.target, code=1))
    # Offset 62 is the CR.
    with Peer(change(62, to=0)) as peer:
        assert check(peer.target, code=1) == "wrong echo at offset 62: expected 0x0d, got 0x00"
        found = measure(peer.target, code=1)
    assert found["mismatch"] == {"offset": 62, "expected": 0x0D, "got": 0}
    assert found["errors"] == {"wrong_echo": 1}
    assert (found["ending"], found["seconds"]) == ("failed", None)
    assert found["problem"] == f"{peer.target}: wrong echo at offset 62: expected 0x0d, got 0x00"


def test_check_finds_too_many_bytes() -> None:
    def handler(sock: socket.socket) -> None:
        sock.sendall(sock.recv(64, socket.MSG_WAITALL) + b"!")
        silent(sock)

    expected = "wrong echo at offset 64: expected nothing, as no more had been sent, got 0x21"
    with Peer(handler) as peer:
        assert check(peer.target, code=1) == expected
        assert check(peer.target, "--half-close", code=1) == expected


def test_check_finds_ends() -> None:
    with Peer(ending(0)) as peer:
        assert check(peer.target, code=1) == f"the server closed the connection after 0 of 64 bytes; {UNANSWERED}"
    with Peer(ending(10)) as peer:
        assert check(peer.target, code=1) == "the server closed the connection after 10 of 64 bytes"
        assert measure(peer.target, code=1)["errors"] == {"early_eof": 1}
    with Peer(resetting(10)) as peer:
        assert check(peer.target, code=1) == "10 of 64 bytes came back, then: Connection reset by peer"
        assert measure(peer.target, code=1)["errors"] == {"reset": 1}
    with Peer(silent) as peer:
        assert check(peer.target, "--timeout", "0.2", code=1) == "no echo: timed out"
        assert measure(peer.target, "--timeout", "0.2", code=1)["errors"] == {"timeout": 1}


def test_timeout_bounds_a_trickle() -> None:
    """The timeout applies to the whole echo, not to each byte."""
    now = 0.0
    read = threading.Semaphore(0)

    def clock() -> float:
        """Take 0.05 s for each reading, and let the server send a byte after it."""
        nonlocal now
        now += 0.05
        read.release()
        return now

    def handler(sock: socket.socket) -> None:
        for byte in sock.recv(64, socket.MSG_WAITALL):
            read.acquire()
            sock.sendall(bytes([byte]))

    with Peer(handler) as peer:
        result = quick_check.run(arguments.parse([peer.target, "--timeout", "1"]), clock)
        read.release(64)
    match = re.fullmatch(r"\S+: ([0-9]+) of 64 bytes came back, then: timed out", result.problem)
    assert match
    assert 0 < int(match[1]) <= 20
    assert result.outcome is Outcome.FAILED


def test_half_close_requires_eof() -> None:
    """After the echo, the server has to send EOF."""

    def never_ends(sock: socket.socket) -> None:
        echo(sock)
        held.wait(PATIENCE)

    held = threading.Event()
    with Peer(never_ends) as peer:
        assert run("probe", peer.target).returncode == 0
        line = check(peer.target, "--half-close", "--timeout", "0.2", code=1)
        assert line == "64 of 64 bytes came back, then: timed out"
        found = measure(peer.target, "--half-close", "--timeout", "0.2", "--count", "3", code=1)
        assert (found["errors"], found["messages"], found["unanswered"]) == ({"timeout": 1}, 3, 0)
        held.set()


def test_no_connection() -> None:
    assert check(REFUSED, code=69) == "no connection: Connection refused"
    assert measure(REFUSED, code=69)["errors"] == {"refused": 1}
    line = check("name.invalid:7", code=69)
    assert line.startswith("no connection: the name cannot be resolved (")
    assert measure("name.invalid:7", code=69)["errors"] == {"name": 1}
    assert measure("name.invalid:7", "--count", "1", code=69)["errors"] == {"name": 1}


def test_a_host_with_several_addresses() -> None:
    """An empty host stands for localhost, and the first address that answers is used."""
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with Peer(echo, socket.create_server((host, 0), family=family)) as peer:
            port = peer.target.rpartition(":")[2]
            assert run("probe", f":{port}").returncode == 0
            assert measure(f":{port}", "--count", "5")["messages"] == 5


def unix_server(address: str, backlog: int = 10) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(address)
    sock.listen(backlog)
    return sock


def test_unix(tmp_path: Path) -> None:
    path = str(tmp_path / "echo.sock")
    with Peer(echo, unix_server(path)) as peer:
        assert CHECK.fullmatch(run("probe", peer.target).stdout)
        assert measure(peer.target, "--count", "10", "--connections", "2")["messages"] == 10
    assert check(peer.target, code=69) == "no connection: Connection refused"
    assert check(f"unix:{path}.none", code=69) == "no connection: No such file or directory"
    assert measure(f"unix:{path}.none", code=69)["errors"] == {"enoent": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has abstract names")
def test_abstract_unix() -> None:
    name = f"echod-test-{os.getpid()}"
    with Peer(echo, unix_server(f"\0{name}")):
        assert CHECK.fullmatch(run("probe", f"unix:@{name}").stdout)


def test_a_full_backlog(tmp_path: Path) -> None:
    """The client waits for room in the backlog of a unix socket, as it does with TCP."""
    path = str(tmp_path / "echo.sock")
    with unix_server(path, 0) as listening, socket.socket(socket.AF_UNIX) as first:
        first.connect(path)
        assert check(f"unix:{path}", "--timeout", "0.2", code=69) == "no connection: timed out"
        command = [sys.executable, "-m", "echod", "probe", f"unix:{path}"]
        with subprocess.Popen(command, env=clean_environment(), stdout=subprocess.DEVNULL) as process:
            listening.accept()[0].close()
            sock, _ = listening.accept()
            with sock:
                sock.sendall(sock.recv(64))
                assert process.wait(PATIENCE) == 0


def test_source() -> None:
    with Peer(echo) as peer:
        assert run("probe", peer.target, "--source", "127.0.0.2").returncode == 0
        assert measure(peer.target, "--source", "127.0.0.3", "--count", "1")["messages"] == 1
        assert peer.peers == ["127.0.0.2", "127.0.0.3"]
        line = check(peer.target, "--source", "192.0.2.1", code=69)
        assert line == "no connection: Cannot assign requested address"


def test_proxy_header() -> None:
    """The header comes first, in both versions, and its destination is the target."""
    headers: list[bytes] = []

    def handler(sock: socket.socket) -> None:
        headers.append(sock.recv(size, socket.MSG_WAITALL))
        echo(sock)

    with Peer(handler) as peer:
        port = int(peer.target.rpartition(":")[2])
        expected = f"PROXY TCP4 192.0.2.7 127.0.0.1 4321 {port}\r\n".encode()
        size = len(expected)
        assert run("probe", peer.target, "--proxy-v1", "192.0.2.7:4321").returncode == 0
        assert measure(peer.target, "--proxy-v1", "192.0.2.7:4321", "--count", "5")["messages"] == 5
        assert headers == [expected] * 2
        size = 28
        assert run("probe", peer.target, "--proxy-v2", "192.0.2.7:4321").returncode == 0
    addresses = socket.inet_aton("192.0.2.7") + socket.inet_aton("127.0.0.1")
    ports = (4321).to_bytes(2, "big") + port.to_bytes(2, "big")
    assert headers[2] == b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + addresses + ports


def test_proxy_header_decides_the_family() -> None:
    """The client connects to an address of the same family as the header's."""
    with Peer(echo, socket.create_server(("::1", 0), family=socket.AF_INET6)) as peer:
        target = f":{peer.target.rpartition(':')[2]}"
        assert run("probe", target, "--proxy-v1", "192.0.2.7:1").returncode == 69
        line = check(target, "--proxy-v1", "[2001:db8::1]:1", code=1)
        assert line.startswith("wrong echo: the server sent the PROXY header back")


def test_a_signal_ends_a_check() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        host, port = listening.getsockname()
        command = [sys.executable, "-m", "echod", "probe", f"{host}:{port}", "--timeout", "1000"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment())
        sock, _ = listening.accept()
        with sock:
            assert sock.recv(1)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=PATIENCE) == (b"", b"")
    assert process.returncode == 130
