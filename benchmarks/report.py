"""Write docs/benchmarks.md and its charts from what benchmarks/run.py has measured.

    python benchmarks/report.py benchmarks/results/full.json [DOCS]

The same results give the same bytes. The charts need matplotlib, the page does not.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from figures import ECHOD, EPOLL, GO, LOAD, UNLOGGED, UVLOOP, WORKS, Metric, Results, Work, number

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
CHANGES = HERE / "changes.md"

HEAD = """\
# Benchmarks

<!-- Written by benchmarks/report.py from benchmarks/results/full.json and benchmarks/changes.md: change those. -->

echod beside other echo servers, on one machine and under the same load. What counts first is the server's CPU time for a
unit of work; the wall figures stand beside it.

    make bench          # builds and runs all that is available; minutes, on a machine that has nothing else to do
    make bench-quick    # fewer and shorter rounds, under 90 s: enough to see a large change
    python benchmarks/report.py benchmarks/results/full.json    # this page and its charts, from the results

## How it is measured

- Machine: {cpu}, {cores} cores, {memory_gib} GiB, Linux {kernel}, Python {python}, echod {echod}, {date}.
- {rounds} rounds. In each, all servers take their turn at a work, then the next round begins: what else goes on in the machine
  meets all of them. Each load runs for {seconds:g} s, idle clients for twice as long, into a fresh process.
- The server has one core and the load generator, a program in C, the other one. Each server serves on one thread; a tool that
  starts a process for each client has all of them on that core.
- CPU time is the server's, user and system, of all its processes.
- A figure is the median of the rounds, with the lowest and the highest round in brackets. A ratio is taken within each round,
  echod's figure divided by the peer's, and then it is the median of these, with their lowest and highest. Below 1, echod
  needs less.
- "The limit" marks the rows where the load generator had no time left while the server had some: the wall figure is then the load
  generator's, and only the CPU time tells the servers apart.
- echod is at its defaults, its log in a file. "{unlogged}" has `log.connections = "none"`.
- In the charts, echod is green, and the line at a bar's end spans lowest to highest round. The paler bars are tools that nobody
  would put a serious load on; a bar may leave the chart, and then has its figure at the edge.
"""

GOALS = """\
## The targets

What echod sets out to reach on one core, with everything at its default. The median decides; where the bound lies within the
brackets, single rounds say otherwise.
"""

TAIL = """\
## What the figures do not say

- Loopback is no network: no card, no driver, no loss, no distance. A send on loopback does the receiver's part of TCP as well,
  so some of the client's work is in the server's CPU time, with every server alike.
- There are {cores} cores, for server, load generator, and whatever else the system does. Each server was held to one, so nothing
  here tells how it grows with more.
- In a virtual machine, neighbours take time and caches, and a system call may cost more than it does elsewhere. Ratios
  carry over to another machine better than figures; neither spares measuring there.
- It is all echo. The bare loops have no limits, no timeouts, no log and no graceful stop, and no figure here shows what it is to
  be without.
"""


class Target(NamedTuple):
    """A row of the design's table: echod's figure is at most the bound, times the peer's where one is named."""

    work: str
    metric: str
    peer: str
    bound: float


FLATNESS = Metric("most / least CPU a message", "", lambda _: math.nan)
TARGETS = (
    Target("pingpong", "CPU a message", UVLOOP, 1.05),
    Target("pingpong", "CPU a message", EPOLL, 1.1),
    Target("pingpong", "CPU a message", GO, 1.0),
    Target("stream", "CPU a GB", EPOLL, 1.0),
    Target("stream", "CPU a GB", GO, 0.7),
    Target("connect", "CPU a connection", GO, 1.0),
    Target("idle", "memory a client", "", 3.0),
    Target("idle", "CPU", "", 0.2),
    Target("clients", FLATNESS.title, "", 1.15),
    Target("latency", "p99.9", EPOLL, 1.2),
)


def spread(middle: float, values: list[float]) -> str:
    """Return a figure with its lowest and highest round."""
    return f"{number(middle)} ({number(min(values))} to {number(max(values))})"


def plain(text: str) -> str:
    """Return foreign words so that they can stand in a line or a cell."""
    return re.sub(r"([|<*`\[])", r"\\\1", " ".join(text.split()))


def called(peer: str) -> str:
    """Return a peer's name for a table, echod's so that it stands out."""
    return f"**{peer}**" if peer == ECHOD else plain(peer)


def size(count: int) -> str:
    """Return a size as the works name it."""
    kibibyte = 1024
    return f"{count // kibibyte} KiB" if count >= kibibyte and count % kibibyte == 0 else f"{count} B"


def table(head: list[str], rows: list[list[str]], words: int) -> str:
    """Return a table: so many columns of words, the others hold figures."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))


def targets(results: Results) -> str:
    """Return the table of the targets."""
    head = ["work", "figure", "at most", "measured", "echod's", "the peer's", "reached"]
    return table(head, [verdict(results, target) for target in TARGETS], 2)


def verdict(results: Results, target: Target) -> list[str]:
    """Return a target's row."""
    work = next(work for work in WORKS if work.name == target.work)
    metric = next((metric for metric in work.metrics if metric.title == target.metric), FLATNESS)
    unit = f" {metric.unit}" if metric.unit else ""
    own, other = ([*results.rounds(work, metric, peer).values()] for peer in (ECHOD, target.peer))
    found: tuple[float, list[float]] | None
    if metric is FLATNESS:
        found = results.flatness(work, ECHOD)
    else:
        values = results.ratios(work, metric, target.peer) if target.peer else own
        found = (median(values), values) if values else None
    row = [work.title, target.metric, f"{target.bound:.2f}" + (f" times {target.peer}" if target.peer else unit)]
    if found is None:
        reasons = [reason for peer in (ECHOD, target.peer) if peer for reason in why(results, work, peer)]
        return [*row, "", "", "", f"not measured: {'; '.join(reasons)}"]
    reached = "yes" if found[0] <= target.bound else "**no**"
    if len(found[1]) < results.settings["rounds"]:
        reached += f", measured in {len(found[1])} of {results.settings['rounds']} rounds"
    both = [f"{number(median(values))}{unit}" if target.peer else "" for values in (own, other)]
    return [*row, spread(*found) + ("" if target.peer else unit), *both, reached]


def why(results: Results, work: Work, peer: str) -> list[str]:
    """Return why a peer has no figures, or not all."""
    reasons = [*dict.fromkeys(results.failures(work, peer))]
    if not results.runs(work, peer):
        reasons = [results.missing.get(peer, "not run")]
    return [plain(f"{peer}: {reason}") for reason in reasons]


def section(results: Results, work: Work) -> Iterator[str]:
    """Yield what there is to say of a work."""
    yield f"## {work.title}\n"
    good = results.good(work)
    if good:
        clients, rate = (f"{good[0].get(key, 0):,.0f}" for key in ("clients", "rate"))
        yield work.about.format(clients=clients, rate=rate, size=size(good[0].get("size", 0))) + "\n"
        yield f"![{work.title}: the figures of the table below](benchmarks/{work.name}.svg)\n"
    peers, metrics = results.peers(work), results.metrics(work)
    head = [f"{metric.title}, {metric.unit}" if metric.unit else metric.title for metric in metrics]
    head.insert(work.key + 1 if work.metrics else len(head), "echod / peer" if work.metrics else "most / least")
    if peers:
        yield table(["peer", *head], [[called(peer), *cells(results, work, peer)] for peer in peers], 1)
    notes = [note for peer in peers for note in remarks(results, work, peer)]
    if absent := results.absent(work):
        named = (f"{peer} ({results.missing[peer]})" if peer in results.missing else peer for peer in absent)
        notes.append("not run: " + plain("; ".join(named)))
    if notes:
        yield "\n".join(f"- {note}" for note in notes) + "\n"


def cells(results: Results, work: Work, peer: str) -> list[str]:
    """Return a peer's row in the table of a work."""
    found = []
    for metric in results.metrics(work):
        values = [*results.rounds(work, metric, peer).values()]
        if values:
            cell = spread(median(values), values) if metric.spread else number(median(values))
        else:
            cell = "failed" if results.failures(work, peer, metric) else "not run"
        found.append(cell + (", the limit" if metric is LOAD and results.limited(work, peer) else ""))
    if not work.metrics:
        flat = results.flatness(work, peer)
        return [*found, spread(*flat) if flat else ""]
    ratios = [] if peer == ECHOD else results.ratios(work, work.metrics[work.key], peer)
    found.insert(work.key + 1, spread(median(ratios), ratios) if ratios else "")
    return found


def remarks(results: Results, work: Work, peer: str) -> Iterator[str]:
    """Yield what a peer's row does not say."""
    runs, failures = results.runs(work, peer), results.failures(work, peer)
    for reason, count in Counter(failures).items():
        yield f"{plain(peer)}: {count} of {len(runs)} runs failed: {plain(reason)}"
    if errors := sum(run.get("errors", 0) for run in results.good(work, peer)):
        yield f"{plain(peer)}: {errors:,} errors in the runs that the figures are of"
    receipts = [run["receipt"] for run in results.good(work, peer) if "receipt" in run]
    counts = (
        ", ".join(f"{value:,} {key}" for key, value in receipt.items() if key != "seconds") for receipt in receipts
    )
    for receipt, count in Counter(counts).items():
        yield f"{plain(peer)}, the receipt of {count} of {len(receipts)} rounds: {receipt}"


def page(results: Results, changes: str) -> str:
    """Return docs/benchmarks.md.

    Args:
        results: what was measured.
        changes: Markdown on what each change of the daemon has brought.

    """
    facts = {**results.machine, **results.settings, "unlogged": UNLOGGED}
    parts = [HEAD.format_map(facts)]
    if results.settings["quick"]:
        parts.append("**These are the figures of a quick run: too short and too few to compare by.**\n")
    parts += [GOALS, targets(results), "## Who takes part\n"]
    present = [peer for peer in results.about if peer not in results.missing]
    about = [
        [called(peer), plain(results.about[peer]["about"]), plain(results.about[peer]["version"])] for peer in present
    ]
    parts.append(table(["peer", "what it is", "measured"], about, 3))
    if results.missing:
        lines = [f"- {plain(peer)}: {plain(reason)}" for peer, reason in results.missing.items()]
        parts.append("Missing, because it could not be built or started here:\n\n" + "\n".join(lines) + "\n")
    for work in WORKS:
        parts += section(results, work)
    if changes:
        parts += ["## What each change has brought\n", changes.strip() + "\n"]
    return "\n".join([*parts, TAIL.format_map(facts)])


def main(file: str, docs: str = str(HERE.parent / "docs")) -> None:
    """Write the page, and the charts beside it.

    Args:
        file: the results.
        docs: the folder of the page.

    """
    try:
        from charts import draw  # noqa: PLC0415  (the page alone can do without matplotlib)
    except ModuleNotFoundError as error:
        sys.exit(f"{error}: see benchmarks/requirements.txt")
    results = Results(json.loads(Path(file).read_text()))
    folder = Path(docs, "benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    for name, chart in draw(results):
        (folder / f"{name}.svg").write_text(chart)
    Path(docs, "benchmarks.md").write_text(page(results, CHANGES.read_text() if CHANGES.exists() else ""))


if __name__ == "__main__":
    main(*sys.argv[1:])
