"""Measure the seven steps and echod, and write the table in docs/explanation/evolution.md and the picture next to it.

    PYTHONPATH=tests/support python examples/evolution/measure.py [ROUNDS]

Each round measures all servers, and each scene gets a fresh process. The figures are the medians of all rounds.
A scene with times is repeated if other processes used the CPU meanwhile. They change how much work a server finds at each
wake-up. That changes its CPU per message by half or more. If the machine is never idle, the program gives up. It then
still writes the results of complete rounds, if there are at least three.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from harness import Daemon
from scenes import HERE, STEPS, Loss, Step, cost, idle, second_client, stop

if TYPE_CHECKING:
    from collections.abc import Callable

    from scenes import DaemonView

T = TypeVar("T")

DOCS = HERE.parents[1] / "docs" / "explanation"
PAGE, PICTURE = DOCS / "evolution.md", DOCS / "evolution.svg"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->\n"
NAMES = ("1 one client", "2 in turn", "3 busy loop", "4 selectors", "5 tasks", "6 shutdown", "7 protocol", "echod")
COLUMNS = ("CPU, one silent client", "second client's wait", "CPU per message", "lost at a stop under load")
# Clients and messages of the steps that cannot serve 50 clients and 20,000 messages. Step 1 serves one client. Step 2
# reads one line from each of its clients after every `accept`, which makes 1 + 2 + … + 50 lines.
LOADS = {STEPS[0]: (1, 3000, " (1 client)"), STEPS[1]: (50, 1275, " (in turn)")}
SILENCE = 1.0
CLIENTS = 50
# The share of a core that other processes may use during a scene with times, and the number of tries.
OTHERS, TRIES = 0.1, 120
ENOUGH = 3


def others() -> float:
    """Return the CPU time of all processes except this one and its reaped children, with stolen time, in seconds."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    usages = [resource.getrusage(scope) for scope in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy - sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Figure(NamedTuple):
    """A cell of the table, and a bar of the picture."""

    text: str
    bar: float
    """Length from 0 to 1. Longer bars are cut off at 1."""


class TooBusyError(Exception):
    """Other processes used the CPU during every try."""


class Samples:
    """The results of one server, by round."""

    def __init__(self, name: str, make: Callable[[], Daemon | Step]) -> None:
        self.name = name
        self._make = make
        self._clients, self._messages, self._remark = LOADS.get(name, (CLIENTS, 20_000, ""))
        self.idle: list[float] = []
        self.wait: list[float] = []
        self.cost: list[float] = []
        self.loss: list[Loss] = []

    def measure(self) -> None:
        """Measure each scene once."""
        with self._make() as server:
            self.idle.append(idle(server, 1))
        self.wait.append(self._undisturbed(lambda server: second_client(server, SILENCE)).seconds)
        self.cost.append(self._undisturbed(lambda server: cost(server, self._clients, self._messages)))
        with self._make() as server:
            self.loss.append(stop(server, CLIENTS, 0.5, 3))

    def last(self) -> str:
        """Return the results of the last round as text."""
        times = f"wait {self.wait[-1] * 1e3:.2f} ms  message {self.cost[-1] * 1e6:.1f} µs"
        return f"{self.name:16} idle {self.idle[-1]:.4f}  {times}  {self.loss[-1]}"

    def cut(self, rounds: int) -> None:
        """Drop all results after the first rounds."""
        for values in (self.idle, self.wait, self.cost, self.loss):
            del values[rounds:]

    def _undisturbed(self, scene: Callable[[DaemonView], T]) -> T:
        """Measure a scene until no other process has disturbed it."""
        for _ in range(TRIES):
            began, before = time.monotonic(), others()
            with self._make() as server:
                result = scene(server)
            if others() - before < OTHERS * (time.monotonic() - began):
                return result
            time.sleep(0.5)
        raise TooBusyError

    def figures(self) -> list[Figure]:
        """Return the medians, in the order of `COLUMNS`."""
        share, wait, price = (statistics.median(values) for values in (self.idle, self.wait, self.cost))
        clients = statistics.median_high(loss.clients for loss in self.loss)
        size = statistics.median(loss.size for loss in self.loss)
        return [
            Figure(f"{share:.1%}", share),
            Figure(
                "never served" if wait == float("inf") else f"{wait * 1e3:,.{0 if wait > 1e-2 else 2}f} ms", wait / 1.5
            ),
            Figure(f"{price * 1e6:.{0 if price > 1e-4 else 1}f} µs{self._remark}", price * 1e6 / 300),
            Figure(f"{clients} clients, {size / 1e3:,.0f} kB" if clients else "nothing", size / (CLIENTS * 16384)),
        ]


def table(rows: dict[str, list[Figure]], servers: list[Samples]) -> str:
    """Return the table, and a sentence about its conditions."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    lines += [f"| {name} | " + " | ".join(figure.text for figure in figures) + " |" for name, figures in rows.items()]
    python, cores = platform.python_version(), os.cpu_count()
    spread = ", ".join(f"{min(s.cost) * 1e6:.3g} to {max(s.cost) * 1e6:.3g} µs" for s in servers)
    return (
        "\n".join(lines)
        + f"\n\nMedians of {len(servers[0].cost)} rounds, Python {python}, {cores} cores, {platform.system()}. CPU per "
        + f"message in single rounds, in the order of the rows: {spread}.\n"
    )


def picture(rows: dict[str, list[Figure]]) -> str:
    """Return the same figures as bars, in an SVG that suits light and dark pages."""
    left, top, width, height, bar = 116, 64, 206, 40, 178
    across, down = left + width * len(COLUMNS), top + height * len(rows) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{across}" height="{down}" viewBox="0 0 {across} {down}">',
        "<title>The seven steps and echod: idle CPU, second client, CPU per message, loss at a stop</title>",
        "<style>",
        "  text { font: 13px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #1f2328 }",
        "  .head { font-weight: 600 } .card { fill: #ffffff; stroke: #d0d7de } .track { fill: #eaeef2 }",
        "  .step { fill: #bc4c00 } .echod { fill: #1a7f37 }",
        "  @media (prefers-color-scheme: dark) {",
        "    text { fill: #e6edf3 } .card { fill: #0d1117; stroke: #30363d } .track { fill: #262c36 }",
        "    .step { fill: #f0883e } .echod { fill: #3fb950 }",
        "  }",
        "</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{across - 1}" height="{down - 1}" rx="8"/>',
    ]
    parts += [
        f'<text class="head" x="{left + width * column}" y="36">{title}</text>' for column, title in enumerate(COLUMNS)
    ]
    for row, (name, figures) in enumerate(rows.items()):
        y = top + height * row
        kind = "echod" if name == "echod" else "step"
        parts.append(f'<text class="head" x="16" y="{y + 13}">{name}</text>')
        for column, figure in enumerate(figures):
            x = left + width * column
            length = round(bar * min(figure.bar, 1), 1)
            parts.append(f'<text x="{x}" y="{y + 13}">{figure.text}</text>')
            parts.append(f'<rect class="track" x="{x}" y="{y + 19}" width="{bar}" height="8" rx="2"/>')
            if length >= 0.5:
                parts.append(f'<rect class="{kind}" x="{x}" y="{y + 19}" width="{length}" height="8" rx="2"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(rounds: int) -> None:
    """Measure, and write the table and the picture."""
    servers = [Samples(step, partial(Step, step)) for step in STEPS]
    servers.append(Samples("echod", Daemon))
    try:
        for number in range(1, rounds + 1):
            for server in servers:
                server.measure()
                print(f"{number}/{rounds} {server.last()}", flush=True)
    except TooBusyError:
        whole = len(servers[-1].loss)
        if whole < ENOUGH:
            sys.exit(f"the machine is too busy: {whole} complete rounds with {TRIES} tries per scene")
        for server in servers:
            server.cut(whole)
    rows = dict(zip(NAMES, (server.figures() for server in servers), strict=True))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(rows, servers) + END + rest.partition(END)[2])
    PICTURE.write_text(picture(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
