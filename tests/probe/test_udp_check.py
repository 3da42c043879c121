"""The quick check of `echod probe udp:HOST:PORT`."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from datagrams import UdpPeer, changing, echo, silent, twins
from echod.probe import arguments
from echod.probe.model import Outcome
from echod.probe.udp import check as udp_check
from harness import PATIENCE, clean_environment, run
from namespaces import namespace
from probing import check, measure

if TYPE_CHECKING:
    from datagrams import Script

pytestmark = pytest.mark.once


def failure(target: str, *options: str, code: int) -> tuple[str, dict[str, int]]:
    """Run a quick check that fails in this process. Return its error without the target, and the errors as JSON."""
    result = udp_check.run(arguments.parse([target, "--json", *options]))
    assert result.outcome is (Outcome.FAILED if code == 1 else Outcome.UNREACHABLE)
    found = json.loads(result.text)
    assert (found["ending"], found["problem"]) == (result.outcome.value, result.problem)
    assert result.problem.startswith(f"{target}: ")
    return result.problem.removeprefix(f"{target}: "), found["errors"]


RIGHT = re.compile(r"\S+: 64 bytes came back right in [0-9.]+ ms\n")
REFUSED = "no echo: port unreachable (ICMP from 127.0.0.1)"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_check(host: str) -> None:
    with UdpPeer(echo, host) as peer:
        result = run("probe", peer.target)
        assert (result.returncode, result.stderr) == (0, "")
        assert RIGHT.fullmatch(result.stdout)
        found = measure(peer.target)
    assert (found["target"], found["mode"], found["ending"], found["errors"]) == (peer.target, "check", "right", {})
    assert 0 < found["seconds"] < PATIENCE
    assert len(peer.clients) == 2


def test_check_imports_little() -> None:
    """The check runs often as a health check, so it imports neither settings, event loop, TLS nor measurement."""
    code = "import sys; from echod.cli import main; sys.argv[1:] = ['probe', sys.argv[1]]; print(main(), *sys.modules)"
    with UdpPeer(echo) as peer:
        command = [sys.executable, "-c", code, peer.target]
        # Coverage measurement would import some of the modules itself.
        environment = {name: value for name, value in clean_environment().items() if not name.startswith("COVERAGE_")}
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    exit_code, *modules = result.stdout.splitlines()[1].split()
    assert exit_code == "0"
    heavy = {"pydantic", "structlog", "uvloop", "asyncio", "ssl", "json", "random", "rich", "hdrh", "echod.settings"}
    assert not heavy.intersection(modules)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (changing(3), r"wrong echo at offset 3: expected 0x4f, got 0x4e"),
        (changing(15), r"wrong echo at offset 15: expected 0x00, got 0x01"),
        (changing(63), r"wrong echo at offset 63: expected 0x[0-9a-f]{2}, got 0x[0-9a-f]{2}"),
        (lambda _, data: [data[:40]], r"wrong echo at offset 40: expected 0x[0-9a-f]{2}, got the end of the datagram"),
        (
            lambda _, data: [data + b"!"],
            r"wrong echo at offset 64: expected nothing, as no more had been sent, got 0x21",
        ),
        (lambda *_: [b""], r"wrong echo at offset 0: expected 0x9e, got the end of the datagram"),
        (lambda *_: [b"Monday, November 30\r\n"], r"wrong echo: the server sent 'Monday, November 30'"),
    ],
)
def test_wrong_echoes(script: Script, message: str) -> None:
    with UdpPeer(script) as peer:
        line, errors = failure(peer.target, code=1)
    assert re.fullmatch(message, line)
    assert errors == {"wrong_echo": 1}


def test_silence() -> None:
    """A server that does not answer fails the check, but it is not unreachable."""
    with UdpPeer(silent) as peer:
        assert failure(peer.target, "--timeout", "0.1", code=1) == ("no echo: timed out", {"timeout": 1})


def test_no_server() -> None:
    """The kind of an ICMP error is reported, and the host that sent it."""
    assert check("udp:127.0.0.1:1", code=69) == REFUSED
    assert failure("udp:127.0.0.1:1", code=69) == (REFUSED, {"port_unreachable": 1})
    assert failure("udp:[::1]:1", code=69)[0] == "no echo: port unreachable (ICMP from ::1)"
    line, errors = failure("udp:127.0.0.1:1", "--source", "192.0.2.1", code=69)
    assert (line, errors) == ("no echo: Cannot assign requested address", {"eaddrnotavail": 1})
    line, errors = failure("udp:name.invalid:7", code=69)
    assert line.startswith("no echo: the name cannot be resolved (")
    assert errors == {"name": 1}
    assert failure("udp:255.255.255.255:7", code=69) == ("no echo: Permission denied", {"eacces": 1})


def test_host_unreachable() -> None:
    """A router that rejects the datagram is named."""
    if shutil.which("iptables") is None:
        pytest.skip("not installed: iptables")
    rule = "iptables -A INPUT -p udp -d 127.0.0.9 -j REJECT --reject-with icmp-host-unreachable"
    command = [*namespace(rule), sys.executable, "-m", "echod", "probe", "udp:127.0.0.9:7007"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
    assert (result.returncode, result.stdout) == (69, "")
    assert result.stderr == "echod: udp:127.0.0.9:7007: no echo: host unreachable (ICMP from 127.0.0.9)\n"


class Clock:
    """A clock that the script advances. Each reading takes 1 ms, so that the timeout ends if the script does not run."""

    def __init__(self) -> None:
        self._seconds = 1000.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.advance(0.001)

    def advance(self, seconds: float) -> float:
        """Advance the clock, and return the time."""
        with self._lock:
            self._seconds += seconds
            return self._seconds


def test_a_lost_datagram_is_sent_again() -> None:
    """The next datagram is sent after a second, and any of their echoes passes the check."""
    clock = Clock()
    received: list[bytes] = []

    def script(_: int, datagram: bytes) -> list[bytes]:
        received.append(datagram)
        if len(received) == 3:
            return received[1:2]
        clock.advance(1)
        return []

    with UdpPeer(script) as peer:
        result = udp_check.run(arguments.parse([peer.target]), clock)
    assert result.outcome is Outcome.RIGHT
    assert re.search(r" right in 1[0-9]{3}\.[0-9]{3} ms \(without an echo before: 1\)\n", result.text)
    assert len(set(received)) == 3


def test_the_timeout_bounds_all_datagrams() -> None:
    clock = Clock()

    def script(*_: object) -> list[bytes]:
        clock.advance(1)
        return []

    with UdpPeer(script) as peer:
        result = udp_check.run(arguments.parse([peer.target, "--timeout", "3.5"]), clock)
    assert (result.outcome, result.problem) == (Outcome.FAILED, f"{peer.target}: no echo: timed out")
    assert len(peer.clients) == 4


def test_addresses_of_a_name() -> None:
    """An empty host stands for the loopback addresses of both families. One with a server is enough."""
    for host in ("127.0.0.1", "::1"):
        with UdpPeer(echo, host) as peer:
            assert RIGHT.fullmatch(udp_check.run(arguments.parse([f"udp::{peer.port}"])).text)
            assert measure(f"udp::{peer.port}", "--count", "5")["received"] == 5
    # An address of the other family does not count if the source has this one.
    assert failure("udp::1", "--source", "127.0.0.2", code=69)[0] == REFUSED
    line, errors = failure("udp::1", code=69)
    assert line.startswith("no echo: port unreachable (ICMP from ")
    assert errors == {"port_unreachable": 1}


def test_a_silent_address_does_not_hold_up_the_next_one() -> None:
    """The next address joins after 250 ms."""
    clock = Clock()

    def script(*_: object) -> list[bytes]:
        clock.advance(0.25)
        return []

    v4, v6 = twins(echo, script)
    with v4 as right, v6 as quiet:
        options = arguments.parse([f"udp::{right.port}"])
        first = options.route.endpoints(1)[0].family
        assert udp_check.run(options, clock).outcome is Outcome.RIGHT
    assert len(right.clients) == 1
    assert len(quiet.clients) == (first == socket.AF_INET6)


def test_a_socket_is_never_connected_to_itself() -> None:
    """If no server has the port, the kernel may choose it for the probe, which then receives its own datagrams."""
    prefix = namespace("echo 4007 4007 > /proc/sys/net/ipv4/ip_local_port_range")
    command = [*prefix, sys.executable, "-m", "echod", "probe", "udp:127.0.0.1:4007"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
    assert (result.returncode, result.stdout) == (69, "")
    assert result.stderr == "echod: udp:127.0.0.1:4007: no echo: Resource temporarily unavailable\n"


@pytest.mark.parametrize("options", [(), ("--count", "1")])
def test_a_signal_ends_a_check(options: tuple[str, ...]) -> None:
    """It also ends the check by which a measurement chooses among several addresses."""
    v4, v6 = twins(silent, silent)
    with v4 as peer, v6 as other:
        command = [sys.executable, "-m", "echod", "probe", f"udp::{peer.port}", "--timeout", "1000", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment())
        other.wait(1)
        peer.wait(1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (130, b"")
    assert bool(output) == bool(options)
