"""Test the benchmark's summary, page and charts.

The page shows the figures of the runs, and it mentions every failed run and every missing server.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest

import charts
import report
import servers
from figures import ECHOD, EPOLL, GO, UNLOGGED, UVLOOP, WORKLOADS, Results, dump, number, summarize

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "full.json"
# CPU per message in the three rounds, µs. In the second round, every server is slower.
COSTS = {ECHOD: (8, 18, 9), EPOLL: (10, 20, 10), "socat": (40, 80, 40)}
COUNTS = (1, 10, 10000)
BAR = re.compile(r"M([\d.]+) \d+H([\d.]+)")


def runs() -> Iterator[dict[str, Any]]:
    """Yield runs of all workloads without TLS."""
    for turn in range(3):
        for peer, costs in COSTS.items():
            cost = costs[turn] * 1e-6
            run = {"peer": peer, "round": turn, "seconds": 1.0}
            traffic = run | {"units": 10_000, "bytes": 5_000_000, "cpu": 10_000 * cost, "load_cpu": 0.5}
            for workload, clients, size in (("pingpong", 50, 512), ("stream", 8, 65536), ("connect", 4, 64)):
                yield traffic | {"workload": workload, "clients": clients, "size": size}
            grown = 1_000_000 + int(cost * 3e6) * 1024 * 1000
            yield run | {
                "workload": "idle",
                "clients": 10_000,
                "cpu": 0.001,
                "memory_before": 1_000_000,
                "memory_after": grown,
            }
            latencies = {"p50": cost, "p99": 2 * cost, "p999": 3 * cost, "max": 400 * cost}
            yield traffic | {"workload": "latency", "clients": 50, "rate": 4321.0, "latency": latencies}
            for clients in COUNTS:
                price = cost * (1.1 if clients == 1 else 1)
                yield traffic | {"workload": "clients", "clients": clients, "rate": 10_000.0, "cpu": 10_000 * price}
            yield run | {"workload": "start", "seconds": 0.25, "cpu": 0.2}
        receipt = {"clients": 10_000, "quiet": 10_000 - turn // 2, "cut": turn // 2, "seconds": 3.0 + turn}
        drain = {"clients": 10_000, "seconds": 4.5, "quiet_period": 2.0, "cpu": 1.0, "receipt": receipt}
        yield {"workload": "drain", "peer": ECHOD, "round": turn, **drain}


@pytest.fixture
def data() -> dict[str, Any]:
    """Return a made-up measurement that a test may change."""
    machine = {"cpu": "abacus", "cores": 2, "kernel": "6.9", "memory_gib": 8, "python": "3.13.0", "date": "2026-01-02"}
    return {
        "machine": machine | {"echod": "1.2 (abc)"},
        "settings": {"rounds": 3, "seconds": 1.0, "quick": False},
        "peers": {peer: {"about": f"about {peer}", "version": "7", "serious": peer != "socat"} for peer in COSTS},
        "missing": {"io_uring": "liburing.h is not found"},
        "runs": list(runs()),
    }


def section(data: dict[str, Any], title: str) -> str:
    """Return the text of the page under a heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page(data), re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def page(data: dict[str, Any], changes: str = "") -> str:
    """Return the page of a measurement."""
    return report.page(results_of(data), changes)


def results_of(data: dict[str, Any]) -> Results:
    """Return the summary of a measurement, written and read."""
    return Results(json.loads(dump(summarize(data))))


def row(text: str, *start: str) -> list[str]:
    """Return the cells of the row that starts with the given cells."""
    head = "| " + " | ".join(start) + " | "
    found = [line for line in text.splitlines() if line.startswith(head)]
    assert len(found) == 1, text
    return found[0].removeprefix(head).removesuffix(" |").split(" | ")


def of(data: dict[str, Any], workload: str, peer: str) -> list[dict[str, Any]]:
    """Return the runs of one workload and server."""
    return [run for run in data["runs"] if (run["workload"], run["peer"]) == (workload, peer)]


def fail(run: dict[str, Any], reason: str) -> None:
    """Turn a run into a failed one."""
    for figure in run.keys() - {"workload", "peer", "round", "clients"}:
        del run[figure]
    run["error"] = reason


# Figures.


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0, "0"), (0.0123456, "0.0123"), (0.9996, "1.00"), (1, "1.00"), (9.996, "10.0"), (45.67, "45.7")],
        *[(999.6, "1,000"), (1234, "1,230"), (81_250, "81,200"), (1_234_567, "1,230,000"), (-2.345, "-2.35")],
    ],
)
def test_number(value: float, text: str) -> None:
    """A number of any size has three significant digits."""
    assert number(value) == text


def test_medians(data: dict[str, Any]) -> None:
    """A row shows medians with their ranges. The best server is first, and echod is bold."""
    text = section(data, "Ping-pong messages")
    assert "50 clients. Each sends 512 B" in text
    assert row(text, "**echod**") == ["9.00 (8.00 to 18.0)", "", "10,000 (10,000 to 10,000)", "9.00", "50.0"]
    names = re.findall(r"^\| (\S+) \| \d", text, re.MULTILINE)
    assert names == ["**echod**", "epoll", "socat"]


def test_ratios_are_of_rounds(data: dict[str, Any]) -> None:
    """Ratios are computed within rounds: 0.8, 0.9 and 0.9, although one round was twice as slow."""
    assert row(section(data, "Ping-pong messages"), EPOLL)[1] == "0.900 (0.800 to 0.900)"
    of(data, "pingpong", EPOLL)[1]["cpu"] = 0.09
    # The medians are still 9 and 10.
    assert row(section(data, "Ping-pong messages"), EPOLL)[1] == "0.900 (0.800 to 2.00)"
    of(data, "pingpong", EPOLL)[2]["round"] = 7
    assert row(section(data, "Ping-pong messages"), EPOLL)[1] == "1.40 (0.800 to 2.00)"


def test_every_work(data: dict[str, Any]) -> None:
    """Each workload has its own figures and units."""
    assert row(section(data, "Streams"), EPOLL)[0] == "20.0 (20.0 to 40.0)"
    assert "blocks of 64 KiB" in section(data, "Streams")
    assert row(section(data, "Connections"), EPOLL)[0] == "10.0 (10.0 to 20.0)"
    assert row(section(data, "Idle clients"), "**echod**") == ["2.70 (2.40 to 5.40)", "", "0.100 (0.100 to 0.100)"]
    latency = section(data, "Latency at half load")
    assert "4,321 messages per second" in latency
    cells = ["10.0 (10.0 to 20.0)", "20.0 (20.0 to 40.0)", "30.0 (30.0 to 60.0)", "0.900 (0.800 to 0.900)"]
    assert row(latency, EPOLL) == [*cells, "4,000 (4,000 to 8,000)"]
    clients = section(data, "From one client to many")
    assert "| peer | 1 | 10 | 10,000 | highest / lowest |" in clients
    cells = ["9.90 (8.80 to 19.8)", "9.00 (8.00 to 18.0)", "9.00 (8.00 to 18.0)", "1.10 (1.10 to 1.10)"]
    assert row(clients, "**echod**") == cells
    drain = section(data, "Graceful stop")
    assert row(drain, "**echod**")[0] == "4.50 (4.50 to 4.50)"
    assert row(drain, "**echod**")[2:] == ["2.50 (2.50 to 2.50)", "4,000 (4,000 to 4,000)", "100 (100 to 100)"]
    assert "- echod, the receipt of 2 of 3 rounds: 10,000 clients, 10,000 quiet, 0 cut\n" in drain
    assert "- echod, the receipt of 1 of 3 rounds: 10,000 clients, 9,999 quiet, 1 cut\n" in drain
    assert row(section(data, "Startup"), "**echod**") == ["250 (250 to 250)", "", "200 (200 to 200)"]


def test_no_ratio_without_echod(data: dict[str, Any]) -> None:
    """If echod was not measured, the column of ratios is empty."""
    data["runs"] = [run for run in data["runs"] if run["peer"] != ECHOD]
    assert row(section(data, "Streams"), EPOLL)[:2] == ["20.0 (20.0 to 40.0)", ""]


def test_flatness_is_of_medians(data: dict[str, Any]) -> None:
    """A slow round in one column widens the range of the ratio, but does not change its value."""
    slow = next(run for run in of(data, "clients", ECHOD) if (run["round"], run["clients"]) == (0, 10))
    slow["cpu"] *= 2
    # The medians of the columns are now 9.9, 16 and 9.
    assert row(section(data, "From one client to many"), "**echod**")[-1] == "1.78 (1.10 to 2.00)"
    slow["cpu"] /= 2
    next(run for run in of(data, "clients", ECHOD) if (run["round"], run["clients"]) == (1, 10))["cpu"] *= 2
    assert row(section(data, "From one client to many"), "**echod**")[-1] == "1.10 (1.10 to 2.00)"


def test_order(data: dict[str, Any]) -> None:
    """Latency is sorted by p99.9, and CPU by the highest number of clients. Servers that failed there are last."""
    latency, clients = (next(work for work in WORKLOADS if work.name == name) for name in ("latency", "clients"))
    for run in of(data, "latency", EPOLL):
        run["latency"] |= {"p50": 1.0, "p999": 1e-6}
    for run in of(data, "clients", ECHOD):
        run["cpu"] *= 2 if run["clients"] == 10_000 else 0.1
    assert [*results_of(data).rows(latency)] == [EPOLL, ECHOD, "socat"]
    assert [*results_of(data).rows(clients)] == [EPOLL, ECHOD, "socat"]
    for run in of(data, "clients", EPOLL):
        if run["clients"] == 10_000:
            fail(run, "reset")
    assert [*results_of(data).rows(clients)] == [ECHOD, "socat", EPOLL]


def test_the_load_generator_was_the_limit(data: dict[str, Any]) -> None:
    """A row says so if the generator was saturated in most rounds and the server was not."""
    for run in of(data, "pingpong", ECHOD)[:2]:
        run["load_cpu"] = 0.97
    of(data, "pingpong", EPOLL)[0]["load_cpu"] = 0.97
    for run in of(data, "pingpong", "socat"):
        run.update(load_cpu=0.97, cpu=0.99)
    text = section(data, "Ping-pong messages")
    assert row(text, "**echod**")[-1] == "97.0, the limit"
    assert row(text, EPOLL)[-1] == "50.0"
    assert row(text, "socat")[-1] == "97.0"
    # With a schedule, the load generator always polls.
    assert "the limit" not in section(data, "Latency at half load")


# Runs without figures.


def test_failed_runs(data: dict[str, Any]) -> None:
    """Failed runs are counted by reason. A server that always failed is in the last row."""
    fail(of(data, "pingpong", EPOLL)[2], "reset |\n by peer")
    for run in of(data, "pingpong", ECHOD):
        fail(run, "no <answer>")
    of(data, "connect", "socat")[0]["units"] = 0
    text = section(data, "Ping-pong messages")
    assert row(text, EPOLL)[0] == "15.0 (10.0 to 20.0)"
    assert row(text, "**echod**") == ["failed", "", "failed", "failed", "failed"]
    assert re.findall(r"^\| (\S+) \| [\df]", text, re.MULTILINE)[-1] == "**echod**"
    assert "- epoll: 1 of 3 runs failed: reset \\| by peer\n" in text
    assert "- echod: 3 of 3 runs failed: no \\<answer>\n" in text
    assert "- socat: 1 of 3 runs failed: nothing was echoed\n" in section(data, "Connections")


def test_failed_with_many_clients(data: dict[str, Any]) -> None:
    """A server that fails with many clients has figures for fewer clients."""
    for run in of(data, "clients", "socat"):
        if run["clients"] == 10_000:
            fail(run, "too many processes")
        if run["clients"] == 1:
            data["runs"].remove(run)
    text = section(data, "From one client to many")
    assert row(text, "socat") == ["not run", "40.0 (40.0 to 80.0)", "failed", ""]
    assert "- socat: 3 of 6 runs failed: too many processes\n" in text
    for run in of(data, "clients", EPOLL):
        fail(run, "no limits.conf")
        del run["clients"]
    text = section(data, "From one client to many")
    assert row(text, EPOLL) == ["failed", "failed", "failed", ""]


def test_missing_and_absent(data: dict[str, Any]) -> None:
    """Missing servers are listed with the reason. Each workload lists the servers it was not run with."""
    assert "- io_uring: liburing.h is not found\n" in section(data, "Servers")
    assert row(section(data, "Servers"), EPOLL) == ["about epoll", "7"]
    assert "- not run: epoll; socat; io_uring (liburing.h is not found)\n" in section(data, "Graceful stop")
    text = section(data, "Streams over TLS 1.3")
    assert "not run: echod; epoll; socat; io_uring" in text
    assert "svg" not in text
    assert "| peer" not in text
    data["missing"] = {}
    assert "Missing" not in page(data)
    assert "not run" not in section(data, "Streams")


def test_no_memory_and_no_quiet_period(data: dict[str, Any]) -> None:
    """A server without memory per client, or a stop shorter than the quiet period, causes no division by zero."""
    for run in of(data, "idle", EPOLL):
        run["memory_after"] = run["memory_before"]
    assert row(section(data, "Idle clients"), EPOLL)[:2] == ["0 (0 to 0)", ""]
    for run in of(data, "drain", ECHOD):
        run["seconds"] = 1.5
    assert row(section(data, "Graceful stop"), "**echod**")[2:4] == ["not run", "not run"]


# The targets.


def test_targets(data: dict[str, Any]) -> None:
    """The median decides whether a target is reached. A target without figures gives the reason."""
    data["peers"][GO] = {"about": "goroutines", "version": "1", "serious": True}
    for run in of(data, "latency", ECHOD):
        run["latency"]["p999"] *= 1.5
    text = section(data, "Targets")
    cells = ["1.10 times epoll", "0.900 (0.800 to 0.900)", "9.00 µs", "10.0 µs", "yes"]
    assert f"| Ping-pong messages | CPU per message | {' | '.join(cells)} |" in text
    assert "| Ping-pong messages | CPU per message | 1.00 times Go |  |  |  | not measured: Go: not run |" in text
    assert "| Streams | CPU per GB | 1.00 times epoll | 0.900 (0.800 to 0.900) | 18.0 s | 20.0 s | yes |" in text
    assert "| Idle clients | memory per client | 3.00 KiB | 2.70 (2.40 to 5.40) KiB |  |  | yes |" in text
    assert row(text, "Idle clients", "CPU") == ["0.20 %", "0.100 (0.100 to 0.100) %", "", "", "yes"]
    flat = row(text, "From one client to many", "highest / lowest CPU per message")
    assert flat == ["1.15", "1.10 (1.10 to 1.10)", "", "", "yes"]
    late = row(text, "Latency at half load", "p99.9")
    assert late == ["1.20 times epoll", "1.35 (1.20 to 1.35)", "40.5 µs", "30.0 µs", "**no**"]


def test_targets_of_few_rounds(data: dict[str, Any]) -> None:
    """Show the number of rounds if a verdict has fewer than usual, and the reason if all runs failed."""
    fail(of(data, "stream", EPOLL)[2], "reset")
    fail(of(data, "idle", ECHOD)[0], "too many open files")
    for run in of(data, "latency", EPOLL):
        fail(run, "out of time")
    for run in of(data, "clients", ECHOD):
        if run["clients"] == 10_000:
            fail(run, "9,000 of 10,000 connected")
    text = section(data, "Targets")
    assert row(text, "Streams", "CPU per GB", "1.00 times epoll")[-1] == "yes, measured in 2 of 3 rounds"
    assert row(text, "Idle clients", "memory per client")[1] == "4.05 (2.70 to 5.40) KiB"
    assert row(text, "Idle clients", "memory per client")[-1] == "**no**, measured in 2 of 3 rounds"
    assert row(text, "Latency at half load", "p99.9")[-1] == "not measured: epoll: out of time"
    flat = row(text, "From one client to many", "highest / lowest CPU per message")
    assert flat[-1] == "not measured: echod: 9,000 of 10,000 connected"


def test_a_missing_peer_of_a_target(data: dict[str, Any]) -> None:
    """A target gives the reason why its peer is missing."""
    data["missing"][GO] = "go is not installed"
    assert "1.00 times Go |  |  |  | not measured: Go: go is not installed |" in section(data, "Targets")


def test_names_of_peers() -> None:
    """The names in figures.py are names of servers."""
    assert {ECHOD, UNLOGGED, UVLOOP, EPOLL, GO} <= {peer.name for peer in servers.PEERS}


# The page.


def test_page(data: dict[str, Any]) -> None:
    """The page describes machine and settings, has all workloads in order, and contains the text about changes."""
    text = page(data, "Tried: *less*.\n\n- | as it is\n")
    assert "Machine: abacus, 2 cores, 8 GiB, Linux 6.9, Python 3.13.0, echod 1.2 (abc), 2026-01-02." in text
    assert "3 rounds" in text
    assert "runs for 1 s" in text
    places = [text.index(f"## {work.title}\n") for work in WORKLOADS]
    assert all(before < after for before, after in pairwise(places))
    assert "## Effect of each change\n\nTried: *less*.\n\n- | as it is\n\n## Limits of these figures\n" in text
    assert "Effect of each change" not in page(data)
    assert not re.search(r"\n\n\n|[ \t]\n|[{}]|nan|inf\b", text)
    assert "quick run" not in text
    data["settings"]["quick"] = True
    assert "from a quick run" in page(data)


def test_page_without_runs(data: dict[str, Any]) -> None:
    """A measurement without runs gives a page without charts."""
    data["runs"] = []
    assert section(data, "Targets").count("not measured: echod: not run") == len(report.TARGETS)
    assert "not run: echod; epoll" in section(data, "Startup")


def test_committed_page() -> None:
    """The page and the charts in the repository match the summary in the repository."""
    results = Results(json.loads(RESULTS.read_text()))
    assert (ROOT / "docs" / "explanation" / "benchmarks.md").read_text() == report.page(
        results, report.CHANGES.read_text()
    )
    drawn = {path.stem: path.read_text() for path in (ROOT / "docs" / "explanation" / "benchmarks").iterdir()}
    assert drawn == dict(charts.draw(results))


def test_summary_is_small() -> None:
    """The summary in the repository has a line per row and no raw runs."""
    text = RESULTS.read_text()
    assert text == dump(json.loads(text)) + "\n"
    assert text.count("\n") < 500


# The charts.


def drawn(data: dict[str, Any]) -> dict[str, str]:
    """Return the charts of a measurement by name."""
    return dict(charts.draw(results_of(data)))


def words(svg: str) -> list[str]:
    """Return the texts of a chart."""
    return [element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def bars(svg: str) -> dict[str, list[float]]:
    """Return the lengths of the bars by class."""
    root = ET.fromstring(svg)
    return {
        path.attrib["class"].split()[1]: [float(end) - float(start) for start, end in BAR.findall(path.attrib["d"])]
        for path in reversed([*root.iter("{http://www.w3.org/2000/svg}path")])
        if "bars" in path.attrib["class"]
    }


def test_command(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command writes the page and every chart that the page shows."""
    summary = tmp_path / "summary.json"
    summary.write_text(dump(summarize(data)))
    monkeypatch.setattr(sys, "argv", ["report.py", str(summary), str(tmp_path)])
    runpy.run_path(report.__file__, run_name="__main__")
    text = (tmp_path / "benchmarks.md").read_text()
    assert text == page(data, report.CHANGES.read_text())
    written = {path.stem: path.read_text() for path in (tmp_path / "benchmarks").iterdir()}
    assert written == drawn(data)
    assert {f"benchmarks/{name}.svg" for name in written} == set(re.findall(r"\((\S+\.svg)\)", text))


def test_costs_chart(data: dict[str, Any]) -> None:
    """The chart has a bar per serious server and workload, and names a server that failed."""
    chart = drawn(data)["costs"]
    assert "socat" not in words(chart)
    assert words(chart)[:2] == [ECHOD, EPOLL]
    assert words(chart)[2:5] == ["CPU per message, µs", "9.00", "10.0"]
    assert bars(chart)["c0"] == pytest.approx([9 / 20 * 118], abs=0.1)
    assert bars(chart)["c2"] == pytest.approx([10 / 20 * 118], abs=0.1)
    for run in of(data, "pingpong", EPOLL):
        fail(run, "reset")
    assert words(drawn(data)["costs"])[2:5] == ["CPU per message, µs", "9.00", "failed"]


def test_costs_chart_of_zero(data: dict[str, Any]) -> None:
    """Figures that are all zero have bars without length."""
    data["runs"] = [run for run in data["runs"] if run["workload"] == "idle"]
    for run in data["runs"]:
        run["memory_after"] = run["memory_before"]
    assert drawn(data).keys() == {"costs"}
    assert bars(drawn(data)["costs"]) == {"c0": [0], "c2": [0]}


def test_chart_without_costs(data: dict[str, Any]) -> None:
    """A measurement of other workloads has no chart of costs, and its page does not show one."""
    data["runs"] = [run for run in data["runs"] if run["workload"] == "clients"]
    assert drawn(data).keys() == {"clients"}
    assert "costs.svg" not in page(data)


def test_clients_chart(data: dict[str, Any]) -> None:
    """The chart has a line per server, with one point for each number of clients that it served."""
    for run in of(data, "clients", EPOLL):
        if run["clients"] == 10_000:
            fail(run, "reset")
    for run in of(data, "clients", "socat"):
        fail(run, "too many processes")
    chart = drawn(data)["clients"]
    assert [word for word in words(chart) if word in COSTS] == [EPOLL, ECHOD]
    lines = [*ET.fromstring(chart).iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 3]
    assert [word for word in words(chart) if word.replace(",", "").isdigit()] == [
        "0",
        "2",
        "4",
        "6",
        "8",
        "10",
        "12",
    ] + [f"{count:,}" for count in COUNTS]


def test_variants_of_echod_have_a_colour(data: dict[str, Any]) -> None:
    """A variant of echod differs in colour from echod and from other servers."""
    data["peers"][UNLOGGED] = data["peers"][EPOLL]
    for run in data["runs"]:
        if run["peer"] == EPOLL:
            run["peer"] = UNLOGGED
    assert bars(drawn(data)["costs"]).keys() == {"c0", "c1"}


def test_labels_keep_apart() -> None:
    """Overlapping labels move apart, keep their order, and stay above the bottom."""
    assert charts.apart([10, 10, 50, 98, 99, 100], 10, 100) == [10, 20, 50, 80, 90, 100]


@pytest.mark.parametrize(
    ("highest", "step", "ceiling"), [(45.7, 10, 50), (9, 2, 10), (10, 2, 10), (0.31, 0.1, 0.4), (61, 20, 80)]
)
def test_ticks(highest: float, step: float, ceiling: float) -> None:
    """An axis starts at 0, has round steps, and covers the highest value."""
    assert charts.ticks(highest) == pytest.approx((step, ceiling))
