"""The benchmark's page: its figures are those of the results, and nothing that failed or is missing is left out."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import runpy
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest

import report
from figures import ECHOD, EPOLL, GO, UNLOGGED, UVLOOP, WORKS, Results, number

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "full.json"
PEERS = ROOT / "benchmarks" / "servers.py"
# CPU a message of the three rounds, µs. The machine is slower in the second one, for all of them.
COSTS = {ECHOD: (8, 18, 9), EPOLL: (10, 20, 10), "socat": (40, 80, 40)}
COUNTS = (1, 10, 10000)


def runs() -> Iterator[dict[str, Any]]:
    """Yield runs of all works."""
    for turn in range(3):
        for peer, costs in COSTS.items():
            cost = costs[turn] * 1e-6
            run = {"peer": peer, "round": turn, "seconds": 1.0, "errors": 0}
            traffic = run | {"units": 10_000, "bytes": 5_000_000, "cpu": 10_000 * cost, "load_cpu": 0.5}
            for work, clients, size in (("pingpong", 50, 512), ("stream", 8, 65536), ("connect", 4, 64)):
                yield traffic | {"work": work, "clients": clients, "size": size}
            grown = 1_000_000 + int(cost * 3e6) * 1024 * 1000
            yield run | {
                "work": "idle",
                "clients": 10_000,
                "cpu": 0.001,
                "memory_before": 1_000_000,
                "memory_after": grown,
            }
            latencies = {"p50": cost, "p99": 2 * cost, "p999": 3 * cost, "max": 400 * cost}
            yield traffic | {"work": "latency", "clients": 50, "rate": 4321.0, "latency": latencies}
            for clients in COUNTS:
                price = cost * (1.1 if clients == 1 else 1)
                yield traffic | {"work": "clients", "clients": clients, "rate": 10_000.0, "cpu": 10_000 * price}
            yield run | {"work": "start", "seconds": 0.25, "cpu": 0.2}
        receipt = {"clients": 10_000, "quiet": 10_000 - turn // 2, "cut": turn // 2, "seconds": 3.0 + turn}
        drain = {"clients": 10_000, "seconds": 4.5, "quiet_period": 2.0, "cpu": 1.0, "receipt": receipt}
        yield {"work": "drain", "peer": ECHOD, "round": turn, **drain}


@pytest.fixture
def data() -> dict[str, Any]:
    """Return made-up results; a test may change them."""
    machine = {"cpu": "abacus", "cores": 2, "kernel": "6.9", "memory_gib": 8, "python": "3.13.0", "date": "2026-01-02"}
    return {
        "machine": machine | {"echod": "1.2 (abc)"},
        "settings": {"rounds": 3, "seconds": 1.0, "quick": False},
        "peers": {peer: {"about": f"about {peer}", "version": "7", "serious": peer != "socat"} for peer in COSTS},
        "missing": {"io_uring": "liburing.h is not found"},
        "runs": list(runs()),
    }


def section(data: dict[str, Any], title: str) -> str:
    """Return what the page says under a heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page(data), re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def page(data: dict[str, Any], changes: str = "") -> str:
    """Return the page."""
    return report.page(Results(data), changes)


def row(text: str, *start: str) -> list[str]:
    """Return the cells behind those that a row of a table begins with."""
    head = "| " + " | ".join(start) + " | "
    found = [line for line in text.splitlines() if line.startswith(head)]
    assert len(found) == 1, text
    return found[0].removeprefix(head).removesuffix(" |").split(" | ")


def of(data: dict[str, Any], work: str, peer: str) -> list[dict[str, Any]]:
    """Return the runs of a work by a peer."""
    return [run for run in data["runs"] if (run["work"], run["peer"]) == (work, peer)]


def fail(run: dict[str, Any], reason: str) -> None:
    """Make a run one that failed."""
    for figure in run.keys() - {"work", "peer", "round", "clients"}:
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
    """Three significant digits, whatever the size."""
    assert number(value) == text


def test_medians(data: dict[str, Any]) -> None:
    """A row holds the medians with lowest and highest round, the best peer comes first, and echod stands out."""
    text = section(data, "Messages to and fro")
    assert "50 clients; each sends 512 B" in text
    assert row(text, "**echod**") == ["9.00 (8.00 to 18.0)", "", "10,000 (10,000 to 10,000)", "9.00", "50.0"]
    names = re.findall(r"^\| (\S+) \| \d", text, re.MULTILINE)
    assert names == ["**echod**", "epoll", "socat"]


def test_ratios_are_of_rounds(data: dict[str, Any]) -> None:
    """A ratio is taken within a round: 0.8, 0.9 and 0.9, though one round was slower than the others by twice."""
    assert row(section(data, "Messages to and fro"), EPOLL)[1] == "0.900 (0.800 to 0.900)"
    of(data, "pingpong", EPOLL)[1]["cpu"] = 0.09
    # The medians are the same 9 and 10 as before.
    assert row(section(data, "Messages to and fro"), EPOLL)[1] == "0.900 (0.800 to 2.00)"
    of(data, "pingpong", EPOLL)[2]["round"] = 7
    assert row(section(data, "Messages to and fro"), EPOLL)[1] == "1.40 (0.800 to 2.00)"


def test_every_work(data: dict[str, Any]) -> None:
    """Each work has its units: s a GB, µs a connection, KiB a client, percentiles, clients, a drain, a start."""
    assert row(section(data, "Streams"), EPOLL)[0] == "20.0 (20.0 to 40.0)"
    assert "64 KiB after 64 KiB" in section(data, "Streams")
    assert row(section(data, "Connections"), EPOLL)[0] == "10.0 (10.0 to 20.0)"
    assert row(section(data, "Idle clients"), "**echod**") == ["2.70 (2.40 to 5.40)", "", "0.100 (0.100 to 0.100)"]
    latency = section(data, "Latency at half load")
    assert "4,321 messages a second" in latency
    cells = ["10.0 (10.0 to 20.0)", "20.0 (20.0 to 40.0)", "30.0 (30.0 to 60.0)", "0.900 (0.800 to 0.900)"]
    assert row(latency, EPOLL) == [*cells, "4,000 (4,000 to 8,000)"]
    clients = section(data, "From one client to many")
    assert "| peer | 1 | 10 | 10,000 | most / least |" in clients
    cells = ["9.90 (8.80 to 19.8)", "9.00 (8.00 to 18.0)", "9.00 (8.00 to 18.0)", "1.10 (1.10 to 1.10)"]
    assert row(clients, "**echod**") == cells
    drain = section(data, "A graceful stop")
    assert row(drain, "**echod**")[0] == "4.50 (4.50 to 4.50)"
    assert row(drain, "**echod**")[2:] == ["2.50 (2.50 to 2.50)", "4,000 (4,000 to 4,000)", "100 (100 to 100)"]
    assert "- echod, the receipt of 2 of 3 rounds: 10,000 clients, 10,000 quiet, 0 cut\n" in drain
    assert "- echod, the receipt of 1 of 3 rounds: 10,000 clients, 9,999 quiet, 1 cut\n" in drain
    assert row(section(data, "Start"), "**echod**") == ["250 (250 to 250)", "", "200 (200 to 200)"]


def test_flatness_is_of_medians(data: dict[str, Any]) -> None:
    """One slow round in one column spoils the spread of that round, and not the figure."""
    slow = next(run for run in of(data, "clients", ECHOD) if (run["round"], run["clients"]) == (0, 10))
    slow["cpu"] *= 2
    # The columns' medians are now 9.9, 16 and 9.
    assert row(section(data, "From one client to many"), "**echod**")[-1] == "1.78 (1.10 to 2.00)"
    slow["cpu"] /= 2
    next(run for run in of(data, "clients", ECHOD) if (run["round"], run["clients"]) == (1, 10))["cpu"] *= 2
    assert row(section(data, "From one client to many"), "**echod**")[-1] == "1.10 (1.10 to 2.00)"


def test_order(data: dict[str, Any]) -> None:
    """Latency is sorted by p99.9; CPU by the most clients, behind them who did not take so many."""
    results = Results(data)
    latency, clients = (next(work for work in WORKS if work.name == name) for name in ("latency", "clients"))
    for run in of(data, "latency", EPOLL):
        run["latency"] |= {"p50": 1.0, "p999": 1e-6}
    for run in of(data, "clients", ECHOD):
        run["cpu"] *= 2 if run["clients"] == 10_000 else 0.1
    assert results.peers(latency) == [EPOLL, ECHOD, "socat"]
    assert results.peers(clients) == [EPOLL, ECHOD, "socat"]
    for run in of(data, "clients", EPOLL):
        if run["clients"] == 10_000:
            fail(run, "reset")
    assert results.peers(clients) == [ECHOD, "socat", EPOLL]


def test_the_load_generator_was_the_limit(data: dict[str, Any]) -> None:
    """That is said where in most rounds it was busy and the server was not."""
    for run in of(data, "pingpong", ECHOD)[:2]:
        run["load_cpu"] = 0.97
    of(data, "pingpong", EPOLL)[0]["load_cpu"] = 0.97
    for run in of(data, "pingpong", "socat"):
        run.update(load_cpu=0.97, cpu=0.99)
    text = section(data, "Messages to and fro")
    assert row(text, "**echod**")[-1] == "97.0, the limit"
    assert row(text, EPOLL)[-1] == "50.0"
    assert row(text, "socat")[-1] == "97.0"
    # On a schedule, the load generator is always busy.
    assert "the limit" not in section(data, "Latency at half load")


# What is not a figure.


def test_failed_runs(data: dict[str, Any]) -> None:
    """A run that failed is counted with its reason; who has only failed is the last one, and still there."""
    fail(of(data, "pingpong", EPOLL)[2], "reset |\n by peer")
    for run in of(data, "pingpong", ECHOD):
        fail(run, "no <answer>")
    of(data, "connect", "socat")[0]["units"] = 0
    of(data, "connect", "socat")[1]["errors"] = 1234
    text = section(data, "Messages to and fro")
    assert row(text, EPOLL)[0] == "15.0 (10.0 to 20.0)"
    assert row(text, "**echod**") == ["failed", "", "failed", "failed", "failed"]
    assert re.findall(r"^\| (\S+) \| [\df]", text, re.MULTILINE)[-1] == "**echod**"
    assert "- epoll: 1 of 3 runs failed: reset \\| by peer\n" in text
    assert "- echod: 3 of 3 runs failed: no \\<answer>\n" in text
    text = section(data, "Connections")
    assert "- socat: 1 of 3 runs failed: nothing was echoed\n" in text
    assert "- socat: 1,234 errors in the runs that the figures are of\n" in text


def test_failed_with_many_clients(data: dict[str, Any]) -> None:
    """With as many clients as a peer did not take, it has failed; with others, it has its figures."""
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
    """Who is missing is named with the reason; who took no part in a work is named there."""
    assert "- io_uring: liburing.h is not found\n" in section(data, "Who takes part")
    assert row(section(data, "Who takes part"), EPOLL) == ["about epoll", "7"]
    assert "- not run: epoll; socat; io_uring (liburing.h is not found)\n" in section(data, "A graceful stop")
    text = section(data, "Streams, over TLS 1.3")
    assert "not run: echod; epoll; socat; io_uring" in text
    assert "svg" not in text
    assert "| peer" not in text
    data["missing"] = {}
    assert "Missing" not in page(data)
    assert "not run" not in section(data, "Streams")


def test_no_memory_and_no_quiet_period(data: dict[str, Any]) -> None:
    """Nothing is divided by nothing: a loop that keeps nothing for a client, a stop that is over at once."""
    for run in of(data, "idle", EPOLL):
        run["memory_after"] = run["memory_before"]
    assert row(section(data, "Idle clients"), EPOLL)[:2] == ["0 (0 to 0)", ""]
    for run in of(data, "drain", ECHOD):
        run["seconds"] = 1.5
    assert row(section(data, "A graceful stop"), "**echod**")[2:4] == ["not run", "not run"]


# The targets.


def test_targets(data: dict[str, Any]) -> None:
    """Each is reached or not, by the median; one without figures says why."""
    data["peers"][GO] = {"about": "goroutines", "version": "1", "serious": True}
    for run in of(data, "latency", ECHOD):
        run["latency"]["p999"] *= 1.5
    text = section(data, "The targets")
    cells = ["1.10 times epoll", "0.900 (0.800 to 0.900)", "9.00 µs", "10.0 µs", "yes"]
    assert f"| Messages to and fro | CPU a message | {' | '.join(cells)} |" in text
    assert "| Messages to and fro | CPU a message | 1.00 times Go |  |  |  | not measured: Go: not run |" in text
    assert "| Streams | CPU a GB | 1.00 times epoll | 0.900 (0.800 to 0.900) | 18.0 s | 20.0 s | yes |" in text
    assert "| Idle clients | memory a client | 3.00 KiB | 2.70 (2.40 to 5.40) KiB |  |  | yes |" in text
    assert row(text, "Idle clients", "CPU") == ["0.20 %", "0.100 (0.100 to 0.100) %", "", "", "yes"]
    flat = row(text, "From one client to many", "most / least CPU a message")
    assert flat == ["1.15", "1.10 (1.10 to 1.10)", "", "", "yes"]
    late = row(text, "Latency at half load", "p99.9")
    assert late == ["1.20 times epoll", "1.35 (1.20 to 1.35)", "40.5 µs", "30.0 µs", "**no**"]


def test_targets_of_few_rounds(data: dict[str, Any]) -> None:
    """A verdict tells how many rounds it has behind it, and a target whose runs have failed tells their reason."""
    fail(of(data, "stream", EPOLL)[2], "reset")
    fail(of(data, "idle", ECHOD)[0], "too many open files")
    for run in of(data, "latency", EPOLL):
        fail(run, "out of time")
    for run in of(data, "clients", ECHOD):
        if run["clients"] == 10_000:
            fail(run, "9,000 of 10,000 connected")
    text = section(data, "The targets")
    assert row(text, "Streams", "CPU a GB", "1.00 times epoll")[-1] == "yes, measured in 2 of 3 rounds"
    assert row(text, "Idle clients", "memory a client")[1] == "4.05 (2.70 to 5.40) KiB"
    assert row(text, "Idle clients", "memory a client")[-1] == "**no**, measured in 2 of 3 rounds"
    assert row(text, "Latency at half load", "p99.9")[-1] == "not measured: epoll: out of time"
    flat = row(text, "From one client to many", "most / least CPU a message")
    assert flat[-1] == "not measured: echod: 9,000 of 10,000 connected"


def test_a_missing_peer_of_a_target(data: dict[str, Any]) -> None:
    """Its target says what is missing."""
    data["missing"][GO] = "go is not installed"
    assert "1.00 times Go |  |  |  | not measured: Go: go is not installed |" in section(data, "The targets")


@pytest.mark.skipif(not PEERS.exists(), reason="there are no peers")
def test_names_of_peers() -> None:
    """The targets name peers that there are."""
    # The tests have a module of that name, too.
    spec = importlib.util.spec_from_file_location("servers", PEERS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {ECHOD, UNLOGGED, UVLOOP, EPOLL, GO} <= {peer.name for peer in module.PEERS}


# The page.


def test_page(data: dict[str, Any]) -> None:
    """It describes machine and settings, has all works in order, and the text on changes as it is."""
    text = page(data, "Tried: *less*.\n\n- | as it is\n")
    assert "Machine: abacus, 2 cores, 8 GiB, Linux 6.9, Python 3.13.0, echod 1.2 (abc), 2026-01-02." in text
    assert "3 rounds" in text
    assert "runs for 1 s" in text
    places = [text.index(f"## {work.title}\n") for work in WORKS]
    assert all(before < after for before, after in pairwise(places))
    assert (
        "## What each change has brought\n\nTried: *less*.\n\n- | as it is\n\n## What the figures do not say\n" in text
    )
    assert "each change has brought" not in page(data)
    assert not re.search(r"\n\n\n|[ \t]\n|[{}]|nan|inf\b", text)
    assert "quick run" not in text
    data["settings"]["quick"] = True
    assert "figures of a quick run" in page(data)


def test_page_without_runs(data: dict[str, Any]) -> None:
    """Results without a single run make a page, too."""
    data["runs"] = []
    assert section(data, "The targets").count("not measured: echod: not run") == len(report.TARGETS)
    assert "not run: echod; epoll" in section(data, "Start")


def test_committed_page() -> None:
    """The page is what the committed results say."""
    if not RESULTS.exists():
        pytest.skip("there are no results")
    changes = report.CHANGES.read_text() if report.CHANGES.exists() else ""
    written = report.page(Results(json.loads(RESULTS.read_text())), changes)
    assert (ROOT / "docs" / "benchmarks.md").read_text() == written


# The charts.


def write(data: dict[str, Any], folder: Path) -> dict[str, str]:
    """Run the command; return what it has written, by name."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: see benchmarks/requirements.txt")
    folder.mkdir()
    results = folder / "results.json"
    results.write_text(json.dumps(data))
    report.main(str(results), str(folder))
    return {
        path.name: path.read_text()
        for path in (folder, folder / "benchmarks")
        for path in path.iterdir()
        if path.is_file()
    }


def words(svg: str) -> list[str]:
    """Return the texts of a chart."""
    return [element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_command(data: dict[str, Any], tmp_path: Path) -> None:
    """It writes the page and a chart for each work that has figures, which the page shows; twice the same bytes."""
    once = write(data, tmp_path / "once")
    shown = re.findall(r"\(benchmarks/(\S+\.svg)\)", once["benchmarks.md"])
    assert set(shown) == {name for name in once if name.endswith(".svg")}
    assert len(shown) == 8
    assert write(copy.deepcopy(data), tmp_path / "twice") == once


def test_command_without_matplotlib(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes nothing then, rather than a page without its charts."""
    (tmp_path / "results.json").write_text(json.dumps(data))
    monkeypatch.setitem(sys.modules, "charts", None)
    with pytest.raises(SystemExit, match=r"see benchmarks/requirements\.txt"):
        report.main(str(tmp_path / "results.json"), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_charts(data: dict[str, Any], tmp_path: Path) -> None:
    """A chart names all peers, also one that has failed, suits dark pages, and is small."""
    for work in ("pingpong", "latency"):
        for run in of(data, work, EPOLL):
            fail(run, "reset")
    for run in of(data, "idle", ECHOD) + of(data, "idle", EPOLL) + of(data, "idle", "socat"):
        run["memory_after"] = run["memory_before"]
    charts = {name: text for name, text in write(data, tmp_path / "docs").items() if name.endswith(".svg")}
    for name, chart in charts.items():
        assert set(COSTS) <= set(words(chart)) or name == "drain.svg"
        assert "prefers-color-scheme: dark" in chart
        assert len(chart) < 40_000
    assert "failed" in words(charts["pingpong.svg"])
    assert "failed" in words(charts["latency.svg"])
    # What is far beyond the serious ones has its figure at the edge.
    assert "40.0" in words(charts["connect.svg"])


def test_labels_keep_apart() -> None:
    """Labels of lines that end at one height move, and stay in their order and on the page."""
    charts = pytest.importorskip("charts", reason="matplotlib is not installed: see benchmarks/requirements.txt")
    moved = charts.apart([0.1, 0.1, 0.5, 0.98, 0.99, 1.0], gap=0.1)
    assert moved == pytest.approx([0.1, 0.2, 0.5, 0.8, 0.9, 1.0])


def test_script(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is the file itself."""
    written = write(data, tmp_path / "docs")
    (tmp_path / "other").mkdir()
    arguments = [str(tmp_path / "docs" / "results.json"), str(tmp_path / "other")]
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    runpy.run_path(report.__file__, run_name="__main__")
    assert (tmp_path / "other" / "benchmarks.md").read_text() == written["benchmarks.md"]
