"""Write docs/explanation/benchmarks.md and its charts from a summary that benchmarks/run.py wrote.

    python benchmarks/report.py benchmarks/results/full.json [DOCS]

The same summary gives the same bytes.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from charts import CLIENTS, COSTS, draw
from figures import ECHOD, EPOLL, GO, LOAD, UNLOGGED, UVLOOP, WORKLOADS, Metric, Results, Row, Spread, Workload, number

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
CHANGES = HERE / "changes.md"

HEAD = """\
# Benchmarks

<!-- Written by benchmarks/report.py from benchmarks/results/full.json and benchmarks/changes.md. Edit those. -->

This page compares echod with other echo servers, on one machine and under the same load. The main figure is the server's
CPU time per unit of work. The tables show wall-clock figures as well.

    make bench          # build and measure every available server; about half an hour on an otherwise idle machine
    make bench-quick    # fewer and shorter rounds, under 90 s; enough to see a large change
    python benchmarks/report.py benchmarks/results/full.json    # write this page and its charts from the summary

## Method

- Machine: {cpu}, {cores} cores, {memory_gib} GiB, Linux {kernel}, Python {python}, echod {echod}, {date}.
- There are {rounds} rounds. In each round, every server runs the workload once, so a disturbance affects all servers. A load
  runs for {seconds:g} s against a fresh process. The workload with idle clients runs for twice as long.
- The server has one core. The load generator, a C program, has another. Each server runs on one thread. If a tool
  starts a process for each client, all its processes share the server's core.
- CPU time is user and system time, summed over all processes of the server.
- A figure is the median of the rounds, with the lowest and the highest round in brackets. The ratio is echod's figure
  divided by the peer's. It is computed within each round and summarized in the same way. Below 1, echod needs less.
- "The limit" marks rows in which the load generator was saturated and the server was not. In these rows the wall-clock
  figures describe the load generator, and only the CPU time describes the server.
- echod runs with its default settings and logs to a file. "{unlogged}" sets `log.connections = "none"`.
- `benchmarks/results` keeps these medians and ranges. A measurement writes the figures of every run to `build/bench`.
"""

GOALS = """\
## Targets

These are the targets of echod on one core with default settings. The median decides whether a target is reached. If the
bound is within the brackets, single rounds disagree with the median.
"""

OVERVIEW = """\
## Overview

![CPU time per message, GB and connection, and memory per idle client](benchmarks/costs.svg)

echod is green. A thin line spans the lowest to the highest round. The chart leaves out tools that are not meant for
serious load; the tables below include them.
"""

TAIL = """\
## Limits of these figures

- Loopback has no network card, driver, packet loss or distance. A send on loopback also does the receiver's part of TCP.
  So every server's CPU time includes some of the client's work.
- The machine has {cores} cores for the server, the load generator and the rest of the system. Each server was limited to one,
  so the figures do not show how a server scales to more cores.
- On a virtual machine, neighbours use CPU time and caches. A system call may also cost more than on real hardware. Ratios
  carry over to other machines better than absolute figures, but neither replaces a measurement there.
- The servers only echo. The bare loops have no limits, timeouts, log or graceful stop. These figures do not show the
  value of those features.
"""


class Target(NamedTuple):
    """An upper bound for a figure of echod, or for the ratio to a peer."""

    workload: str
    metric: str
    """The key of the metric, or the empty string for the ratio in `clients`."""
    peer: str
    bound: float


FLATNESS = Metric("", "highest / lowest CPU per message", "", lambda _: math.nan)
TARGETS = (
    Target("pingpong", "cpu", UVLOOP, 1.05),
    Target("pingpong", "cpu", EPOLL, 1.1),
    Target("pingpong", "cpu", GO, 1.0),
    Target("stream", "cpu", EPOLL, 1.0),
    Target("stream", "cpu", GO, 0.7),
    Target("connect", "cpu", GO, 1.0),
    Target("idle", "memory", "", 3.0),
    Target("idle", "cpu", "", 0.2),
    Target("clients", "", "", 1.15),
    Target("latency", "p999", EPOLL, 1.2),
)


def spread(found: Spread) -> str:
    """Return a median with its range."""
    return f"{number(found.median)} ({number(found.lowest)} to {number(found.highest)})"


def plain(text: str) -> str:
    """Return foreign text escaped for a line or a table cell."""
    return re.sub(r"([|<*`\[])", r"\\\1", " ".join(text.split()))


def called(peer: str) -> str:
    """Return a server's name for a table. echod is bold."""
    return f"**{peer}**" if peer == ECHOD else plain(peer)


def size(count: int) -> str:
    """Return a size in KiB if it is a multiple, or else in bytes."""
    kibibyte = 1024
    return f"{count // kibibyte} KiB" if count >= kibibyte and count % kibibyte == 0 else f"{count} B"


def table(head: list[str], rows: list[list[str]], words: int) -> str:
    """Return a table. The first columns, as many as `words`, are text; the others are figures."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))


def targets(results: Results) -> str:
    """Return the table of the targets."""
    head = ["workload", "figure", "at most", "measured", "echod's", "the peer's", "reached"]
    return table(head, [verdict(results, target) for target in TARGETS], 2)


def verdict(results: Results, target: Target) -> list[str]:
    """Return the row of a target."""
    workload = next(workload for workload in WORKLOADS if workload.name == target.workload)
    metric = next((metric for metric in workload.metrics if metric.key == target.metric), FLATNESS)
    unit = f" {metric.unit}" if metric.unit else ""
    bound = f"{target.bound:.2f}" + (f" times {target.peer}" if target.peer else unit)
    rows = results.rows(workload)
    row = rows.get(target.peer or ECHOD)
    compared = target.peer or metric is FLATNESS
    found = row and (row.ratio if compared else row.figures.get(metric.key))
    if not found:
        reasons = [reason for peer in (ECHOD, target.peer) if peer for reason in why(results, workload, peer)]
        return [workload.title, metric.title, bound, "", "", "", f"not measured: {'; '.join(reasons)}"]
    reached = "yes" if found.median <= target.bound else "**no**"
    if found.rounds < results.settings["rounds"]:
        reached += f", measured in {found.rounds} of {results.settings['rounds']} rounds"
    if not target.peer:
        return [workload.title, metric.title, bound, spread(found) + unit, "", "", reached]
    both = [rows[peer].figures[metric.key] for peer in (ECHOD, target.peer)]
    medians = [f"{number(figure.median)}{unit}" for figure in both if figure]
    return [workload.title, metric.title, bound, spread(found), *medians, reached]


def why(results: Results, workload: Workload, peer: str) -> list[str]:
    """Return why a server has no figures, or not all of them."""
    row = results.rows(workload).get(peer)
    reasons = [results.missing.get(peer, "not run")] if row is None else [*row.failures]
    return [plain(f"{peer}: {reason}") for reason in reasons]


def section(results: Results, workload: Workload) -> Iterator[str]:
    """Yield the parts of a workload's section."""
    yield f"## {workload.title}\n"
    rows, load, columns = results.rows(workload), results.load(workload), results.columns(workload)
    if results.measured(workload):
        clients, rate = (f"{value:,.0f}" for value in (max(load["clients"], default=0), load.get("rate", 0)))
        yield workload.about.format(clients=clients, rate=rate, size=size(load.get("size", 0))) + "\n"
        if workload is CLIENTS:
            yield f"![{workload.title}: the medians of the table](benchmarks/{workload.name}.svg)\n"
    head = [f"{metric.title}, {metric.unit}" if metric.unit else metric.title for metric in columns]
    if workload.metrics:
        head.insert(workload.main + 1, "echod / peer")
    else:
        head.append("highest / lowest")
    if rows:
        yield table(["peer", *head], [[called(peer), *cells(results, workload, row)] for peer, row in rows.items()], 1)
    notes = [note for peer, row in rows.items() for note in remarks(peer, row)]
    if absent := results.absent(workload):
        named = (f"{peer} ({results.missing[peer]})" if peer in results.missing else peer for peer in absent)
        notes.append("not run: " + plain("; ".join(named)))
    if notes:
        yield "\n".join(f"- {note}" for note in notes) + "\n"


def cells(results: Results, workload: Workload, row: Row) -> list[str]:
    """Return a server's row in the table of a workload."""
    found = []
    for metric in results.columns(workload):
        figure = row.figures.get(metric.key)
        if figure:
            cell = spread(figure) if metric.spread else number(figure.median)
        else:
            cell = "failed" if metric.key in row.figures else "not run"
        found.append(cell + (", the limit" if metric.key == LOAD.key and row.limited else ""))
    found.insert(workload.main + 1 if workload.metrics else len(found), spread(row.ratio) if row.ratio else "")
    return found


def remarks(peer: str, row: Row) -> Iterator[str]:
    """Yield notes on a server's row."""
    for reason, count in row.failures.items():
        yield f"{plain(peer)}: {count} of {row.runs} runs failed: {plain(reason)}"
    rounds = sum(count for count, _ in row.receipts)
    for count, receipt in row.receipts:
        counts = ", ".join(f"{value:,} {key}" for key, value in receipt.items())
        yield f"{plain(peer)}, the receipt of {count} of {rounds} rounds: {counts}"


def page(results: Results, changes: str) -> str:
    """Return docs/explanation/benchmarks.md.

    Args:
        results: The summary of the measurement.
        changes: Markdown about the effect of each change of the daemon.

    """
    facts = {**results.machine, **results.settings, "unlogged": UNLOGGED}
    parts = [HEAD.format_map(facts)]
    if results.settings["quick"]:
        parts.append("**These figures are from a quick run: too few and too short rounds to compare servers.**\n")
    parts += [GOALS, targets(results)]
    if any(results.measured(workload) for workload in COSTS):
        parts.append(OVERVIEW)
    about = [
        [called(peer), plain(facts["about"]), plain(facts["version"])]
        for peer, facts in results.about.items()
        if peer not in results.missing
    ]
    parts += ["## Servers\n", table(["peer", "approach", "version"], about, 3)]
    if results.missing:
        lines = [f"- {plain(peer)}: {plain(reason)}" for peer, reason in results.missing.items()]
        parts.append("Missing, because they could not be built or started here:\n\n" + "\n".join(lines) + "\n")
    for workload in WORKLOADS:
        parts += section(results, workload)
    if changes:
        parts += ["## Effect of each change\n", changes.strip() + "\n"]
    return "\n".join([*parts, TAIL.format_map(facts)])


def main(file: str, docs: str = str(HERE.parent / "docs" / "explanation")) -> None:
    """Write the page, and the charts beside it.

    Args:
        file: The summary.
        docs: The folder of the page.

    """
    results = Results(json.loads(Path(file).read_text()))
    folder = Path(docs, "benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    for name, chart in draw(results):
        (folder / f"{name}.svg").write_text(chart)
    Path(docs, "benchmarks.md").write_text(page(results, CHANGES.read_text() if CHANGES.exists() else ""))


if __name__ == "__main__":
    main(*sys.argv[1:])
