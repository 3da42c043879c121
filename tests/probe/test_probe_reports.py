"""The reports of `echod probe`: text, JSON, plot and histogram."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from echod.probe import arguments, report
from echod.probe.latencies import Latencies
from echod.probe.load import Results
from echod.probe.model import Outcome
from harness import PATIENCE, clean_environment, run
from peers import Peer, echo, ending
from probing import REFUSED, measure

pytestmark = pytest.mark.once


def test_report() -> None:
    """The text has a table of percentiles and a histogram of all messages."""
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
    assert result.stdout.startswith(f"{peer.target}: 1 connection, a stream in writes of 4,096 B, ")
    assert "second 2 " in result.stdout
    assert "p50" not in result.stdout


def test_report_of_a_rate_and_errors() -> None:
    with Peer(ending(640)) as peer:
        result = run("probe", peer.target, "--rate", "1000", "--count", "100")
    assert result.returncode == 1
    assert " 1 connection, 1,000 messages of 64 B per second, " in result.stdout
    assert "sent late by " in result.stdout
    assert re.search(r"errors +1 +early_eof 1\n", result.stdout)
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith(" (errors by kind: early_eof 1)\n")


@pytest.mark.parametrize(
    ("options", "messages", "seconds", "latency", "lag", "reached", "verdict"),
    [
        ("--rate 1000", 1000, 1.0, 0.0001, 0.01, True, ""),
        ("--rate 1000", 950, 1.0001, 0.0001, 0.01, True, ""),
        ("--rate 1000", 1000, 1.3, 0.3, 0.01, True, ""),
        ("--rate 3 --count 1", 1, 0.2, 0.2, 0.0, True, ""),
        ("--rate 1k", 940, 1.0, 0.0001, 0.04, False, "940/s of 1,000/s: the probe sent too slowly"),
        ("--rate 300k", 3000, 0.06, 0.0001, 0.04, False, "50,000/s of 300,000/s: the probe sent too slowly"),
        ("--rate 10M", 3000, 0.06, 0.0001, 0.001, False, "50,000/s of 10,000,000/s: the server answered too slowly"),
        ("--rate 1000", 0, 1.0, 0.0, 0.0, None, ""),
        ("--count 10", 10, 9.0, 0.1, 0.0, None, ""),
    ],
)
def test_verdict_on_a_rate(
    options: str, messages: int, seconds: float, latency: float, lag: float, reached: bool | None, verdict: str
) -> None:
    """The report says if the rate was not reached, and which side was too slow. The exit code stays 0."""
    results = Results(connected=1, seconds=seconds, lag=lag)
    results.latencies.add([int(latency * 1e9)] * messages)
    text = report.result(arguments.parse(["h:1", *options.split()]), results)
    found = report.result(arguments.parse(["h:1", *options.split(), "--json"]), results)
    assert text.outcome is found.outcome is Outcome.RIGHT
    assert json.loads(found.text)["rate_reached"] is reached
    lines = [line for line in text.text.splitlines() if "not reached" in line]
    assert lines == ([f"rate not reached: {verdict}"] if verdict else [])


def test_a_rate_that_no_probe_reaches() -> None:
    with Peer(echo) as peer:
        result = run("probe", peer.target, "--rate", "10M", "--count", "2000")
        assert (result.returncode, result.stderr) == (0, "")
        assert re.search(
            "\nrate not reached: [0-9,]+/s of 10,000,000/s: the (probe|server) .* too slowly\n", result.stdout
        )
        assert measure(peer.target, "--rate", "10M", "--count", "2000")["rate_reached"] is False


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_report_that_cannot_be_written() -> None:
    """The exit code is 1 even if the echo was right."""
    with Peer(echo) as peer:
        command = ["sh", "-c", 'exec "$@" >/dev/full', "sh", sys.executable, "-m", "echod", "probe", peer.target]
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
    assert (result.returncode, result.stderr) == (1, "echod: standard output: No space left on device\n")


def test_unreachable_measurement() -> None:
    result = run("probe", REFUSED, "--count", "1")
    assert (result.returncode, result.stdout) == (69, "")
    assert result.stderr == (
        f"echod: {REFUSED}: connection 0: no connection: Connection refused (errors by kind: refused 1)\n"
    )
    assert measure(REFUSED, "--count", "1", code=69)["ending"] == "unreachable"


def test_plot(tmp_path: Path) -> None:
    """The plot is a self-contained SVG file with labels and a point for each percentile."""
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
        # A single message can be plotted too.
        assert run("probe", peer.target, "--count", "1", "--plot", str(path)).returncode == 0
        assert ET.fromstring(path.read_text("utf-8")).tag == f"{name}svg"
    assert found["messages"] == 2000


def test_a_plot_that_cannot_be_written(tmp_path: Path) -> None:
    """The error is reported before the measurement starts, if possible."""
    with Peer(echo) as peer:
        result = run("probe", peer.target, "--duration", "1000", "--plot", str(tmp_path))
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"echod: --plot: {str(tmp_path)!r} cannot be written: Is a directory\n"
        assert not peer.peers
        result = run("probe", peer.target, "--count", "5", "--plot", "/dev/full")
    assert result.returncode == 1
    assert result.stderr == "echod: --plot: '/dev/full' cannot be written: No space left on device\n"
    assert "messages" in result.stdout


def test_latencies_of_all_kinds() -> None:
    """With many different values, percentiles have three significant digits. Count, mean, minimum and maximum are exact."""
    values = [1_000 * number for number in range(1, 200_001)]
    latencies = Latencies()
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
    latencies = Latencies()
    latencies.add([5_000] * 3)
    assert latencies.bars() == [(5e-6, 3)]
