"""Define the workloads and their figures, and reduce a measurement to medians and spreads.

A measurement is a list of runs. Each run is one workload, one server and one round.
`summarize` turns it into the summary that the repository keeps, and `Results` reads that summary.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

Run = dict[str, Any]
Rounds = dict[int, float]  # a figure by the number of its round

# Named as in servers.py.
ECHOD, UNLOGGED, UVLOOP, EPOLL, GO = "echod", "echod, no ledger", "uvloop protocol", "epoll", "Go"
# A process that has a core to itself is saturated from this share of it.
SATURATED = 0.95


class Metric(NamedTuple):
    """A column of a table."""

    key: str
    title: str
    unit: str
    of: Callable[[Run], float]
    """Compute the figure of one run; return NaN if the run has none."""
    spread: bool = True
    """Whether the table shows the lowest and the highest round."""


class Workload(NamedTuple):
    """A kind of load, or an operation, that every server is measured with."""

    name: str
    title: str
    about: str
    metrics: tuple[Metric, ...]
    """Empty if there is one column for each number of clients."""
    main: int = 0
    """Index of the metric that sorts the servers and that the ratio compares."""

    def columns(self, clients: Iterable[int]) -> tuple[Metric, ...]:
        """Return the metrics, given the numbers of clients that were measured."""
        return self.metrics or tuple(map(crowd, clients))


class Spread(NamedTuple):
    """The median of a figure over the rounds, and its range."""

    median: float
    lowest: float
    highest: float
    rounds: int


@dataclass(frozen=True)
class Row:
    """The figures of one server for one workload."""

    runs: int
    figures: dict[str, Spread | None]
    """By key of the metric. None means that every run failed; a figure without runs is absent."""
    ratio: Spread | None = None
    """echod's figure divided by this server's; in `clients`, the highest figure divided by the lowest."""
    limited: bool = False
    """Whether the load generator was saturated in most rounds while the server was not."""
    failures: dict[str, int] = field(default_factory=dict)
    """Number of failed runs by reason."""
    receipts: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """Distinct drain receipts, each with its number of rounds."""


def per(amount: str, factor: float) -> Callable[[Run], float]:
    """Return a function that computes CPU time per amount of work."""
    return lambda run: run["cpu"] / run[amount] * factor


def rate(amount: str, factor: float = 1.0) -> Callable[[Run], float]:
    """Return a function that computes an amount per second of wall time."""
    return lambda run: run[amount] / run["seconds"] * factor


def percentile(key: str, title: str) -> Metric:
    """Return a column of latencies."""
    return Metric(key, title, "µs", lambda run: run["latency"][key] * 1e6)


def crowd(clients: int) -> Metric:
    """Return the column of CPU per message with N clients."""
    message = per("units", 1e6)
    return Metric(str(clients), f"{clients:,}", "", lambda run: message(run) if run["clients"] == clients else math.nan)


def beyond_quiet(run: Run) -> float:
    """Return the duration of a drain without the quiet period, seconds."""
    seconds: float = run["seconds"] - run.get("quiet_period", 0)
    return seconds if seconds > 0 else math.nan


LOAD = Metric("load", "load busy", "%", rate("load_cpu", 100), spread=False)
BUSY = (Metric("server", "server busy", "%", rate("cpu", 100), spread=False), LOAD)
MESSAGES = (Metric("cpu", "CPU per message", "µs", per("units", 1e6)), Metric("rate", "messages", "1/s", rate("units")))
STREAM = (Metric("cpu", "CPU per GB", "s", per("bytes", 1e9)), Metric("rate", "echo", "MB/s", rate("bytes", 1e-6)))
CONNECTIONS = (
    Metric("cpu", "CPU per connection", "µs", per("units", 1e6)),
    Metric("rate", "connections", "1/s", rate("units")),
)
IDLE = (
    Metric(
        "memory",
        "memory per client",
        "KiB",
        lambda run: (run["memory_after"] - run["memory_before"]) / run["clients"] / 1024,
    ),
    Metric("cpu", "CPU", "%", rate("cpu", 100)),
)
LATENCY = (percentile("p50", "p50"), percentile("p99", "p99"), percentile("p999", "p99.9"), percentile("max", "max"))
DRAIN = (
    Metric("seconds", "SIGTERM to exit", "s", lambda run: run["seconds"]),
    Metric("active", "without the quiet period", "s", beyond_quiet),
    Metric("rate", "clients, without it", "1/s", lambda run: run["clients"] / beyond_quiet(run)),
    Metric("cpu", "CPU per client", "µs", per("clients", 1e6)),
)
START = (
    Metric("seconds", "start", "ms", lambda run: run["seconds"] * 1e3),
    Metric("cpu", "CPU", "ms", lambda run: run["cpu"] * 1e3),
)

PING_PONG = "{clients} clients. Each sends {size}, waits for the echo, and sends again."
STREAMING = "{clients} clients. Each writes blocks of {size} without waiting, and reads the echo as it arrives."
WORKLOADS = (
    Workload("pingpong", "Ping-pong messages", PING_PONG, MESSAGES + BUSY),
    Workload("stream", "Streams", STREAMING, STREAM + BUSY),
    Workload(
        "connect", "Connections", "Connect, send {size}, read the echo, close; {clients} at a time.", CONNECTIONS + BUSY
    ),
    Workload(
        "idle",
        "Idle clients",
        "{clients} clients that send nothing. Memory is the anonymous memory of the server. It does not include the "
        "kernel's memory for each socket.",
        IDLE,
    ),
    Workload(
        "latency",
        "Latency at half load",
        "{rate} messages per second, half the rate of the slowest serious peer. The schedule does not wait for replies "
        "(open loop). A latency counts from the time at which the message was due. Rows are sorted by p99.9, "
        "and the ratio compares p99.9.",
        LATENCY,
        main=2,
    ),
    Workload(
        "clients",
        "From one client to many",
        "CPU per message, in µs, by number of clients, at {rate} messages per second in total. The last column divides "
        "the highest median of a row by the lowest. Its brackets show the same ratio within single rounds.",
        (),
        main=-1,
    ),
    Workload("tls-pingpong", "Ping-pong messages over TLS 1.3", PING_PONG, MESSAGES + BUSY),
    Workload("tls-stream", "Streams over TLS 1.3", STREAMING, STREAM + BUSY),
    Workload(
        "drain",
        "Graceful stop",
        "The time from SIGTERM, with {clients} idle clients, to the end of the process.",
        DRAIN,
    ),
    Workload("start", "Startup", "The time from the start of the process to the first echo.", START),
)


def summarize(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a measurement to its summary: `workloads` takes the place of `runs`."""
    workloads = {}
    for workload in WORKLOADS:
        if runs := [run for run in measured["runs"] if run["workload"] == workload.name]:
            workloads[workload.name] = _summary(workload, runs)
    return {key: value for key, value in measured.items() if key != "runs"} | {"workloads": workloads}


def _summary(workload: Workload, runs: list[Run]) -> dict[str, Any]:
    """Return the parameters of a workload and a row for each server, the best first."""
    counts = sorted({run["clients"] for run in runs if "clients" in run})
    columns = workload.columns(counts)
    peers = {run["peer"]: [other for other in runs if other["peer"] == run["peer"]] for run in runs}
    rounds = {peer: [_rounds(metric, own) for metric in columns] for peer, own in peers.items()}

    def place(peer: str) -> list[float]:
        return [median(found.values()) if found else math.inf for found in rounds[peer]][workload.main :: -1]

    def ratio(peer: str) -> Spread | None:
        if not workload.metrics:
            return _flatness(rounds[peer])
        return None if peer == ECHOD else _ratio(rounds.get(ECHOD), rounds[peer], workload.main)

    good = next((run for run in runs if failure(run) is None), {})
    return {
        "load": {"clients": counts} | {key: good[key] for key in ("size", "rate") if key in good},
        "peers": {
            peer: _row(workload, dict(zip(columns, rounds[peer], strict=True)), peers[peer], ratio(peer))
            for peer in sorted(peers, key=place)
        },
    }


def _rounds(metric: Metric, runs: list[Run]) -> Rounds:
    """Return the figure of each run that has one."""
    return {run["round"]: value for run in runs if failure(run) is None and not math.isnan(value := metric.of(run))}


def _row(workload: Workload, columns: dict[Metric, Rounds], runs: list[Run], ratio: Spread | None) -> dict[str, Any]:
    """Return the fields of a `Row` that are set, ready for JSON."""
    failed = [run for run in runs if failure(run) is not None]
    good = [run for run in runs if failure(run) is None]

    def concerns(run: Run, metric: Metric) -> bool:
        return bool(workload.metrics) or str(run.get("clients", metric.key)) == metric.key

    figures = {
        metric.key: _spread(median(rounds.values()), rounds.values()) if rounds else None
        for metric, rounds in columns.items()
        if rounds or any(concerns(run, metric) for run in failed)
    }
    shares = [(run["load_cpu"] / run["seconds"], run["cpu"] / run["seconds"]) for run in good if LOAD in columns]
    receipts = Counter(
        json.dumps({key: value for key, value in run["receipt"].items() if key != "seconds"})
        for run in good
        if "receipt" in run
    )
    row = {
        "runs": len(runs),
        "figures": figures,
        "ratio": ratio,
        "limited": 2 * sum(load > SATURATED > server for load, server in shares) > len(shares),
        "failures": dict(Counter(map(failure, failed))),
        "receipts": [(count, json.loads(receipt)) for receipt, count in receipts.items()],
    }
    return {key: value for key, value in row.items() if value or key == "figures"}


def _ratio(own: list[Rounds] | None, other: list[Rounds], column: int) -> Spread | None:
    """Return echod's figure divided by the server's, taken within each round that has both."""
    if own is None:
        return None
    values = [value / other[column][turn] for turn, value in own[column].items() if other[column].get(turn, 0) > 0]
    return _spread(median(values), values) if values else None


def _flatness(columns: list[Rounds]) -> Spread | None:
    """Return the highest median divided by the lowest, with the range of that ratio within single rounds."""
    complete = sorted(set.intersection(*map(set, columns))) if columns else []
    if not complete:
        return None
    medians = [median(column.values()) for column in columns]
    single = [[column[turn] for column in columns] for turn in complete]
    return _spread(max(medians) / min(medians), [max(values) / min(values) for values in single])


def _spread(middle: float, values: Collection[float]) -> Spread:
    """Return a spread, rounded to six significant digits. The page shows three."""
    middle, lowest, highest = (float(f"{value:.6g}") for value in (middle, min(values), max(values)))
    return Spread(middle, lowest, highest, len(values))


def failure(run: Run) -> str | None:
    """Return why a run has no figures, or None if it has."""
    reason: str | None = run.get("error")
    return "nothing was echoed" if run.get("units") == 0 else reason


def dump(value: object, levels: int = 4, indent: int = 0) -> str:
    """Return a summary as JSON text with one line for each row."""
    if levels == 0 or not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    margin = " " * (indent + 1)
    lines = [f"{margin}{json.dumps(key)}: {dump(inner, levels - 1, indent + 1)}" for key, inner in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"


class Results:
    """The summary of a measurement, as read from JSON."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.machine: dict[str, Any] = data["machine"]
        self.settings: dict[str, Any] = data["settings"]
        self.about: dict[str, dict[str, Any]] = data["peers"]
        self.missing: dict[str, str] = data["missing"]
        self._workloads: dict[str, Any] = data["workloads"]

    def rows(self, workload: Workload) -> dict[str, Row]:
        """Return the rows of a workload by server, the best first."""
        peers: dict[str, dict[str, Any]] = self._workloads.get(workload.name, {"peers": {}})["peers"]
        return {peer: _read(row) for peer, row in peers.items()}

    def load(self, workload: Workload) -> dict[str, Any]:
        """Return the parameters of a workload: `clients` (a list), and `size` and `rate` if they apply."""
        found: dict[str, Any] = self._workloads.get(workload.name, {"load": {"clients": []}})["load"]
        return found

    def columns(self, workload: Workload) -> tuple[Metric, ...]:
        """Return the metrics of a workload as measured."""
        return workload.columns(self.load(workload)["clients"])

    def measured(self, workload: Workload) -> bool:
        """Return whether any server has a figure."""
        return any(figure for row in self.rows(workload).values() for figure in row.figures.values())

    def serious(self, peer: str) -> bool:
        """Return whether a server is meant for many clients."""
        return bool(self.about[peer]["serious"])

    def absent(self, workload: Workload) -> list[str]:
        """Return the servers that a workload was not run with."""
        rows = self.rows(workload)
        return [peer for peer in {**self.about, **self.missing} if peer not in rows]


def _read(row: dict[str, Any]) -> Row:
    """Return a row from its JSON."""
    figures = {key: Spread(*figure) if figure else None for key, figure in row["figures"].items()}
    ratio = Spread(*row["ratio"]) if "ratio" in row else None
    return Row(**row | {"figures": figures, "ratio": ratio})


def number(value: float) -> str:
    """Return a number with three significant digits."""
    value = float(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(digits, 0)}f}"
