"""What a measurement found: counted, and told to people and to machines."""

from __future__ import annotations

import bisect
import collections
import io
import json
import math
import signal
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from hdrh.histogram import HdrHistogram
from rich.console import Console
from rich.table import Table
from rich.text import Text

from echod.probe import plot
from echod.probe.command import Answer, Ending, Mismatch
from echod.probe.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from echod.probe.command import Order

PERCENTILES = (50.0, 90.0, 99.0, 99.9)

# The unit in which latencies are counted, nanoseconds.
_UNIT = 100
_NANO = 1_000_000_000
_DAY = 86400 * _NANO // _UNIT
# So many different latencies are kept as they are; more of them go into the histogram, a few at a time.
_KEPT = 50_000
_MOVED = 100

_WIDTH = 100
# Of the histogram: how many parts, and the least factor from the limit of one to the next.
_BARS = 16
_SMALLEST_FACTOR = 1.1
# Columns of the longest bar.
_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


class Bar(NamedTuple):
    """A part of the histogram."""

    limit: float
    """Seconds: the upper end, which belongs to it."""
    messages: int


class Latencies:
    """Latencies, with three significant digits each.

    Recording into a histogram takes about a microsecond, which is much where a message takes ten. So they are counted
    as they are first: of most there are many.
    """

    def __init__(self) -> None:
        self._histogram = HdrHistogram(1, _DAY, 3)
        self._counts: collections.Counter[int] = collections.Counter()
        self._sum = 0
        self.count = 0

    def add(self, values: list[int]) -> None:
        """Add some, nanoseconds."""
        self.count += len(values)
        self._sum += sum(values)
        self._counts.update([value // _UNIT for value in values])
        if len(self._counts) > _KEPT:
            self._move(_MOVED + len(values))

    def _move(self, number: int) -> None:
        for _ in range(min(number, len(self._counts))):
            value, count = self._counts.popitem()
            self._histogram.record_value(min(max(value, 1), _DAY), count)

    def _moved(self) -> HdrHistogram:
        self._move(len(self._counts))
        return self._histogram

    @property
    def mean(self) -> float:
        """Seconds."""
        return self._sum / self.count / _NANO

    @property
    def least(self) -> float:
        """Seconds."""
        return _seconds(self._moved().min_value)

    @property
    def most(self) -> float:
        """Seconds."""
        return _seconds(self._moved().max_value)

    def percentiles(self, of: Iterable[float]) -> dict[float, float]:
        """Return seconds by percentile."""
        histogram = self._moved()
        values = histogram.get_percentile_to_value_dict(list(of))
        # The histogram gives the upper end of what it cannot tell apart.
        return {percent: _seconds(min(value, histogram.max_value)) for percent, value in sorted(values.items())}

    def encoded(self) -> str:
        """Return all of it in the format that the HDR histograms of other languages read, in units of 100 ns."""
        return str(self._moved().encode(), "ascii")

    def bars(self) -> list[Bar]:
        """Return the histogram in parts; the limits grow by one factor, so that a long tail takes few of them."""
        exact = [(_seconds(item.value_iterated_to), item.count_at_value_iterated_to) for item in self._moved()]
        least, most = self.least, self.most
        number = max(1, min(_BARS, round(math.log(most / least, _SMALLEST_FACTOR))))
        limits = [least * (most / least) ** (place / number) for place in range(1, number)]
        counts = [0] * number
        for value, count in exact:
            counts[bisect.bisect_left(limits, value)] += count
        return [Bar(limit, count) for limit, count in zip([*limits, most], counts, strict=True)]


@dataclass(slots=True)
class Figures:
    """What was counted."""

    connected: int = 0
    connect_seconds: float = 0.0
    """Of the slowest connection, with its TLS handshake."""
    tls: str | None = None
    seconds: float = 0.0
    """From the first message to the last echo, or to the end where that is later."""
    cpu_seconds: float = 0.0
    """This process's."""
    sent: int = 0
    received: int = 0
    """Bytes, all of them compared."""
    unanswered: int = 0
    """Messages that were due, and of which the whole echo did not come."""
    latencies: Latencies = field(default_factory=Latencies)
    lag: float = 0.0
    """How late a message of a schedule was sent at most, seconds: that is this process's doing, or its machine's."""
    throughput: list[float] = field(default_factory=list)
    """Bytes received a second, for each second."""
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    problem: str = ""
    """The first error, or the first wrong echo."""
    mismatch: tuple[int, Mismatch] | None = None
    """The first wrong echo, and the connection's number."""
    signal: signal.Signals | None = None
    """What ended it before its time."""


def unwritable(path: Path) -> str:
    """Return why a file cannot be written, or nothing."""
    try:
        path.open("a").close()
    except OSError as error:
        return f"--plot: {str(path)!r} cannot be written: {error.strerror}"
    return ""


def answer(order: Order, figures: Figures) -> Answer:
    """Say what was found, and write the plot."""
    problem = ""
    if figures.errors:
        kinds = ", ".join(f"{kind} {count}" for kind, count in figures.errors.most_common())
        problem = f"{order.target}: {figures.problem} (errors by kind: {kinds})"
    ending = Ending.FAILED if problem else Ending.RIGHT
    if figures.signal is not None:
        ending = Ending.INTERRUPTED if figures.signal == signal.SIGINT else Ending.TERMINATED
    elif not figures.connected:
        return Answer(Ending.UNREACHABLE, _json(order, figures, Ending.UNREACHABLE) if order.json else "", problem)
    if order.plot is not None and figures.latencies.count:
        try:
            order.plot.write_text(
                plot.svg(_title(order), figures.latencies.percentiles(plot.percentiles(figures.latencies.count))),
                "utf-8",
            )
        except OSError as error:
            problem = problem or f"--plot: {str(order.plot)!r} cannot be written: {error.strerror}"
            ending = Ending.FAILED if ending is Ending.RIGHT else ending
    return Answer(ending, _json(order, figures, ending) if order.json else _text(order, figures), problem)


def _mode(order: Order) -> str:
    return "stream" if order.stream else "open" if order.rate else "closed"


def _title(order: Order) -> str:
    connections = f"{order.connections} connection{'s' if order.connections > 1 else ''}"
    if order.stream:
        how = f"a stream in writes of {order.size} B"
    elif order.rate:
        how = f"{order.rate:g} messages of {order.size} B a second"
    else:
        how = f"messages of {order.size} B, {order.pipeline} at a time"
    return f"{order.target}: {connections}, {how}"


def _per_second(count: float, figures: Figures) -> float:
    return count / figures.seconds if figures.seconds else 0.0


def _json(order: Order, figures: Figures, ending: Ending) -> str:
    latencies = figures.latencies
    latency: dict[str, float] | None = None
    if latencies.count:
        latency = {"min": latencies.least, "mean": latencies.mean}
        latency |= {f"p{percent:g}": value for percent, value in latencies.percentiles(PERCENTILES).items()}
        latency["max"] = latencies.most
    found: dict[str, Any] = {
        "target": str(order.target),
        "mode": _mode(order),
        "ending": ending.value,
        "connections": order.connections,
        "connected": figures.connected,
        "connect_seconds": figures.connect_seconds,
        "tls": figures.tls,
        "size": order.size,
        "pipeline": None if order.stream or order.rate else order.pipeline,
        "rate": order.rate,
        "seed": order.seed,
        "seconds": figures.seconds,
        "cpu_seconds": figures.cpu_seconds,
        "messages": None if order.stream else latencies.count,
        "messages_per_second": None if order.stream else _per_second(latencies.count, figures),
        "unanswered": None if order.stream else figures.unanswered,
        "bytes_sent": figures.sent,
        "bytes_received": figures.received,
        "bytes_per_second": _per_second(figures.received, figures),
        "throughput": figures.throughput,
        "latency": latency,
        "histogram": [list(bar) for bar in latencies.bars()] if latencies.count else None,
        "hdr": latencies.encoded() if latencies.count else None,
        "send_lag": figures.lag if order.rate else None,
        "errors": dict(figures.errors),
        "mismatch": {"connection": figures.mismatch[0]} | figures.mismatch[1]._asdict() if figures.mismatch else None,
        "problem": figures.problem or None,
        "signal": figures.signal.name if figures.signal is not None else None,
    }
    return json.dumps(found) + "\n"


def _text(order: Order, figures: Figures) -> str:
    terminal = sys.stdout is not None and sys.stdout.isatty()
    # Of a set width, so that it is the same in a file.
    console = Console(file=io.StringIO(), force_terminal=terminal, width=_WIDTH, highlight=False)
    console.print(Text(f"{_title(order)}, {figures.seconds:.3f} s", style="bold"))
    if figures.signal is not None:
        console.print(f"ended by {figures.signal.name}: this is what was measured so far")
    console.print()
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    if not order.stream:
        count = figures.latencies.count
        table.add_row("messages", f"{count:,}", f"{_per_second(count, figures):,.0f}/s")
        table.add_row("unanswered", f"{figures.unanswered:,}")
    table.add_row("bytes", f"{figures.received:,}", f"{bytes_text(_per_second(figures.received, figures))}/s")
    table.add_row("connections", f"{figures.connected:,}", f"within {seconds_text(figures.connect_seconds)}")
    table.add_row(
        "errors",
        f"{figures.errors.total():,}",
        ", ".join(f"{kind} {count}" for kind, count in figures.errors.most_common()),
    )
    if order.rate:
        table.add_row("sent late by", f"{seconds_text(figures.lag)}", "at most")
    console.print(table)
    if order.stream and len(figures.throughput) > 1:
        console.print()
        most = max(figures.throughput)
        console.print(
            _bars(
                (f"second {second}", f"{bytes_text(value)}/s", value / most if most else 0)
                for second, value in enumerate(figures.throughput, 1)
            )
        )
    if figures.latencies.count:
        console.print()
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(justify="right")
        for percent, value in figures.latencies.percentiles(PERCENTILES).items():
            table.add_row(f"p{percent:g}", seconds_text(value))
        table.add_row("max", seconds_text(figures.latencies.most))
        console.print(table)
        console.print()
        bars = figures.latencies.bars()
        largest = max(bar.messages for bar in bars)
        console.print(
            _bars((f"up to {seconds_text(bar.limit)}", f"{bar.messages:,}", bar.messages / largest) for bar in bars)
        )
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _bars(rows: Iterable[tuple[str, str, float]]) -> Table:
    """Return a bar for each row, of a name, a figure, and a part of the longest bar."""
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(style="cyan")
    for name, figure, part in rows:
        # Of what there is, something is to be seen.
        eighths = max(math.ceil(part * _BAR * 8), 0)
        table.add_row(name, figure, _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip())
    return table


def _seconds(value: int) -> float:
    return round(value * _UNIT / _NANO, 7)
