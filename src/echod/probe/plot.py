"""Plot latencies by percentile as a self-contained SVG file."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

from echod.units import seconds_text

if TYPE_CHECKING:
    from collections.abc import Mapping

# Points of the curve per nine, and the highest number of nines shown.
_STEPS = 16
_NINES = 6
# The highest number of horizontal grid lines. More would be too close to each other.
_LINES = 14

_WIDTH, _HEIGHT = 860, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 45, 60, 60

_HEAD = f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img">
<style>
svg {{ background: #fff; font: 14px system-ui, sans-serif; }}
text {{ fill: #333; }}
.title {{ font-size: 16px; font-weight: 600; }}
.middle {{ text-anchor: middle; }}
.end {{ text-anchor: end; }}
.grid {{ stroke: #ddd; }}
.curve {{ fill: none; stroke: #0b62c4; stroke-width: 2.5; stroke-linejoin: round; }}
@media (prefers-color-scheme: dark) {{
svg {{ background: #16181d; }}
text {{ fill: #d6d9de; }}
.grid {{ stroke: #3a3f48; }}
.curve {{ stroke: #6cb2ff; }}
}}
</style>
"""


def percentiles(count: int) -> list[float]:
    """Return the percentiles to draw for `count` messages. More nines than the count resolves would be meaningless."""
    nines = max(1, min(_NINES, math.ceil(math.log10(count))))
    return [100 - 100 * 10 ** -(step / _STEPS) for step in range(nines * _STEPS + 1)]


def svg(title: str, latencies: Mapping[float, float]) -> str:
    """Return the plot as SVG. Every nine has the same width, so that the tail is visible.

    Args:
        title: the heading of the plot.
        latencies: seconds by percentile, for each percentile that `percentiles` returns.

    """
    nines = round(-math.log10(1 - max(latencies) / 100))
    lines = _lines(min(latencies.values()), max(latencies.values()))

    def x(percent: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * -math.log10(1 - percent / 100) / nines

    def y(seconds: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * math.log(lines[-1] / seconds, lines[-1] / lines[0])

    parts = [_HEAD, f"<title>{html.escape(title)}</title>\n", _text(_LEFT, 30, title, "title")]
    for nine in range(nines + 1):
        percent = 100 - 100 * 10.0**-nine
        parts.append(_line(x(percent), _TOP, x(percent), _HEIGHT - _BOTTOM))
        parts.append(_text(x(percent), _HEIGHT - _BOTTOM + 22, f"{percent:.{max(nine - 2, 0)}f}%", "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 14, "of all messages took at most this long", "middle"))
    for seconds in lines if len(lines) <= _LINES else lines[:: math.ceil(len(lines) / _LINES)]:
        parts.append(_line(_LEFT, y(seconds), _WIDTH - _RIGHT, y(seconds)))
        parts.append(_text(_LEFT - 10, y(seconds) + 5, seconds_text(seconds), "end"))
    points = " ".join(f"{x(percent):.1f},{y(seconds):.1f}" for percent, seconds in latencies.items())
    parts.append(f'<polyline class="curve" points="{points}"/>\n</svg>\n')
    return "".join(parts)


def _lines(least: float, most: float) -> list[float]:
    """Return the grid values from `least` or below to `most` or above: 1, 2 and 5 times powers of ten."""
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 2)
    values = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    first = max(place for place, value in enumerate(values) if value <= least)
    last = min(place for place, value in enumerate(values) if value >= most and place > first)
    return values[first : last + 1]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>\n'


def _text(x: float, y: float, text: str, look: str) -> str:
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>\n'
