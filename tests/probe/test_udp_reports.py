"""The reports of a UDP measurement, its options on the wire, and its end by a signal."""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest

from datagrams import UdpPeer, echo, silent, twins
from echod.probe import arguments, progress
from echod.probe.load import Interrupt
from echod.probe.model import Outcome
from echod.probe.udp import measure as udp
from echod.probe.udp import report, sockets
from echod.probe.udp.measure import Results
from echod.probe.udp.payload import Payloads
from echod.probe.udp.tally import Tally
from harness import PATIENCE, clean_environment, run
from probing import measure

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.once


def results(received: int, lost: int, flying: int = 0) -> Results:
    """Return the results of a measurement over one second."""
    tally = Tally(Payloads(b"sessio", bytes(1000), 100, 64), 1)
    for datagram in [tally.send(0, 0) for _ in range(received)]:
        tally.receive(datagram, 0)
    for _ in range(lost):
        tally.send(0, 0)
    tally.expire(1)
    for _ in range(flying):
        tally.send(0, 0)
    return Results(tally, seconds=1, send_seconds=1)


def test_json() -> None:
    """The report has each datagram once, and the same latencies as that of TCP."""
    with UdpPeer(echo) as peer:
        found = measure(peer.target, "--count", "100", "--window", "4", "--size", "1KiB", "--timeout", "60")
    assert (found["target"], found["mode"], found["ending"], found["errors"]) == (peer.target, "closed", "right", {})
    assert (found["sent"], found["received"], found["lost"], found["unanswered"]) == (100, 100, 0, 0)
    assert (found["size"], found["window"], found["rate"], found["rate_reached"]) == (1024, 4, None, None)
    assert (found["loss_percent"], found["max_loss_percent"], found["send_lag"]) == (0, 0, None)
    assert found["sent_per_second"] == pytest.approx(100 / found["seconds"])
    assert 0 < found["latency"]["min"] <= found["latency"]["p50"] <= found["latency"]["max"]
    assert sum(count for _, count in found["histogram"]) == 100
    assert found["hdr"].startswith("HISTF")


def test_report() -> None:
    with UdpPeer(echo) as peer:
        result = run("probe", peer.target, "--count", "200", "--interval", "1ms", "--timeout", "60")
    assert (result.returncode, result.stderr) == (0, "")
    title, *lines = result.stdout.splitlines()
    assert title.startswith(f"{peer.target}: datagrams of 64 B, 1,000 per second, ")
    rows = [line.split() for line in lines if line]
    assert rows[0][:2] == ["sent", "200"]
    assert rows[1:3] == [["received", "200"], ["lost", "0", "0%"]]
    names = ["late", "duplicated", "reordered", "corrupted", "foreign", "errors"]
    assert rows[3:9] == [[name, "0"] for name in names]
    assert rows[9][:3] == ["sent", "late", "by"]
    assert [row[0] for row in rows[10:15]] == ["p50", "p90", "p99", "p99.9", "max"]


@pytest.mark.parametrize(
    ("received", "lost", "allowed", "percent"),
    [
        (93, 7, "7", None),
        (92, 8, "7%", "8%, --max-loss is 7%"),
        (999, 1, "0.1", None),
        (998, 2, "0.1", "0.2%, --max-loss is 0.1%"),
        (43, 57, "57", None),
        (0, 5, "100", None),
        (0, 5, "99.9", "100%, --max-loss is 99.9%"),
        (1_000, 0, "0", None),
        (999, 1, "0", "0.1%, --max-loss is 0%"),
    ],
)
def test_the_highest_loss(received: int, lost: int, allowed: str, percent: str | None) -> None:
    """The exit code is 1 if more datagrams were lost than the option allows. The comparison is exact."""
    options = arguments.parse(["udp:h:7", "--max-loss", allowed])
    result = report.result(options, results(received, lost))
    assert result.outcome is (Outcome.RIGHT if percent is None else Outcome.FAILED)
    problem = f"udp:h:7: {lost} of {received + lost:,} datagrams lost ({percent})"
    assert result.problem == ("" if percent is None else problem)


def test_errors_with_an_allowed_loss() -> None:
    """An error alone is not a failure, as its datagram is lost."""
    found = results(99, 1)
    found.errors["port_unreachable"] = 1
    result = report.result(arguments.parse(["udp:h:7", "--max-loss", "1"]), found)
    assert (result.outcome, result.problem) == (Outcome.RIGHT, "")
    assert re.search(r"errors +1 +port_unreachable 1\n", result.text)


def test_warnings() -> None:
    """The report says if the probe itself has dropped datagrams, or has not reached the rate."""
    found = results(300, 5)
    found.receive_drops = 4
    options = ["udp:h:7", "--rate", "1000"]
    text = report.result(arguments.parse(options), found).text
    assert "\n4 datagrams were dropped at the probe's own socket: lower the rate\n" in text
    assert "\nrate not reached: 305/s of 1,000/s\n" in text
    assert json.loads(report.result(arguments.parse([*options, "--json"]), found).text)["rate_reached"] is False


def test_a_measurement_that_was_interrupted_at_once() -> None:
    found = results(0, 0, flying=3)
    found.signal = signal.SIGTERM
    found.seconds = 0
    result = report.result(arguments.parse(["udp:h:7", "--count", "3"]), found)
    assert (result.outcome, result.problem) == (Outcome.TERMINATED, "")
    assert re.search(r"unanswered +3\n", result.text)
    assert re.search(r"lost +0\n", result.text)


def test_drops_of_the_own_socket() -> None:
    """The kernel tells how many datagrams found the receive buffer full."""
    with UdpPeer(silent) as peer:
        options = arguments.parse([peer.target])
        with sockets.connect(options.route, options.route.endpoints(1)[0]) as sock:
            assert sockets.receive_drops(sock) == 0
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            for _ in range(100):
                peer.socket.sendto(bytes(1000), sock.getsockname())
            drops = sockets.receive_drops(sock)
            assert drops is not None
            assert 0 < drops < 100
            for _ in range(100 - drops):
                assert len(sock.recv(1000, socket.MSG_DONTWAIT)) == 1000
            with pytest.raises(BlockingIOError):
                sock.recv(1000, socket.MSG_DONTWAIT)


def test_plot(tmp_path: Path) -> None:
    path = tmp_path / "echo.svg"
    with UdpPeer(echo) as peer:
        assert measure(peer.target, "--count", "100", "--plot", str(path))["received"] == 100
        labels = [element.text for element in ET.fromstring(path.read_text("utf-8")).iter() if element.text]
        assert f"{peer.target}: datagrams of 64 B, 1 at a time" in labels
        result = run("probe", peer.target, "--count", "5", "--plot", "/dev/full")
    assert result.returncode == 1
    assert result.stderr == "echod: --plot: '/dev/full' cannot be written: No space left on device\n"
    assert "received" in result.stdout


def test_unreachable_measurement() -> None:
    result = run("probe", "udp:127.0.0.1:1", "--count", "3")
    assert (result.returncode, result.stdout) == (69, "")
    assert result.stderr == (
        "echod: udp:127.0.0.1:1: port unreachable (ICMP from 127.0.0.1) (errors by kind: port_unreachable 1)\n"
    )
    found = measure("udp:127.0.0.1:1", "--count", "3", code=69)
    assert (found["ending"], found["errors"], found["latency"]) == ("unreachable", {"port_unreachable": 1}, None)
    found = measure("udp:name.invalid:7", "--count", "3", code=69)
    assert (found["ending"], found["errors"], found["sent"]) == ("unreachable", {"name": 1}, 0)


def test_choosing_an_address() -> None:
    """A server that is silent or wrong fails the quick check, by which a measurement chooses an address."""
    for script, word in ((silent, "timeout"), (lambda *_: [b"hello"], "wrong_echo")):
        v4, v6 = twins(script, script)
        with v4, v6:
            options = arguments.parse([f"udp::{v4.port}", "--count", "3", "--timeout", "0.1"])
            with progress.Display(options) as display:
                found = udp.Measurement(options, Interrupt(), display).run()
        assert (found.errors, found.tally.sent) == ({word: 1}, 0)
        assert report.result(options, found).outcome is Outcome.FAILED


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_a_measurement(number: signal.Signals, ending: str) -> None:
    """The results so far are printed. A datagram in flight is unanswered, and not lost."""
    with UdpPeer(lambda count, datagram: [datagram] if count < 50 else []) as peer:
        options = ("--duration", "1000", "--timeout", "1000", "--json")
        command = [sys.executable, "-m", "echod", "probe", peer.target, *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment())
        peer.wait(51)
        process.send_signal(number)
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    found = json.loads(output)
    assert (found["ending"], found["signal"], found["errors"], errors) == (ending, number.name, {}, b"")
    assert (found["sent"], found["received"], found["lost"], found["unanswered"]) == (51, 50, 0, 1)
    assert 0 < found["seconds"] < PATIENCE


def marks(sock: socket.socket) -> tuple[int, int]:
    """Receive a datagram, echo it, and return the DSCP and the TTL of its packet."""
    data, ancillary, _, client = sock.recvmsg(2000, 256)
    sock.sendto(data, client)
    found = {kind: struct.unpack("i", value)[0] if len(value) == 4 else value[0] for _, kind, value in ancillary}
    v6 = sock.family == socket.AF_INET6
    return found[socket.IPV6_TCLASS if v6 else socket.IP_TOS] >> 2, found[socket.IPV6_HOPLIMIT if v6 else socket.IP_TTL]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these numbers of the options")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_dscp_and_ttl(host: str) -> None:
    """The packets have the DSCP and the TTL of the options."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE)
        sock.bind((host, 0))
        for option in (socket.IPV6_RECVTCLASS, socket.IPV6_RECVHOPLIMIT) if ":" in host else (13, 12):
            sock.setsockopt(socket.IPPROTO_IPV6 if ":" in host else socket.IPPROTO_IP, option, 1)
        target = f"udp:[{host}]:{sock.getsockname()[1]}" if ":" in host else f"udp:{host}:{sock.getsockname()[1]}"
        command = [sys.executable, "-m", "echod", "probe", target, "--dscp", "AF41", "--ttl", "7"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=clean_environment()) as process:
            assert marks(sock) == (34, 7)
            assert process.wait(PATIENCE) == 0


def test_dscp_and_ttl_of_tcp() -> None:
    """The options work for TCP too. The client's socket has them before it connects."""
    options = arguments.parse(["127.0.0.1:1", "--dscp", "46", "--ttl", "9"])
    with socket.socket() as sock:
        options.route.prepare(sock)
        assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == 46 << 2
        assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_TTL) == 9
