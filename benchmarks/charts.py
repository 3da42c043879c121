"""The benchmark's charts: SVG that suits light and dark pages, the same bytes for the same results."""

from __future__ import annotations

import io
import itertools
import math
from statistics import median
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from figures import ECHOD, WORKS, number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

    from figures import Results, Work

# Each colour of a light page, and the one that a dark page has in its place.
PAPER, INK, GRID, GREEN, TEAL, BLUE, PALE = "#ffffff", "#1f2328", "#d1d9e0", "#1a7f37", "#58a76c", "#5b7ea6", "#b4c1cf"
LINES = ("#0969da", "#8250df", "#bc4c00", "#9a6700", "#bf3989")
LIGHT = (PAPER, INK, GRID, GREEN, TEAL, BLUE, PALE, *LINES)
DARK = (
    *("#0d1117", "#e6edf3", "#30363d", "#3fb950", "#35914a", "#6f93bd", "#4a5663"),
    *("#58a6ff", "#bc8cff", "#f0883e", "#d29922", "#f778ba"),
)
# matplotlib writes a colour into each element's own style, which only `!important` outdoes.
STYLE = (
    "text { font-family: system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif !important }\n"
    "@media (prefers-color-scheme: dark) {\n"
    + "".join(
        f'[style*="{what}: {light}"] {{ {what}: {dark} !important }}\n'
        for light, dark in zip(LIGHT, DARK, strict=True)
        for what in ("fill", "stroke")
    )
    + "}\n"
)
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "echod",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "legend.frameon": False,
}
# Inches.
WIDTH, ROW = 8.5, 0.28


def draw(results: Results) -> Iterator[tuple[str, str]]:
    """Yield a name and an SVG for each work that has figures."""
    kinds = {"latency": dots, "clients": lines}
    with mpl.rc_context(SETTINGS):
        for work in WORKS:
            if results.good(work):
                figure, target = kinds.get(work.name, bars)(results, work), io.StringIO()
                metadata = {"Title": work.title, "Date": None, "Creator": None}
                figure.savefig(target, format="svg", metadata=metadata, bbox_inches="tight")
                yield work.name, target.getvalue().replace("</style>", STYLE + "</style>", 1)


def rows(peers: list[str], label: str) -> tuple[Figure, Axes]:
    """Return a chart with a row for each peer, the first at the top."""
    figure = Figure((WIDTH, ROW * len(peers) + 0.9))
    axes = figure.subplots()
    axes.set_yticks(range(len(peers)), peers)
    axes.set_ylim(len(peers) - 0.4, -0.6)
    axes.tick_params(length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(label)
    return figure, axes


def colour(results: Results, peer: str) -> str:
    """Return the colour of a peer's bar."""
    if peer.startswith(ECHOD):
        return GREEN if peer == ECHOD else TEAL
    return BLUE if results.serious(peer) else PALE


def failed(axes: Axes, place: int) -> None:
    """Say in a row that it has no figures."""
    axes.text(0.005, place, "failed", va="center", style="italic", transform=axes.get_yaxis_transform())


def bars(results: Results, work: Work) -> Figure:
    """Draw the key metric, each with a line from the lowest to the highest round."""
    metric, peers = work.metrics[work.key], results.peers(work)
    figure, axes = rows(peers, f"{metric.title}, {metric.unit}")
    found = {peer: [*results.rounds(work, metric, peer).values()] for peer in peers}
    highest = {peer: max(values) for peer, values in found.items() if values}
    # One tool that takes a hundred times as much would leave nothing to see of the others.
    edge = 1.15 * max([high for peer, high in highest.items() if results.serious(peer)] or highest.values()) or 1
    axes.set_xlim(0, edge)
    middles = {peer: median(values) for peer, values in found.items() if values}
    places = [peers.index(peer) for peer in middles]
    below = [middle - min(found[peer]) for peer, middle in middles.items()]
    above = [highest[peer] - middle for peer, middle in middles.items()]
    axes.barh(places, [*middles.values()], 0.66, color=[colour(results, peer) for peer in middles])
    axes.errorbar([*middles.values()], places, xerr=[below, above], fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    for place, peer in enumerate(peers):
        if peer not in middles:
            failed(axes, place)
            continue
        end = (min(highest[peer], edge), place)
        axes.annotate(
            number(middles[peer]), end, (5, 0), textcoords="offset points", va="center", annotation_clip=False
        )
    return figure


def dots(results: Results, work: Work) -> Figure:
    """Draw all percentiles of a peer in its row."""
    peers = results.peers(work)
    figure, axes = rows(peers, "latency, µs")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    shades = [colour(results, peer) for peer in peers]
    middles = []
    for metric, marker in zip(work.metrics, "os^D", strict=True):
        found = [[*results.rounds(work, metric, peer).values()] for peer in peers]
        middles.append([median(values) if values else math.nan for values in found])
        axes.plot([], [], marker, color=INK, label=metric.title)
        # One call for each colour: a file has the marker's shape once for each call.
        for shade in dict.fromkeys(shades):
            own = [place for place, of in enumerate(shades) if of == shade]
            axes.plot([middles[-1][place] for place in own], own, marker, color=shade)
    lowest, highest = middles[0], middles[-1]
    axes.hlines(range(len(peers)), lowest, highest, color=GRID, linewidth=2, zorder=1)
    for place, middle in enumerate(lowest):
        if math.isnan(middle):
            failed(axes, place)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(work.metrics))
    return figure


def lines(results: Results, work: Work) -> Figure:
    """Draw a line for each peer over the number of clients, with its name at the right."""
    figure = Figure((WIDTH, 5.5))
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="clients", ylabel="CPU a message, µs")
    counts, metrics = results.counts(work), results.metrics(work)
    curves: dict[str, list[tuple[int, float]]] = {}
    for peer in results.peers(work):
        found = [[*results.rounds(work, metric, peer).values()] for metric in metrics]
        points = [(clients, median(values)) for clients, values in zip(counts, found, strict=True) if values]
        if points:
            curves[peer] = points
    # By where they end: neighbours have different colours.
    names = sorted(curves, key=lambda peer: curves[peer][-1][1])
    own = [peer for peer in names if peer.startswith(ECHOD)]
    shades = dict(zip((peer for peer in names if peer not in own), itertools.cycle(LINES), strict=False))
    shades |= {peer: colour(results, peer) for peer in own}
    for peer, points in curves.items():
        axes.plot(
            *zip(*points, strict=True),
            ".-",
            color=shades[peer],
            **({"lw": 2.5, "zorder": 3} if peer in own else {"lw": 1}),
        )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks(counts, [metric.title for metric in metrics])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    heights = apart([math.log(curves[peer][-1][1] / low) / math.log(high / low) for peer in names])
    for peer, height in zip(names, heights, strict=True):
        leader = {"arrowstyle": "-", "color": shades[peer], "linewidth": 0.5, "relpos": (0, 0.5)}
        axes.annotate(
            peer,
            curves[peer][-1],
            (1.04, height),
            textcoords="axes fraction",
            color=shades[peer],
            va="center",
            weight="bold" if peer == ECHOD else "normal",
            arrowprops=leader,
        )
    return figure


def apart(heights: list[float], gap: float = 0.042) -> list[float]:
    """Return heights, from low to high, moved so far that no two labels cover each other."""
    moved: list[float] = []
    for height in heights:
        moved.append(max([height, *(before + gap for before in moved[-1:])]))
    top = 1.0
    for place in reversed(range(len(moved))):
        moved[place] = min(moved[place], top)
        top = moved[place] - gap
    return moved
