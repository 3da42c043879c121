"""`echod probe` against the daemon, and against servers that are wrong on purpose."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import random
import re
import select
import selectors
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from echod.probe import command, progress, report, units
from echod.probe import load as measure_module
from echod.probe.connect import TlsError
from harness import PATIENCE, clean_environment, receive, reset, run
from peers import Peer, change, closing, each, echo, ending, messages, resetting, silent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Command, Start

pytestmark = pytest.mark.once

CHECK = re.compile(r"\S+: 64 bytes came back right in [0-9.]+ ms \(connected in [0-9.]+ ms\)\n")
REFUSED = "127.0.0.1:1"  # nobody listens on port 1


def measure(*arguments: str, code: int = 0) -> dict[str, Any]:
    """Run a probe with --json, and return what it found."""
    result = run("probe", "--json", *arguments)
    assert result.returncode == code, result.stderr
    assert bool(result.stderr) == bool(code)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def check(target: str, *arguments: str, code: int) -> str:
    """Run a quick check that fails, and return its line without the target."""
    result = run("probe", target, *arguments)
    assert (result.returncode, result.stdout) == (code, "")
    start = f"echod: {target}: "
    assert result.stderr.startswith(start)
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix(start).rstrip("\n")


# --- the quick check


@pytest.mark.parametrize("arguments", [(), ("--half-close",)])
def test_check(start: Start, arguments: tuple[str, ...]) -> None:
    """One line, and a connection like any other for the daemon."""
    daemon = start("--log.connections", "all")
    host, port = daemon.address
    result = run("probe", f"{host}:{port}", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert CHECK.fullmatch(result.stdout)
    closed = daemon.wait_for("client_closed")
    assert (closed["received"], closed["acked"], closed["reason"]) == (64, 64, "eof")


def test_check_sends_a_line() -> None:
    """A new one each time: whoever echoes whole lines answers, and whoever repeats an old answer is found out."""
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
    """It is the health check of a container: no settings, no loop, no TLS, no measurement."""
    code = "import sys; from echod.cli import main; sys.argv[1:] = ['probe', sys.argv[1]]; print(main(), *sys.modules)"
    with Peer(echo) as peer:
        command = [sys.executable, "-c", code, peer.target]
        # The measurement of coverage imports a lot itself.
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
        assert check(peer.target, code=1) == "the server closed the connection after 0 of 64 bytes"
    with Peer(ending(10)) as peer:
        assert check(peer.target, code=1) == "the server closed the connection after 10 of 64 bytes"
        assert measure(peer.target, code=1)["errors"] == {"early_eof": 1}
    with Peer(resetting(10)) as peer:
        assert check(peer.target, code=1) == "10 of 64 bytes came back, then: Connection reset by peer"
        assert measure(peer.target, code=1)["errors"] == {"reset": 1}
    with Peer(silent) as peer:
        assert check(peer.target, "--timeout", "0.2", code=1) == "no echo: timed out"
        assert measure(peer.target, "--timeout", "0.2", code=1)["errors"] == {"timeout": 1}


def test_check_of_a_trickle() -> None:
    """The timeout is of all, not of each byte."""

    def handler(sock: socket.socket) -> None:
        for byte in sock.recv(64, socket.MSG_WAITALL):
            sock.sendall(bytes([byte]))
            time.sleep(0.05)

    with Peer(handler) as peer:
        line = check(peer.target, "--timeout", "0.5", code=1)
    match = re.fullmatch("([0-9]+) of 64 bytes came back, then: timed out", line)
    assert match
    assert 0 < int(match[1]) <= 11


def test_half_close_requires_eof() -> None:
    """An echo that is right is not enough: after it, EOF has to come; and one that ends at our FIN loses some of it."""

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
    """An empty host is localhost, and whichever of its addresses answers is taken."""
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
    """Of a unix socket: the client waits for its place as it does with TCP."""
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
    """It comes before all else, in both versions, and names the target as the destination."""
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
    """Of a name with addresses of both families, that one is taken which goes with the header."""
    with Peer(echo, socket.create_server(("::1", 0), family=socket.AF_INET6)) as peer:
        target = f":{peer.target.rpartition(':')[2]}"
        assert run("probe", target, "--proxy-v1", "192.0.2.7:1").returncode == 69
        line = check(target, "--proxy-v1", "[2001:db8::1]:1", code=1)
        assert line == "wrong echo at offset 0: expected 0x65, got 0x50"


# --- the command line


def test_documentation() -> None:
    """It has every option, and every key of the JSON."""
    text = (Path(__file__).parents[2] / "docs" / "probe.md").read_text("utf-8")
    options = set(re.findall(r"--[a-z][a-z0-9-]+", run("probe", "--help").stdout))
    assert len(options) > 20
    assert options - set(re.findall(r"--[a-z][a-z0-9-]+", text)) == {"--help"}
    with Peer(echo) as peer:
        keys = measure(peer.target).keys() | measure(peer.target, "--count", "1").keys()
    assert {key for key in keys if f"`{key}`" not in text} == set()


def test_help() -> None:
    result = run("probe", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for part in ("TARGET", "--rate R", "exit codes: 0 the echo was right", "64KiB", "(default: 64)"):
        assert part in result.stdout
    assert "use `echod probe TARGET`" in run("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: TARGET"),
        (["h:1", "h:2"], "there is one TARGET, and 'h:2' is a second one"),
        (["h:1", "--cuont=3"], "unknown option --cuont; did you mean --count?"),
        (["h:1", "--xyzzy"], "unknown option --xyzzy\n"),
        (["h:1", "--count"], "argument --count: expected one argument"),
        (["h"], "argument TARGET: 'h' has no port"),
        (["h:0"], "argument TARGET: 'h:0': nobody listens on port 0"),
        (["systemd:echo"], "argument TARGET: 'systemd:echo': only a server inherits sockets; a client needs the addr"),
        (["h:1", "--count", "0"], "argument --count: '0' is no whole number from 1 on"),
        (["h:1", "--seed", "x"], "argument --seed: 'x' is no whole number from 0 on"),
        (["h:1", "--size", "3 apples"], "argument --size: '3 apples' is not a size: write bytes, or for example 64KiB"),
        (["h:1", "--size", "0.5"], "argument --size: '0.5' is no size from 1 byte to 1TiB"),
        (["h:1", "--timeout", "0"], "argument --timeout: '0' is no time in seconds"),
        (["h:1", "--timeout", "86401"], "argument --timeout: '86401' is no time in seconds, above 0 and at most a day"),
        (["h:1", "--duration", "nan"], "argument --duration: 'nan' is no time in seconds"),
        (["h:1", "--rate", "fast"], "argument --rate: 'fast' is no rate of messages a second"),
        (["h:1", "--source", "h"], "argument --source: 'h' is no IP address"),
        (["h:1", "--proxy-v1", "h:1"], "argument --proxy-v1: 'h:1': a PROXY header names an IP address and a port"),
        (["h:1", "--proxy-v2", "1.2.3.4"], "argument --proxy-v2: '1.2.3.4' has no port"),
        (["h:1", "--count", "1", "--duration", "1"], "--count and --duration both say when to stop"),
        (["h:1", "--stream", "--count", "1"], "--stream has no messages that --count could count"),
        (["h:1", "--stream", "--rate", "1"], "--stream sends as fast as it can"),
        (["h:1", "--stream", "--pipeline", "2"], "--stream never waits for an echo"),
        (["h:1", "--stream", "--plot", "x"], "--stream has no messages, so there is no latency"),
        (["h:1", "--rate", "1", "--pipeline", "2"], "--rate sends what is due however much is on its way"),
        (["h:1", "--ca", "x", "--server-name", "y"], "--ca, --server-name: only with --tls"),
        (["h:1", "--tls", "--key", "x"], "--key is the key of a certificate: give --cert too"),
        (["h:1", "--tls", "--ca", "x", "--insecure"], "--insecure takes any certificate, so --ca sets nothing"),
        (["h:1", "--tls", "--ca", "/nowhere"], "--ca: '/nowhere' cannot be read: No such file or directory"),
        (["unix:/x", "--tls"], "give --server-name or --insecure"),
        (["unix:/x", "--source", "::1"], "--source is an IP address, and the target is a unix socket"),
        (["unix:/x", "--proxy-v1", "[::1]:1"], "a PROXY header names IP addresses, and the target is a unix socket"),
        (["h:1", "--proxy-v1", "1.2.3.4:1", "--proxy-v2", "1.2.3.4:1"], "a connection has one header"),
        (["127.0.0.1:1", "--proxy-v2", "[::1]:1"], "different IP families: TARGET 127.0.0.1, --proxy-v2 ::1"),
        (["h:1", "--source", "[::1]", "--proxy-v1", "1.2.3.4:1"], "families: --source ::1, --proxy-v1 1.2.3.4"),
    ],
)
def test_usage_errors(command: Command, arguments: list[str], message: str) -> None:
    result = command("probe", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    usage, error = result.stderr.splitlines(keepends=True)
    assert usage == "usage: echod probe TARGET [options]\n"
    assert error.startswith("echod probe: error: ")
    assert message in error


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("512B", 512), ("1.5 KiB", 1536), ("64kib", 65536), ("2kB", 2000), ("1MB", 10**6), ("3GiB", 3 * 2**30)],
)
def test_sizes(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "KiB", "-1", "1e3", "1 KiBB", "0x10", "\u0661"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size: write bytes, or for example 64KiB"):
        units.parse_size(text)


def test_figures_as_text() -> None:
    counts = [0, 999, 999.6, 1000, 123_456, 2.5e9, 3e15]
    assert [units.bytes_text(count) for count in counts] == [
        *("0 B", "999 B", "1 kB", "1 kB", "123 kB", "2.5 GB", "3e+03 TB"),
    ]
    times = [1e-7, 0.00099949, 0.0009996, 0.25, 0.9996, 12.34, 1234.5]
    assert [units.seconds_text(seconds) for seconds in times] == [
        *("0.1 µs", "999 µs", "1 ms", "250 ms", "1 s", "12.3 s", "1,234 s"),
    ]


# --- measurements


def test_closed_loop(start: Start) -> None:
    """Every message is sent and answered, and the daemon has counted the same bytes."""
    daemon = start("--log.connections", "all")
    host, port = daemon.address
    options = ("--count", "1000", "--connections", "7", "--size", "1KiB", "--pipeline", "3", "--half-close")
    found = measure(f"{host}:{port}", *options)
    assert (found["mode"], found["ending"], found["connected"], found["errors"]) == ("closed", "right", 7, {})
    assert (found["messages"], found["unanswered"]) == (1000, 0)
    assert found["bytes_sent"] == found["bytes_received"] == 1000 * 1024
    assert found["messages_per_second"] == pytest.approx(1000 / found["seconds"])
    assert found["bytes_per_second"] == pytest.approx(1024_000 / found["seconds"])
    latency = found["latency"]
    order = [latency[key] for key in ("min", "p50", "p90", "p99", "p99.9", "max")]
    assert order == sorted(order)
    assert 0 < latency["min"] < latency["mean"] < latency["max"] < found["seconds"]
    assert sum(count for _, count in found["histogram"]) == 1000
    assert found["histogram"][-1][0] == latency["max"]
    assert found["hdr"].startswith("HISTF")
    daemon.wait_for("client_closed", count=7)
    assert sum(line["acked"] for line in daemon.all("client_closed")) == 1000 * 1024
    assert {line["reason"] for line in daemon.all("client_closed")} == {"eof"}


def test_messages_larger_than_all_buffers(start: Start) -> None:
    """Which only come back because they are received while they are sent."""
    daemon = start()
    host, port = daemon.address
    found = measure(f"{host}:{port}", "--count", "3", "--size", "20MB")
    assert (found["messages"], found["bytes_received"]) == (3, 60_000_000)


def narrow() -> socket.socket:
    """Return a listening socket whose connections take little at once."""
    sock = socket.socket()
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 4096)
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


@pytest.mark.parametrize("options", [("--pipeline", "6"), ("--rate", "1000"), ("--half-close",)])
def test_small_buffers(options: tuple[str, ...]) -> None:
    """A message that cannot be sent at once is sent on later, and echo is received meanwhile."""
    with Peer(echo, narrow()) as peer:
        found = measure(peer.target, "--count", "10", "--size", "2MB", *options)
    assert (found["messages"], found["bytes_received"], found["errors"]) == (10, 20_000_000, {})


def test_a_message_that_takes_long() -> None:
    """Longer than the timeout, which is for standing still."""

    def handler(sock: socket.socket) -> None:
        data = b""
        while len(data) < 20_000_000:
            data += receive(sock, 500_000)
            time.sleep(0.05)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1_000_000)
        sock.sendall(data)

    with Peer(handler, narrow()) as peer:
        found = measure(peer.target, "--count", "1", "--size", "20MB", "--timeout", "1")
    assert found["latency"]["max"] > 2


def test_fewer_messages_than_connections() -> None:
    with Peer(echo) as peer:
        found = measure(peer.target, "--count", "2", "--connections", "5")
    assert (found["messages"], found["connected"], found["errors"]) == (2, 5, {})


def test_duration() -> None:
    with Peer(echo) as peer:
        found = measure(peer.target, "--duration", "1.3")
    assert 1.3 <= found["seconds"] < PATIENCE
    assert found["messages"] > 100
    assert len(found["throughput"]) in {1, 2}  # the rest may be too short for a mark of its own
    assert sum(found["throughput"]) > 0


def test_pipeline() -> None:
    """So many messages are on their way before the first echo has come, and not one more."""
    seen = []

    def handler(sock: socket.socket) -> None:
        data = sock.recv(30, socket.MSG_WAITALL)
        sock.settimeout(0.2)
        try:
            seen.append(sock.recv(1))
        except TimeoutError:
            seen.append(b"")
        sock.settimeout(None)
        sock.sendall(data)
        echo(sock)

    with Peer(handler) as peer:
        assert measure(peer.target, "--count", "10", "--size", "10", "--pipeline", "3")["messages"] == 10
    assert seen == [b""]


def stalling(at: int, seconds: float) -> Peer:
    """Return a server that stands still once, before it answers that message."""

    def act(sock: socket.socket, number: int, message: bytes) -> None:
        if number == at:
            time.sleep(seconds)
        sock.sendall(message)

    return Peer(messages(64, act))


def test_rate_does_not_hide_a_stall() -> None:
    """What was due during a stall counts from when it was due, whenever it could be sent.

    The closed loop sends nothing meanwhile, and so has one slow message only.
    """
    with stalling(50, 0.6) as peer:
        closed = measure(peer.target, "--count", "200")
    with stalling(50, 0.6) as peer:
        opened = measure(peer.target, "--count", "200", "--rate", "200")
    assert closed["latency"]["max"] > 0.59
    assert closed["latency"]["p90"] < 0.2
    assert opened["mode"] == "open"
    assert opened["messages"] == 200
    assert opened["latency"]["max"] > 0.59
    # 120 messages were due in the stall; a tenth of all, the latest 20 of it at most, waited longer than this.
    assert opened["latency"]["p90"] > 0.4
    assert opened["seconds"] > 0.99
    assert 0 < opened["send_lag"] < 0.5


def test_rate_does_not_hide_a_stall_of_the_probe() -> None:
    """What was due while the probe itself did not run is late, and it tells so."""
    pid: list[int] = []

    def act(sock: socket.socket, number: int, message: bytes) -> None:
        if number == 50:
            os.kill(pid[0], signal.SIGSTOP)
            time.sleep(0.6)
            os.kill(pid[0], signal.SIGCONT)
        sock.sendall(message)

    with Peer(messages(64, act)) as peer:
        command = [sys.executable, "-m", "echod", "probe", peer.target, "--count", "200", "--rate", "200", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=clean_environment()) as process:
            pid.append(process.pid)
            output, _ = process.communicate(timeout=PATIENCE)
    found = json.loads(output)
    assert found["messages"] == 200
    assert found["latency"]["p90"] > 0.4
    assert found["send_lag"] > 0.5


def test_rate_is_kept() -> None:
    """Over all connections; none of the schedule is left out, and nothing is sent ahead of it."""
    with Peer(echo) as peer:
        found = measure(peer.target, "--rate", "500", "--duration", "1", "--connections", "3", "--half-close")
    assert (found["messages"], found["unanswered"], found["errors"]) == (500, 0, {})
    assert 0.99 < found["seconds"] < PATIENCE


def test_rate_above_what_can_be_had() -> None:
    """Everything is sent nevertheless, late, and the report tells how late."""
    with Peer(echo) as peer:
        found = measure(peer.target, "--rate", "10000000", "--count", "5000", "--size", "2KiB")
    assert found["messages"] == 5000
    assert found["send_lag"] > 0.001
    assert found["latency"]["max"] >= found["send_lag"]


def test_rate_goes_on_without_a_broken_connection() -> None:
    """What is due goes to those that are left."""
    with Peer(each(ending(650), echo)) as peer:
        found = measure(peer.target, "--rate", "300", "--count", "300", "--connections", "2", code=1)
    assert found["errors"] == {"early_eof": 1}
    assert found["messages"] + found["unanswered"] == 300
    assert 0 < found["unanswered"] < 100


@pytest.mark.parametrize("half_close", [(), ("--half-close",)])
def test_stream(start: Start, half_close: tuple[str, ...]) -> None:
    daemon = start("--log.connections", "all")
    host, port = daemon.address
    found = measure(f"{host}:{port}", "--stream", "--duration", "1.2", "--connections", "2", *half_close)
    assert (found["mode"], found["ending"], found["errors"]) == ("stream", "right", {})
    assert found["messages"] is found["latency"] is found["histogram"] is None
    assert found["bytes_sent"] == found["bytes_received"] > 10_000_000
    assert 1 <= len(found["throughput"]) <= 2
    daemon.wait_for("client_closed", count=2)
    assert sum(line["received"] for line in daemon.all("client_closed")) == found["bytes_sent"]


def test_a_stream_into_a_sink() -> None:
    """Whoever only takes is told from an echo server when the time is over."""
    with Peer(silent) as peer:
        found = measure(peer.target, "--stream", "--duration", "0.3", "--timeout", "0.3", code=1)
    assert (found["errors"], found["bytes_received"]) == ({"timeout": 1}, 0)
    assert found["bytes_sent"] > 0


def test_seed() -> None:
    """The same seed, the same bytes; another one, others."""
    seen = []

    def handler(sock: socket.socket) -> None:
        seen.append(sock.recv(64, socket.MSG_WAITALL))
        sock.sendall(seen[-1])

    with Peer(handler) as peer:
        for seed in ("1", "1", "2"):
            assert measure(peer.target, "--seed", seed, "--count", "1")["seed"] == int(seed)
    assert seen[0] == seen[1] != seen[2]
    assert len(set(seen[0])) > 30  # it looks random


# --- what a measurement finds


def test_finds_a_wrong_byte() -> None:
    """In whichever message: the connection, the offset and both bytes are told; the other connections go on."""
    with Peer(each(change(12_345), echo)) as peer:
        found = measure(peer.target, "--count", "5000", "--connections", "2", "--size", "100", code=1)
    assert found["errors"] == {"wrong_echo": 1}
    mismatch = found["mismatch"]
    assert mismatch["offset"] == 12_345
    assert mismatch["got"] == mismatch["expected"] ^ 1
    assert mismatch["connection"] in {0, 1}
    assert found["problem"] == (
        f"connection {mismatch['connection']}: wrong echo at offset 12345:"
        f" expected 0x{mismatch['expected']:02x}, got 0x{mismatch['got']:02x}"
    )
    assert found["messages"] + found["unanswered"] == 5000


class Swapped:
    """The fifth message comes after the sixth."""

    def __init__(self) -> None:
        self._held = b""

    def __call__(self, sock: socket.socket, number: int, message: bytes) -> None:
        if number == 4:
            self._held = message
        else:
            sock.sendall(message + self._held)
            self._held = b""


def lost(sock: socket.socket, number: int, message: bytes) -> None:
    if number != 4:
        sock.sendall(message)


def doubled(sock: socket.socket, number: int, message: bytes) -> None:
    sock.sendall(message * (1 + (number == 4)))


@pytest.mark.parametrize("act", [Swapped(), lost, doubled])
def test_finds_misplaced_messages(act: Any) -> None:
    """A swapped, lost or doubled message consists of right bytes, in the wrong place."""
    with Peer(messages(512, act)) as peer:
        found = measure(peer.target, "--count", "20", "--size", "512", "--pipeline", "8", code=1)
    assert found["errors"] == {"wrong_echo": 1}
    # The first byte that differs need not be the first of the message.
    expected = 5 if act is doubled else 4
    assert expected * 512 <= found["mismatch"]["offset"] < expected * 512 + 8


def test_finds_the_echo_of_another_connection() -> None:
    """Each connection sends bytes of its own."""
    waiting: list[socket.socket] = []
    both = threading.Barrier(2)

    def handler(sock: socket.socket) -> None:
        waiting.append(sock)
        message = sock.recv(64, socket.MSG_WAITALL)
        both.wait(PATIENCE)
        waiting[waiting[0] is sock].sendall(message)
        silent(sock)

    with Peer(handler) as peer:
        found = measure(peer.target, "--count", "2", "--connections", "2", code=1)
    assert found["errors"] == {"wrong_echo": 2}


def test_finds_more_than_was_sent() -> None:
    def handler(sock: socket.socket) -> None:
        sock.sendall(sock.recv(64, socket.MSG_WAITALL) + b"!!")
        silent(sock)

    with Peer(handler) as peer:
        found = measure(peer.target, "--count", "1", code=1)
        assert found["mismatch"] == {"connection": 0, "offset": 64, "expected": None, "got": 0x21}
        assert run("probe", peer.target, "--count", "1").stderr == (
            f"echod: {peer.target}: connection 0: wrong echo at offset 64: expected nothing, as no more had been sent,"
            " got 0x21 (errors by kind: wrong_echo 1)\n"
        )


def test_finds_what_it_would_have_sent_next() -> None:
    """No echo may come before its message, be it right."""
    coming = random.Random(5).randbytes(measure_module.PERIOD)[:65]

    def handler(sock: socket.socket) -> None:
        assert sock.recv(64, socket.MSG_WAITALL) == coming[:64]
        sock.sendall(coming)
        silent(sock)

    with Peer(handler) as peer:
        found = measure(peer.target, "--count", "1", "--seed", "5", code=1)
    assert found["mismatch"] == {"connection": 0, "offset": 64, "expected": None, "got": coming[64]}


def test_errors_by_kind() -> None:
    """Each connection's error is counted; what was measured before it is there."""
    with Peer(each(ending(640), resetting(640), silent, echo)) as peer:
        options = ("--connections", "4", "--duration", "1", "--timeout", "0.3")
        found = measure(peer.target, *options, code=1)
    assert found["errors"] == {"early_eof": 1, "reset": 1, "timeout": 1}
    assert found["messages"] > 20
    assert found["unanswered"] == 3


def test_half_close_finds_an_early_end() -> None:
    """An echo server that ends at our FIN, with echo still to be sent."""

    def handler(sock: socket.socket) -> None:
        data = sock.recv(64, socket.MSG_WAITALL)
        assert sock.recv(1) == b""
        sock.sendall(data[:60])

    with Peer(handler) as peer:
        found = measure(peer.target, "--count", "1", "--half-close", code=1)
        assert found["errors"] == {"early_eof": 1}
        assert found["problem"] == "connection 0: the server closed it, 4 bytes of echo missing"


def test_some_connections_refused() -> None:
    """Only when there is none at all is it 69."""
    listening = socket.create_server(("127.0.0.1", 0))

    def handler(sock: socket.socket) -> None:
        # Of one connection and no more: who comes after it is refused, or reset while it waits in the backlog.
        listening.shutdown(socket.SHUT_RDWR)
        echo(sock)

    with Peer(handler, listening) as peer:
        found = measure(peer.target, "--count", "5000", "--connections", "200", code=1)
    assert 1 <= found["connected"] < 200
    assert found["errors"]["refused"] > 0


# --- reports


def test_report() -> None:
    """For people: a table of percentiles, and a histogram of as many messages."""
    with Peer(echo) as peer:
        result = run("probe", peer.target, "--count", "3000", "--size", "100")
    assert (result.returncode, result.stderr) == (0, "")
    title, *lines = result.stdout.splitlines()
    assert title.startswith(f"{peer.target}: 1 connection, messages of 100 B, 1 at a time, ")
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert rows["messages"][0] == "3,000"
    assert rows["bytes"][0] == "300,000"
    assert rows["errors"] == ["0"]
    assert {"p50", "p90", "p99", "p99.9", "max"} < rows.keys()
    bars = [re.fullmatch(r" *up to (\S+ \S+) +([0-9,]+)(  \S+)?", line) for line in lines if "up to" in line]
    assert sum(int(bar[2].replace(",", "")) for bar in bars if bar) == 3000
    assert bars[-1] is not None
    assert bars[-1][1] == " ".join(rows["max"])
    assert max(len(bar[3] or "") for bar in bars if bar) == 42


def test_report_of_a_stream() -> None:
    with Peer(echo) as peer:
        result = run("probe", peer.target, "--stream", "--duration", "2.3", "--size", "4KiB")
    assert result.returncode == 0
    assert result.stdout.startswith(f"{peer.target}: 1 connection, a stream in writes of 4096 B, ")
    assert "second 2 " in result.stdout
    assert "p50" not in result.stdout


def test_report_of_a_rate_and_errors() -> None:
    with Peer(ending(640)) as peer:
        result = run("probe", peer.target, "--rate", "1000", "--count", "100")
    assert result.returncode == 1
    assert " 1 connection, 1000 messages of 64 B a second, " in result.stdout
    assert "sent late by " in result.stdout
    assert re.search(r"errors +1 +early_eof 1\n", result.stdout)
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith(" (errors by kind: early_eof 1)\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_report_that_cannot_be_written() -> None:
    """1, whatever the echo was."""
    with Peer(echo) as peer:
        command = ["sh", "-c", 'exec "$@" >/dev/full', "sh", sys.executable, "-m", "echod", "probe", peer.target]
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
    assert (result.returncode, result.stderr) == (1, "echod: standard output: No space left on device\n")


def test_nothing_is_left_open(authority: Authority) -> None:
    """In Python's development mode, which warns of each socket and file that is."""
    with Peer(echo, tls=authority.context) as secure, Peer(each(ending(100), resetting(100), echo)) as plain:
        for arguments in (
            (secure.target, "--tls", "--insecure"),
            (secure.target, "--tls"),
            (secure.target, "--tls", "--insecure", "--count", "10", "--connections", "2", "--half-close"),
            (plain.target, "--count", "10", "--connections", "3"),
            (REFUSED, "--count", "1"),
        ):
            command = [sys.executable, "-X", "dev", "-W", "error", "-m", "echod", "probe", *arguments]
            result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
            assert result.returncode in {0, 1, 69}
            assert "Warning" not in result.stderr
            assert result.stderr.count("\n") == (result.returncode != 0)


def test_unreachable_measurement() -> None:
    result = run("probe", REFUSED, "--count", "1")
    assert (result.returncode, result.stdout) == (69, "")
    assert result.stderr == (
        f"echod: {REFUSED}: connection 0: no connection: Connection refused (errors by kind: refused 1)\n"
    )
    assert measure(REFUSED, "--count", "1", code=69)["ending"] == "unreachable"


def test_plot(tmp_path: Path) -> None:
    """An SVG file of its own, with a point for each percentile, and labels."""
    path = tmp_path / "echo.svg"
    with Peer(echo) as peer:
        found = measure(peer.target, "--count", "2000", "--plot", str(path))
        text = path.read_text("utf-8")
        assert "prefers-color-scheme: dark" in text
        assert "href" not in text
        root = ET.fromstring(text)
        name = "{http://www.w3.org/2000/svg}"
        assert root.tag == f"{name}svg"
        labels = [element.text for element in root.iter(f"{name}text")]
        assert f"{peer.target}: 1 connection, messages of 64 B, 1 at a time" in labels
        assert {"0%", "90%", "99%", "99.9%", "99.99%"} < set(labels)
        (curve,) = root.iter(f"{name}polyline")
        points = [tuple(map(float, point.split(","))) for point in curve.attrib["points"].split()]
        assert points == sorted(points, key=lambda point: (point[0], -point[1]))
        assert all(60 <= y <= 400 for _, y in points)
        # One message is a plot too.
        assert run("probe", peer.target, "--count", "1", "--plot", str(path)).returncode == 0
        assert ET.fromstring(path.read_text("utf-8")).tag == f"{name}svg"
    assert found["messages"] == 2000


def test_a_plot_that_cannot_be_written(tmp_path: Path) -> None:
    """Told before anything is measured."""
    with Peer(echo) as peer:
        result = run("probe", peer.target, "--duration", "1000", "--plot", str(tmp_path))
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"echod: --plot: {str(tmp_path)!r} cannot be written: Is a directory\n"
        assert not peer.peers
        result = run("probe", peer.target, "--count", "5", "--plot", "/dev/full")
    assert result.returncode == 1
    assert result.stderr == "echod: --plot: '/dev/full' cannot be written: No space left on device\n"
    assert "messages" in result.stdout


HIDE = """
import sys
sys.modules[sys.argv.pop(1)] = None
from echod.cli import main
sys.exit(main())
"""


def test_without_something_else() -> None:
    """An installation that is broken is no matter of the extra."""
    command = [sys.executable, "-c", HIDE, "html", "probe", REFUSED, "--count", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
    assert result.returncode == 1
    assert "ModuleNotFoundError: import of html halted" in result.stderr


@pytest.mark.parametrize(("module", "package"), [("rich", "rich"), ("hdrh", "hdrhistogram")])
def test_without_the_extra(module: str, package: str) -> None:
    """The quick check needs none of it; a measurement says what to install."""
    with Peer(echo) as peer:
        command = [sys.executable, "-c", HIDE, module, "probe", peer.target]
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
        assert (result.returncode, result.stderr) == (0, "")
        command += ["--count", "1"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"echod: a measurement needs {package}, which is not installed: pip install 'echod[probe]'\n"
    )


# --- signals, and the terminal


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_a_measurement(number: signal.Signals, ending: str) -> None:
    """What was measured so far is printed."""
    enough = threading.Event()

    def act(sock: socket.socket, count: int, message: bytes) -> None:
        sock.sendall(message)
        if count == 500:
            enough.set()

    with Peer(messages(64, act)) as peer:
        command = [sys.executable, "-m", "echod", "probe", peer.target, "--duration", "1000", "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment())
        assert enough.wait(PATIENCE)
        process.send_signal(number)
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    found = json.loads(output)
    assert (found["ending"], found["signal"], found["errors"], errors) == (ending, number.name, {}, b"")
    assert found["messages"] >= 500
    assert 0 < found["seconds"] < PATIENCE


def test_a_signal_ends_connecting() -> None:
    """Nothing was measured, and nobody waits for the timeout."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        host, port = listening.getsockname()
        options = ("--tls", "--insecure", "--timeout", "1000", "--count", "1")
        command = [sys.executable, "-m", "echod", "probe", f"{host}:{port}", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment())
        sock, _ = listening.accept()
        with sock:
            assert sock.recv(1)  # it has sent its ClientHello, and waits for the answer
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (130, b"")
    assert b"ended by SIGINT: this is what was measured so far\n" in output
    assert re.search(rb"messages +0 ", output)


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


class Terminal:
    """A command in a terminal, and all that it shows."""

    def __init__(self, *arguments: str) -> None:
        self.shown = ""
        self._pid, self._descriptor = pty.fork()
        if self._pid == 0:
            environment = clean_environment({"TERM": "xterm", "COLUMNS": "120", "LINES": "40"})
            os.execve(sys.executable, [sys.executable, "-m", "echod", *arguments], environment)

    def write(self, text: str) -> None:
        """Be the keyboard."""
        os.write(self._descriptor, text.encode())

    def read_until(self, pattern: str) -> None:
        """Read until something like that was shown."""
        while not re.search(pattern, self.shown):
            assert self._read(), self.shown

    def wait(self) -> int:
        """Read to the end, and return the exit code."""
        while self._read():
            pass
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def _read(self) -> bool:
        assert select.select([self._descriptor], [], [], PATIENCE)[0], self.shown
        try:
            self.shown += os.read(self._descriptor, 65536).decode()
        except OSError:  # EIO: the terminal has nobody any more
            return False
        return True


def test_progress_on_a_terminal() -> None:
    """The bar moves, Ctrl-C ends it, and the report stands where the bar was."""
    with Peer(echo) as peer:
        terminal = Terminal("probe", peer.target, "--duration", "1000", "--connections", "2")
        terminal.read_until(r"0\.[0-9] s  [0-9,]+/s  p50 \S+ .s, max \S+ .s")
        terminal.read_until(r"1\.[0-9] s  [0-9,]+/s")
        terminal.write("\x03")
        assert terminal.wait() == 130
    _, bar, report = terminal.shown.partition("\x1b[?25h")  # the cursor is shown again: that was the bar
    assert bar
    assert "ended by SIGINT" in report
    assert "p99.9" in report
    assert "\x1b[1m" in report  # bold
    assert "Traceback" not in terminal.shown


def test_progress_of_a_count_and_of_a_stream() -> None:
    """A terminal shows errors at once."""
    with Peer(each(ending(640), echo)) as peer:
        terminal = Terminal("probe", peer.target, "--rate", "50", "--count", "100", "--connections", "2")
        terminal.read_until("1 errors")
        assert terminal.wait() == 1
        assert "early_eof 1" in terminal.shown
    with Peer(echo) as peer:
        terminal = Terminal("probe", peer.target, "--stream", "--duration", "1")
        terminal.read_until(r"0\.[0-9] s  [0-9.]+ .B/s")
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.shown


# --- states that a client outside cannot choose


@contextlib.contextmanager
def loaded(*arguments: str) -> Iterator[tuple[measure_module.Load, list[socket.socket]]]:
    """Give a measurement whose connections are there, and have not sent anything, and the server's ends of them."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        order = command.parse([f"127.0.0.1:{listening.getsockname()[1]}", *arguments])
        display = stack.enter_context(progress.Display(order))
        load = measure_module.Load(order, measure_module.Interrupt(), display)
        load.connect()
        yield load, [stack.enter_context(listening.accept()[0]) for _ in range(order.connections)]


def wait_for_ends(load: measure_module.Load) -> None:
    """Wait until the kernel has heard that the connections have ended."""
    for connection in load._live.values():
        assert select.select([connection.socket], [], [], PATIENCE)[0]


def test_moments_of_the_schedule() -> None:
    """What is due in less time than a wait would take is waited for without one; what cannot be sent yet, by nobody."""
    with loaded("--rate", "1", "--count", "3") as (load, ends):
        connection = load._live[0]
        load._began = 0
        load._next = 1
        assert load._schedule(999_999_999) == []
        assert connection.goal == 0
        load._selector.modify(connection.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)
        connection.watched |= selectors.EVENT_WRITE  # as where a message before has gone in part
        assert len(load._schedule(1_000_000_000)) == 1
        assert (connection.goal, connection.sent) == (64, 0)
        load._quota = 2
        load._begin(connection, 1, 0)
        assert (connection.goal, connection.sent) == (128, 0)
        load._write(connection)
        assert (connection.sent, connection.watched) == (128, selectors.EVENT_READ)
        assert len(ends[0].recv(128, socket.MSG_WAITALL)) == 128
        load._finish(0)


@pytest.mark.parametrize("options", [("--count", "3"), ("--rate", "1", "--count", "3")])
def test_reset_before_the_first_message(options: tuple[str, ...]) -> None:
    """It is sending that fails then."""
    with loaded(*options) as (load, ends):
        reset(ends[0])
        wait_for_ends(load)
        figures = load.run()
    assert figures.errors == {"reset": 1}
    assert (figures.latencies.count, figures.sent, figures.unanswered) == (0, 0, 1)
    assert figures.problem == "connection 0: Connection reset by peer"


def test_reset_of_a_connection_without_messages() -> None:
    """It is the half-close that fails then."""
    with loaded("--count", "1", "--connections", "2", "--half-close") as (load, ends):
        for end in ends:
            reset(end)
        wait_for_ends(load)
        figures = load.run()
    assert figures.errors.total() == 2
    assert figures.unanswered == 1


def test_an_event_of_what_has_ended() -> None:
    """One connection's event may end another one that has an event of its own."""
    with loaded("--count", "1") as (load, ends):
        ends[0].close()
        wait_for_ends(load)
        load._serve(load._selector.select(0) * 2)
        figures = load.run()
    assert figures.errors == {"early_eof": 1}


def test_latencies_of_all_kinds() -> None:
    """However many different ones there are, the percentiles are right to three digits, and the rest is exact."""
    values = [1_000 * number for number in range(1, 200_001)]
    latencies = report.Latencies()
    for start in range(0, len(values), 500):
        latencies.add(values[start : start + 500])
    assert latencies.count == 200_000
    assert latencies.mean == pytest.approx(0.1000005)
    assert (latencies.least, latencies.most) == (1e-6, 0.2)
    for percent, seconds in latencies.percentiles([0, 50, 90, 99.9, 100]).items():
        assert seconds == pytest.approx(max(0.2 * percent / 100, 1e-6), rel=0.001)
    bars = latencies.bars()
    assert sum(bar.messages for bar in bars) == 200_000
    assert bars[-1].limit == 0.2
    for bar, longer in itertools.pairwise(bars):
        assert bar.messages <= longer.messages
        assert longer.limit / bar.limit == pytest.approx(bars[1].limit / bars[0].limit)


def test_latencies_that_are_all_the_same() -> None:
    latencies = report.Latencies()
    latencies.add([5_000] * 3)
    assert latencies.bars() == [(5e-6, 3)]


# --- TLS


class Authority:
    """A certificate authority, a server's certificate of it and a client's, as files."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca)
        server = authority.issue_cert("localhost", "127.0.0.1")
        client = authority.issue_cert("client@example.org")
        self.both = str(folder / "both.pem")
        client.private_key_and_cert_chain_pem.write_to_path(self.both)
        self.certificate, self.key = str(folder / "client.pem"), str(folder / "client.key")
        client.cert_chain_pems[0].write_to_path(self.certificate)
        client.private_key_pem.write_to_path(self.key)
        self.server = str(folder / "server.pem")
        server.private_key_and_cert_chain_pem.write_to_path(self.server)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.configure_cert(self.context)
        self.demanding = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.configure_cert(self.demanding)
        authority.configure_trust(self.demanding)
        self.demanding.verify_mode = ssl.CERT_REQUIRED


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


def test_tls(authority: Authority) -> None:
    with Peer(echo, tls=authority.context) as peer:
        for options in (("--half-close",), ("--server-name", "localhost")):
            result = run("probe", peer.target, "--tls", "--ca", authority.ca, *options)
            assert (result.returncode, result.stderr) == (0, "")
            assert CHECK.fullmatch(result.stdout)
        port = peer.target.rpartition(":")[2]
        assert run("probe", f":{port}", "--tls", "--ca", authority.ca).returncode == 0
        assert run("probe", peer.target, "--tls", "--insecure").returncode == 0
        assert peer.errors == []


@pytest.mark.parametrize("arguments", [("--half-close",), ("--count", "100", "--pipeline", "4", "--half-close")])
def test_all_listeners_of_the_daemon(
    start: Start, authority: Authority, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """Whatever echod listens on and asks for, its own client speaks."""
    path = tmp_path / "echo.sock"
    daemon = start(
        *("--listeners.secure.address", "127.0.0.1:0", "--listeners.secure.tls.certificate", authority.server),
        *("--listeners.secure.tls.private-key", authority.server, "--listeners.secure.tls.client-ca", authority.ca),
        *("--listeners.behind.address", "127.0.0.1:0", "--listeners.behind.proxy-protocol", "require"),
        *("--listeners.behind.proxy-trusted", "127.0.0.0/8", "--listeners.local.address", f"unix:{path}"),
        *("--log.connections", "all"),
        listen=None,
    )
    daemon.wait_for("listening", count=3)
    addresses = {line["listener"]: line["address"] for line in daemon.all("listening")}
    tls = ("--tls", "--ca", authority.ca, "--cert", authority.both)
    for listener, options in {
        "secure": tls,
        "behind": ("--proxy-v1", "192.0.2.7:4321"),
        "local": (),
    }.items():
        result = run("probe", addresses[listener], *options, *arguments)
        assert (result.returncode, result.stderr) == (0, "")
        closed = daemon.wait_for("client_closed", listener=listener)
        assert closed["reason"] == "eof"
        assert closed["received"] == (6400 if "--count" in arguments else 64)
    assert run("probe", addresses["behind"], "--proxy-v2", "192.0.2.8:1", *arguments).returncode == 0
    clients = [line["client"] for line in daemon.all("client_closed") if line["listener"] == "behind"]
    assert clients[0] == "192.0.2.7:4321"
    daemon.wait_for("client_closed", listener="behind", client="192.0.2.8:1")


def test_tls_is_verified(authority: Authority) -> None:
    """Neither an unknown authority nor another name will do: there is no connection then."""
    with Peer(echo, tls=authority.context) as peer:
        line = check(peer.target, "--tls", code=69)
        assert line == "no connection: certificate verify failed: unable to get local issuer certificate"
        line = check(peer.target, "--tls", "--ca", authority.ca, "--server-name", "example.org", code=69)
        assert line.startswith("no connection: certificate verify failed: Hostname mismatch")
        assert measure(peer.target, "--tls", code=69)["errors"] == {"tls": 1}
        assert measure(peer.target, "--tls", "--count", "1", code=69)["errors"] == {"tls": 1}
    # The server was told why.
    assert set(peer.errors) == {"TLSV1_ALERT_UNKNOWN_CA", "SSLV3_ALERT_BAD_CERTIFICATE"}


def test_tls_to_who_speaks_none() -> None:
    def talks(sock: socket.socket) -> None:
        sock.sendall(b"220 hello\r\n")
        silent(sock)

    with Peer(talks) as peer:
        assert check(peer.target, "--tls", "--insecure", code=69).startswith("no connection: ")
    with Peer(closing) as peer:
        line = check(peer.target, "--tls", "--insecure", code=69)
        assert line in {  # a reset where our ClientHello was there before it closed
            "no connection: the connection ended without close_notify",
            "no connection: Connection reset by peer",
        }
    with Peer(silent) as peer:
        assert check(peer.target, "--tls", "--insecure", "--timeout", "0.2", code=69) == "no connection: timed out"


def test_tls_client_certificate(authority: Authority) -> None:
    """With TLS 1.3 a client learns after its handshake that the server does not want it."""
    with Peer(echo, tls=authority.demanding) as peer:
        options = ("--tls", "--ca", authority.ca)
        for files in (("--cert", authority.both), ("--cert", authority.certificate, "--key", authority.key)):
            assert run("probe", peer.target, *options, *files).returncode == 0
        line = check(peer.target, *options, code=1)
        assert re.fullmatch("no echo: .*alert certificate required", line)
        assert measure(peer.target, *options, "--count", "1", code=1)["errors"] == {"tls": 1}


def test_tls_files(authority: Authority, tmp_path: Path) -> None:
    """What is wrong with a file is a usage error that names its option."""
    start = "echod probe: error: "
    encrypted = tmp_path / "encrypted.key"
    key = serialization.load_pem_private_key(Path(authority.key).read_bytes(), None)
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    junk = tmp_path / "junk.pem"
    junk.write_text("junk\n")
    for options, message in {
        ("--ca", str(junk)): f"--ca: {str(junk)!r}: no certificate or crl found",
        ("--cert", str(tmp_path)): f"--cert: {str(tmp_path)!r} cannot be read: Is a directory",
        ("--cert", authority.ca): f"--key: {authority.ca!r}: holds no PEM of the kind that is needed",
        ("--cert", authority.both, "--key", str(encrypted)): (
            f"--key: {str(encrypted)!r}: it is encrypted, and nobody is there to type its password"
        ),
        ("--cert", authority.ca, "--key", authority.key): f"--key: {authority.key!r}: key values mismatch",
        ("--cert", authority.both, "--key", "/nowhere"): "--key: '/nowhere' cannot be read: No such file or directory",
    }.items():
        result = run("probe", REFUSED, "--tls", *options)
        assert (result.returncode, result.stderr.splitlines()[1]) == (2, start + message)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_measurement_over_tls(authority: Authority, version: ssl.TLSVersion) -> None:
    """Closed loop, large messages, streams, and the half-close with close_notify."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.server)
    context.maximum_version = version
    with Peer(echo, tls=context) as peer:
        options = (peer.target, "--tls", "--ca", authority.ca, "--connections", "3")
        found = measure(*options, "--count", "500", "--size", "1000", "--pipeline", "4", "--half-close")
        assert found["tls"] == version.name.replace("_", ".")
        assert (found["messages"], found["bytes_received"], found["errors"]) == (500, 500_000, {})
        found = measure(*options, "--count", "200", "--rate", "400")
        assert (found["messages"], found["errors"]) == (200, {})
        found = measure(*options, "--stream", "--duration", "0.5", "--half-close")
        assert found["bytes_sent"] == found["bytes_received"] > 0
    assert peer.errors == []


def test_large_messages_over_tls(authority: Authority) -> None:
    """Ciphertext that the socket does not take at once is sent later, and echo is received meanwhile."""
    options = ("--tls", "--insecure", "--count", "6", "--size", "1MB", "--pipeline", "2", "--half-close")
    with Peer(echo, narrow(), authority.context) as peer:
        found = measure(peer.target, *options)
        assert (found["bytes_received"], found["errors"]) == (6_000_000, {})
        found = measure(peer.target, "--tls", "--insecure", "--stream", "--duration", "0.5", "--half-close")
        assert found["bytes_sent"] == found["bytes_received"] > 0


def test_a_tls_server_that_does_not_receive_while_it_sends(authority: Authority) -> None:
    """Nor does it receive on until somebody takes its echo: so that is taken even while nothing can be sent."""

    def handler(sock: socket.socket) -> None:
        while data := receive(sock, 300_000):
            sock.sendall(data)

    with Peer(handler, narrow(), authority.context) as peer:
        options = ("--tls", "--insecure", "--count", "4", "--size", "300kB", "--pipeline", "4", "--timeout", "3")
        order = command.parse([peer.target, *options])
        with progress.Display(order) as display:
            load = measure_module.Load(order, measure_module.Interrupt(), display)
            load.connect()
            # So little that one record does not go into it.
            load._live[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
            figures = load.run()
    assert (figures.latencies.count, figures.errors) == (4, {})


def test_tls_that_breaks_off(authority: Authority) -> None:
    """What is no TLS, in the middle of it; and whoever goes on nevertheless gets no further."""

    def handler(sock: socket.socket) -> None:
        sock.recv(64)
        with socket.socket(fileno=os.dup(sock.fileno())) as plain:
            plain.sendall(b"junk in place of a record")
        sock.recv(1)

    with Peer(handler, tls=authority.context) as peer:
        line = check(peer.target, "--tls", "--insecure", code=1)
        assert line == "no echo: wrong version number"
        order = command.parse([peer.target, "--tls", "--insecure"])
        connection = order.route.connect(order.route.endpoints(PATIENCE), time.perf_counter() + PATIENCE)
        assert connection.channel.send(b"x") == 1
        with pytest.raises(TlsError, match="wrong version number"):
            connection.channel.recv(1)
        with pytest.raises(TlsError):
            connection.channel.send(b"x")
        connection.channel.close()


def test_tls_without_close_notify(authority: Authority) -> None:
    """A FIN alone may come from anybody."""

    def handler(sock: socket.socket) -> None:
        sock.sendall(sock.recv(64))
        assert sock.recv(1) == b""
        sock.shutdown(socket.SHUT_WR)  # of the TCP connection: `unwrap` would be that of TLS

    with Peer(handler, tls=authority.context) as peer:
        options = ("--tls", "--insecure", "--half-close")
        line = check(peer.target, *options, code=1)
        assert line == "64 of 64 bytes came back, then: the connection ended without close_notify"
        assert measure(peer.target, *options, "--count", "1", code=1)["errors"] == {"tls": 1}
