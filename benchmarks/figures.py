"""What the benchmark's results say: a figure for each work, peer and round, and what follows from those."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

Run = dict[str, Any]
Rounds = dict[int, float]  # a figure by the number of its round

# Named as in servers.py.
ECHOD, UNLOGGED, UVLOOP, EPOLL, GO = "echod", "echod, no ledger", "uvloop protocol", "epoll", "Go"
# From this share of a core on, a process that has a core to itself has no time left.
FULL = 0.95


class Metric(NamedTuple):
    """A column of a table."""

    title: str
    unit: str
    of: Callable[[Run], float]
    """A run's figure; NaN where it has none."""
    spread: bool = True


class Work(NamedTuple):
    """What was measured of each peer."""

    name: str
    title: str
    about: str
    metrics: tuple[Metric, ...]
    key: int = 0
    """The metric that the peers are sorted by, and compared with echod's in."""


def per(amount: str, factor: float) -> Callable[[Run], float]:
    """Return what gives CPU time by an amount of work."""
    return lambda run: run["cpu"] / run[amount] * factor


def rate(amount: str, factor: float = 1.0) -> Callable[[Run], float]:
    """Return what gives an amount by wall time."""
    return lambda run: run[amount] / run["seconds"] * factor


def percentile(title: str, key: str) -> Metric:
    """Return a column of latencies."""
    return Metric(title, "µs", lambda run: run["latency"][key] * 1e6)


def crowd(clients: int) -> Metric:
    """Return a column of CPU a message, with so many clients."""
    message = per("units", 1e6)
    return Metric(f"{clients:,}", "", lambda run: message(run) if run["clients"] == clients else math.nan)


def beyond_quiet(run: Run) -> float:
    """Return how long a drain took without the time for which a client has to be quiet, seconds."""
    seconds: float = run["seconds"] - run.get("quiet_period", 0)
    return seconds if seconds > 0 else math.nan


LOAD = Metric("load busy", "%", rate("load_cpu", 100), spread=False)
BUSY = (Metric("server busy", "%", rate("cpu", 100), spread=False), LOAD)
MESSAGES = (Metric("CPU a message", "µs", per("units", 1e6)), Metric("messages", "1/s", rate("units")), *BUSY)
STREAM = (Metric("CPU a GB", "s", per("bytes", 1e9)), Metric("echo", "MB/s", rate("bytes", 1e-6)), *BUSY)
CONNECTIONS = (Metric("CPU a connection", "µs", per("units", 1e6)), Metric("connections", "1/s", rate("units")), *BUSY)
IDLE = (
    Metric("memory a client", "KiB", lambda run: (run["memory_after"] - run["memory_before"]) / run["clients"] / 1024),
    Metric("CPU", "%", rate("cpu", 100)),
)
LATENCY = (percentile("p50", "p50"), percentile("p99", "p99"), percentile("p99.9", "p999"), percentile("max", "max"))
DRAIN = (
    Metric("SIGTERM to exit", "s", lambda run: run["seconds"]),
    Metric("without the quiet period", "s", beyond_quiet),
    Metric("clients, without it", "1/s", lambda run: run["clients"] / beyond_quiet(run)),
    Metric("CPU a client", "µs", per("clients", 1e6)),
)
START = (Metric("start", "ms", lambda run: run["seconds"] * 1e3), Metric("CPU", "ms", lambda run: run["cpu"] * 1e3))

TO_AND_FRO = "{clients} clients; each sends {size}, waits for the echo, and sends again."
STREAMING = "{clients} clients; each writes {size} after {size}, and reads the echo as it comes."
WORKS = (
    Work("pingpong", "Messages to and fro", TO_AND_FRO, MESSAGES),
    Work("stream", "Streams", STREAMING, STREAM),
    Work("connect", "Connections", "Connect, send {size}, read the echo, close; {clients} at a time.", CONNECTIONS),
    Work(
        "idle",
        "Idle clients",
        "{clients} clients that say nothing. Memory is the server's anonymous memory, without the "
        "kernel's own for each socket.",
        IDLE,
    ),
    Work(
        "latency",
        "Latency at half load",
        "{rate} messages a second, half of the slowest serious peer's rate, on a schedule that waits for nobody (open loop). "
        "A message's time runs from when it was due. Sorted by p99.9, which the ratio is of, too.",
        LATENCY,
        key=2,
    ),
    Work(
        "clients",
        "From one client to many",
        "CPU a message, µs, by the number of clients, at {rate} messages a second in all. The last column divides the "
        "highest of a row's medians by the lowest; in brackets, the same within single rounds.",
        (),
        key=-1,
    ),
    Work("tls-pingpong", "Messages to and fro, over TLS 1.3", TO_AND_FRO, MESSAGES),
    Work("tls-stream", "Streams, over TLS 1.3", STREAMING, STREAM),
    Work("drain", "A graceful stop", "SIGTERM with {clients} idle clients, until the process has ended.", DRAIN),
    Work("start", "Start", "From the start of the process to the first echo.", START),
)


class Results:
    """What benchmarks/run.py has written."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.machine, self.settings = data["machine"], data["settings"]
        self.about: dict[str, dict[str, Any]] = data["peers"]
        self.missing: dict[str, str] = data["missing"]
        self._runs: list[Run] = data["runs"]

    def runs(self, work: Work, peer: str = "") -> list[Run]:
        """Return the runs of a work, by one peer or by all."""
        return [run for run in self._runs if run["work"] == work.name and peer in {"", run["peer"]}]

    def good(self, work: Work, peer: str = "") -> list[Run]:
        """Return the runs that have figures."""
        return [run for run in self.runs(work, peer) if failure(run) is None]

    def failures(self, work: Work, peer: str, metric: Metric | None = None) -> list[str]:
        """Return why runs have failed; with a metric, those that it would have been of."""
        runs = self.runs(work, peer)
        if metric is not None and not work.metrics:
            runs = [run for run in runs if "clients" not in run or crowd(run["clients"]).title == metric.title]
        return [reason for run in runs if (reason := failure(run)) is not None]

    def serious(self, peer: str) -> bool:
        """Return whether a peer is one that somebody would serve many clients with."""
        return bool(self.about.get(peer, {}).get("serious", True))

    def counts(self, work: Work) -> list[int]:
        """Return the numbers of clients of a work."""
        return sorted({run["clients"] for run in self.runs(work) if "clients" in run})

    def metrics(self, work: Work) -> tuple[Metric, ...]:
        """Return the columns of a work; in `clients`, there is one for each number of them."""
        return work.metrics or tuple(map(crowd, self.counts(work)))

    def rounds(self, work: Work, metric: Metric, peer: str) -> Rounds:
        """Return a peer's figures."""
        return {run["round"]: value for run in self.good(work, peer) if not math.isnan(value := metric.of(run))}

    def ratios(self, work: Work, metric: Metric, peer: str) -> list[float]:
        """Return echod's figure divided by the peer's, of each round that has both."""
        own, other = self.rounds(work, metric, ECHOD), self.rounds(work, metric, peer)
        return [value / other[turn] for turn, value in own.items() if other.get(turn, 0) > 0]

    def flatness(self, work: Work, peer: str) -> tuple[float, list[float]] | None:
        """Return the highest by the lowest median over all columns, and the same within each whole round."""
        columns = [self.rounds(work, metric, peer) for metric in self.metrics(work)]
        whole = sorted(set.intersection(*map(set, columns))) if columns else []
        if not whole:
            return None
        medians = [median(column.values()) for column in columns]
        single = [[column[turn] for column in columns] for turn in whole]
        return max(medians) / min(medians), [max(values) / min(values) for values in single]

    def peers(self, work: Work) -> list[str]:
        """Return who has taken part, the best first, and who has only failed last."""

        def place(peer: str) -> list[float]:
            found = [self.rounds(work, metric, peer) for metric in self.metrics(work)]
            medians = [median(values.values()) if values else math.inf for values in found]
            return medians[work.key :: -1]

        return sorted(dict.fromkeys(run["peer"] for run in self.runs(work)), key=place)

    def absent(self, work: Work) -> list[str]:
        """Return who has not taken part."""
        return [peer for peer in {**self.about, **self.missing} if not self.runs(work, peer)]

    def limited(self, work: Work, peer: str) -> bool:
        """Return whether in most rounds the load generator had no time left, while the server had."""
        shares = [(run["load_cpu"] / run["seconds"], run["cpu"] / run["seconds"]) for run in self.good(work, peer)]
        return bool(2 * sum(load > FULL > server for load, server in shares) > len(shares))


def failure(run: Run) -> str | None:
    """Return why a run has no figures."""
    if "error" in run:
        return run["error"] or "no reason given"
    return "nothing was echoed" if run.get("units") == 0 else None


def number(value: float) -> str:
    """Return three significant digits."""
    value = float(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(digits, 0)}f}"
