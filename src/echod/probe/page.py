"""The parts that the reports of all measurements share: text of 80 columns, and the latencies as JSON."""

from __future__ import annotations

import io
import math
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from echod.units import seconds_text

if TYPE_CHECKING:
    import signal
    from collections.abc import Iterable

    from echod.probe.latencies import Latencies

_PERCENTILES = (50.0, 90.0, 99.0, 99.9)
# Columns of the text, which is the same on a terminal and in a file.
_WIDTH = 80
# Columns of the longest bar.
_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def latency_keys(latencies: Latencies) -> dict[str, Any]:
    """Return the keys of the JSON report with the latencies."""
    if not latencies.count:
        return dict.fromkeys(("latency", "histogram", "hdr"))
    percentiles = {f"p{percent:g}": value for percent, value in latencies.percentiles(_PERCENTILES).items()}
    return {
        "latency": {"min": latencies.least, "mean": latencies.mean, **percentiles, "max": latencies.most},
        "histogram": [list(bar) for bar in latencies.bars()],
        "hdr": latencies.encoded(),
    }


class Page:
    """The text of a report.

    Args:
        title: the first line.
        by: the signal that ended the measurement early, if one did.

    """

    def __init__(self, title: str, by: signal.Signals | None) -> None:
        terminal = sys.stdout is not None and sys.stdout.isatty()
        self._output = io.StringIO()
        # None leaves the decision to FORCE_COLOR.
        self._console = Console(file=self._output, force_terminal=terminal or None, width=_WIDTH, highlight=False)
        self._console.print(Text(title, style="bold"))
        if by is not None:
            self._console.print(f"ended by {by.name}: these are the results so far")

    def table(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """Add figures. Each row has a name, a figure, and a remark or another figure."""
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(justify="right")
        table.add_column(justify="right")
        for row in rows:
            table.add_row(*row)
        self._console.print()
        self._console.print(table)

    def warning(self, text: str) -> None:
        """Add a line that stands out."""
        self._console.print()
        self._console.print(Text(text, style="bold yellow"))

    def bars(self, rows: Iterable[tuple[str, str, float]]) -> None:
        """Add bars. Each row has a name, a figure, and the bar's part of the longest bar."""
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right")
        table.add_column(justify="right")
        table.add_column(style="cyan")
        for name, figure, part in rows:
            # Rounded up, so that a small value is visible.
            eighths = max(math.ceil(part * _BAR * 8), 0)
            table.add_row(name, figure, _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip())
        self._console.print()
        self._console.print(table)

    def latencies(self, latencies: Latencies) -> None:
        """Add percentiles and a histogram, if there is a latency."""
        if not latencies.count:
            return
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(justify="right")
        for percent, value in latencies.percentiles(_PERCENTILES).items():
            table.add_row(f"p{percent:g}", seconds_text(value))
        table.add_row("max", seconds_text(latencies.most))
        self._console.print()
        self._console.print(table)
        bars = latencies.bars()
        largest = max(bar.messages for bar in bars)
        self.bars((f"up to {seconds_text(bar.limit)}", f"{bar.messages:,}", bar.messages / largest) for bar in bars)

    def text(self) -> str:
        """Return the whole text."""
        return "\n".join(line.rstrip() for line in self._output.getvalue().splitlines()) + "\n"
