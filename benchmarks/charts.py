"""Draw the charts of the benchmark page as small SVG files that suit light and dark pages.

The same results give the same bytes.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from figures import ECHOD, WORKLOADS, number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from figures import Results, Workload

STYLE = """\
text { font: 12px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #1f2328 }
.echod { font-weight: 600 } .end { text-anchor: end } .mid { text-anchor: middle }
path, polyline { fill: none; stroke-width: 1.5 } .bars { stroke-width: 12 } .own { stroke-width: 3 } .leader { stroke-width: 0.5 }
.card { fill: #ffffff } .grid { stroke: #d1d9e0; stroke-width: 1 } .range { stroke: #1f2328; stroke-width: 1 }
.c0 { stroke: #1a7f37 } .c1 { stroke: #58a76c } .c2 { stroke: #5b7ea6 } .c3 { stroke: #bc4c00 } .c4 { stroke: #8250df }
.c5 { stroke: #9a6700 } .c6 { stroke: #bf3989 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .card { fill: #0d1117 } .grid { stroke: #30363d } .range { stroke: #e6edf3 }
.c0 { stroke: #3fb950 } .c1 { stroke: #35914a } .c2 { stroke: #6f93bd } .c3 { stroke: #f0883e } .c4 { stroke: #bc8cff }
.c5 { stroke: #d29922 } .c6 { stroke: #f778ba }
}
"""
# Colours: echod, its variants, other servers. In the chart of lines, each other server has one of its own.
OWN, VARIANT, OTHER, LINES = 0, 1, 2, range(2, 7)
COSTS = tuple(workload for workload in WORKLOADS if workload.name in {"pingpong", "stream", "connect", "idle"})
CLIENTS = next(workload for workload in WORKLOADS if workload.name == "clients")


def draw(results: Results) -> Iterator[tuple[str, str]]:
    """Yield the name and the SVG text of each chart that has figures."""
    if columns := [workload for workload in COSTS if results.measured(workload)]:
        yield "costs", costs(results, columns)
    if results.measured(CLIENTS):
        yield CLIENTS.name, lines(results)


def costs(results: Results, columns: list[Workload]) -> str:
    """Draw a bar for each serious server and workload, and a thin line for the range of its rounds."""
    left, top, height, width, longest = 124, 44, 22, 196, 118
    # The tools that start a process per client need up to a hundred times as much. They would flatten all other bars.
    peers = [peer for peer in order(results, columns) if results.serious(peer)]
    parts = [text(12, top + height * row + 4, peer, style(peer)) for row, peer in enumerate(peers)]
    for column, workload in enumerate(columns):
        x, metric = left + width * column, workload.metrics[workload.main]
        parts.append(text(x, 20, f"{metric.title}, {metric.unit}", "echod"))
        rows = results.rows(workload)
        figures = {peer: rows[peer].figures.get(metric.key) for peer in peers if peer in rows}
        scale = longest / (max((figure.highest for figure in figures.values() if figure), default=0) or 1)
        bars: dict[int, str] = {}
        ranges = ""
        for peer, figure in figures.items():
            y = top + height * peers.index(peer)
            if figure is None:
                parts.append(text(x, y + 4, "failed"))
                continue
            low, middle, high = (x + scale * value for value in (figure.lowest, figure.median, figure.highest))
            bars[colour(peer)] = bars.get(colour(peer), "") + f"M{x} {y}H{middle:.1f}"
            ranges += f"M{low:.1f} {y}H{high:.1f}"
            parts.append(text(high + 6, y + 4, number(figure.median), style(peer)))
        parts += [f'<path class="bars c{shade}" d="{bar}"/>' for shade, bar in bars.items()]
        parts.append(f'<path class="range" d="{ranges}"/>')
    return svg(
        "Cost per message, GB, connection and idle client",
        left + width * len(columns),
        top + height * len(peers),
        parts,
    )


def order(results: Results, columns: list[Workload]) -> list[str]:
    """Return the servers in the order of the first workload, then those that only others have."""
    return list(dict.fromkeys(peer for workload in columns for peer in results.rows(workload)))


def lines(results: Results) -> str:
    """Draw the CPU per message over the number of clients. Each server has a line, with its name at the right."""
    left, right, top, bottom = 36, 560, 32, 330
    columns = results.columns(CLIENTS)
    curves: dict[str, list[tuple[int, float]]] = {}
    for peer, row in results.rows(CLIENTS).items():
        found = [(place, row.figures.get(metric.key)) for place, metric in enumerate(columns)]
        curves[peer] = [(place, figure.median) for place, figure in found if figure]
    names = sorted((peer for peer, curve in curves.items() if curve), key=lambda peer: curves[peer][-1][1])
    step, ceiling = ticks(max(value for curve in curves.values() for _, value in curve))

    def across(place: int) -> float:
        return left + 12 + (right - left - 24) * place / max(len(columns) - 1, 1)

    def down(value: float) -> float:
        return bottom - (bottom - top) * value / ceiling

    parts = [text(left - 24, 16, "CPU per message, µs"), text((left + right) / 2, bottom + 36, "clients", "mid")]
    marks = [step * count for count in range(round(ceiling / step) + 1)]
    parts += [text(left - 6, down(mark) + 4, f"{mark:g}", "end") for mark in marks]
    parts.append(f'<path class="grid" d="{"".join(f"M{left} {down(mark):.1f}H{right}" for mark in marks)}"/>')
    parts += [text(across(place), bottom + 18, metric.title, "mid") for place, metric in enumerate(columns)]
    shades = itertools.cycle(LINES)
    heights = apart([down(curves[peer][-1][1]) for peer in reversed(names)], 15, bottom)
    for peer, height in zip(reversed(names), heights, strict=True):
        shade = colour(peer) if peer.startswith(ECHOD) else next(shades)
        points = " ".join(f"{across(place):.1f},{down(value):.1f}" for place, value in curves[peer])
        width = " own" if peer == ECHOD else ""
        parts.append(f'<polyline class="c{shade}{width}" points="{points}"/>')
        parts.append(f'<path class="leader c{shade}" d="M{points.split()[-1]}L{right + 14},{height:.1f}"/>')
        parts.append(text(right + 18, height + 4, peer, style(peer)))
    return svg("CPU per message by number of clients", right + 150, bottom + 48, parts)


def ticks(highest: float) -> tuple[float, float]:
    """Return the step of an axis from 0, and a multiple of it that is not below the highest value."""
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(step for step in (power / 5, power / 2, power, 2 * power) if highest / step <= 6)
    return step, step * math.ceil(highest / step)


def apart(heights: list[float], gap: float, bottom: float) -> list[float]:
    """Return heights, from top to bottom, moved so that no two labels overlap and none is below the bottom."""
    moved: list[float] = []
    for height in heights:
        moved.append(max([height, *(before + gap for before in moved[-1:])]))
    for place in reversed(range(len(moved))):
        moved[place] = min(moved[place], bottom)
        bottom = moved[place] - gap
    return moved


def colour(peer: str) -> int:
    """Return the number of a server's colour."""
    if peer == ECHOD:
        return OWN
    return VARIANT if peer.startswith(ECHOD) else OTHER


def style(peer: str) -> str:
    """Return the class of a server's texts."""
    return "echod" if peer == ECHOD else ""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Return a text element."""
    attribute = f' class="{kind}"' if kind else ""
    return f'<text{attribute} x="{x:.0f}" y="{y:.0f}">{escape(words)}</text>'


def svg(title: str, width: float, height: float, parts: list[str]) -> str:
    """Return the text of an SVG file."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img">\n<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n'
        f'<rect class="card" width="{width}" height="{height}" rx="8"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"
