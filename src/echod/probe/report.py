"""Report the results of a measurement as text, as JSON and as a plot."""

from __future__ import annotations

import io
import json
import math
import signal
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from echod.probe import plot
from echod.probe.model import Outcome, ProbeResult
from echod.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from echod.probe.load import Results
    from echod.probe.model import ProbeOptions

_PERCENTILES = (50.0, 90.0, 99.0, 99.9)
# Columns of the text, which is the same on a terminal and in a file.
_WIDTH = 80
# Columns of the longest bar.
_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"
# The part of the requested rate that counts as reached.
_REACHED = 0.95


def unwritable(path: Path) -> str:
    """Return the reason why a file cannot be written, or nothing."""
    try:
        path.open("a").close()
    except OSError as error:
        return f"--plot: {str(path)!r} cannot be written: {error.strerror}"
    return ""


def result(options: ProbeOptions, results: Results) -> ProbeResult:
    """Format the results, and write the plot."""
    problem = ""
    if results.errors:
        kinds = ", ".join(f"{kind} {count}" for kind, count in results.errors.most_common())
        problem = f"{options.target}: {results.problem} (errors by kind: {kinds})"
    outcome = Outcome.FAILED if problem else Outcome.RIGHT
    if results.signal is not None:
        outcome = Outcome.INTERRUPTED if results.signal == signal.SIGINT else Outcome.TERMINATED
    elif not results.connected:
        return ProbeResult(
            Outcome.UNREACHABLE, _json(options, results, Outcome.UNREACHABLE) if options.json else "", problem
        )
    if options.plot is not None and results.latencies.count:
        try:
            options.plot.write_text(
                plot.svg(_title(options), results.latencies.percentiles(plot.percentiles(results.latencies.count))),
                "utf-8",
            )
        except OSError as error:
            problem = problem or f"--plot: {str(options.plot)!r} cannot be written: {error.strerror}"
            outcome = Outcome.FAILED if outcome is Outcome.RIGHT else outcome
    return ProbeResult(outcome, _json(options, results, outcome) if options.json else _text(options, results), problem)


def _mode(options: ProbeOptions) -> str:
    return "stream" if options.stream else "open" if options.rate else "closed"


def _title(options: ProbeOptions) -> str:
    connections = f"{options.connections} connection{'s' if options.connections > 1 else ''}"
    if options.stream:
        how = f"a stream in writes of {options.size:,} B"
    elif options.rate:
        how = f"{options.rate:,.10g} messages of {options.size:,} B per second"
    else:
        how = f"messages of {options.size:,} B, {options.pipeline:,} at a time"
    return f"{options.target}: {connections}, {how}"


def _per_second(count: float, results: Results) -> float:
    return count / results.seconds if results.seconds else 0.0


def _rate_reached(options: ProbeOptions, results: Results) -> bool | None:
    """Tell whether messages were answered at the requested rate, or return None if none was requested or answered."""
    latencies = results.latencies
    if options.rate is None or not latencies.count:
        return None
    # The schedule ends before the last echo, by the round trip.
    return latencies.count >= _REACHED * options.rate * (results.seconds - latencies.least)


def _json(options: ProbeOptions, results: Results, outcome: Outcome) -> str:
    latencies = results.latencies
    latency: dict[str, float] | None = None
    if latencies.count:
        latency = {"min": latencies.least, "mean": latencies.mean}
        latency |= {f"p{percent:g}": value for percent, value in latencies.percentiles(_PERCENTILES).items()}
        latency["max"] = latencies.most
    found: dict[str, Any] = {
        "target": str(options.target),
        "mode": _mode(options),
        "ending": outcome.value,
        "connections": options.connections,
        "connected": results.connected,
        "connect_seconds": results.connect_seconds,
        "tls": results.tls,
        "size": options.size,
        "pipeline": None if options.stream or options.rate else options.pipeline,
        "rate": options.rate,
        "rate_reached": _rate_reached(options, results),
        "seed": options.seed,
        "seconds": results.seconds,
        "cpu_seconds": results.cpu_seconds,
        "messages": None if options.stream else latencies.count,
        "messages_per_second": None if options.stream else _per_second(latencies.count, results),
        "unanswered": None if options.stream else results.unanswered,
        "bytes_sent": results.sent,
        "bytes_received": results.received,
        "bytes_per_second": _per_second(results.received, results),
        "throughput": results.throughput,
        "latency": latency,
        "histogram": [list(bar) for bar in latencies.bars()] if latencies.count else None,
        "hdr": latencies.encoded() if latencies.count else None,
        "send_lag": results.lag if options.rate else None,
        "errors": dict(results.errors),
        "mismatch": {"connection": results.mismatch[0]} | results.mismatch[1]._asdict() if results.mismatch else None,
        "problem": results.problem or None,
        "signal": results.signal.name if results.signal is not None else None,
    }
    return json.dumps(found) + "\n"


def _text(options: ProbeOptions, results: Results) -> str:
    terminal = sys.stdout is not None and sys.stdout.isatty()
    # None leaves the decision to FORCE_COLOR.
    console = Console(file=io.StringIO(), force_terminal=terminal or None, width=_WIDTH, highlight=False)
    console.print(Text(f"{_title(options)}, {results.seconds:.3f} s", style="bold"))
    if results.signal is not None:
        console.print(f"ended by {results.signal.name}: these are the results so far")
    console.print()
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    if not options.stream:
        count = results.latencies.count
        table.add_row("messages", f"{count:,}", f"{_per_second(count, results):,.0f}/s")
        table.add_row("unanswered", f"{results.unanswered:,}")
    table.add_row("bytes", f"{results.received:,}", f"{bytes_text(_per_second(results.received, results))}/s")
    table.add_row("connections", f"{results.connected:,}", f"within {seconds_text(results.connect_seconds)}")
    table.add_row(
        "errors",
        f"{results.errors.total():,}",
        ", ".join(f"{kind} {count}" for kind, count in results.errors.most_common()),
    )
    if options.rate:
        table.add_row("sent late by", f"{seconds_text(results.lag)}", "at most")
    console.print(table)
    if _rate_reached(options, results) is False:
        console.print()
        console.print(Text(_verdict(options, results), style="bold yellow"))
    if options.stream and len(results.throughput) > 1:
        console.print()
        most = max(results.throughput)
        console.print(
            _bars(
                (f"second {second}", f"{bytes_text(value)}/s", value / most if most else 0)
                for second, value in enumerate(results.throughput, 1)
            )
        )
    if results.latencies.count:
        console.print()
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(justify="right")
        for percent, value in results.latencies.percentiles(_PERCENTILES).items():
            table.add_row(f"p{percent:g}", seconds_text(value))
        table.add_row("max", seconds_text(results.latencies.most))
        console.print(table)
        console.print()
        bars = results.latencies.bars()
        largest = max(bar.messages for bar in bars)
        console.print(
            _bars((f"up to {seconds_text(bar.limit)}", f"{bar.messages:,}", bar.messages / largest) for bar in bars)
        )
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _verdict(options: ProbeOptions, results: Results) -> str:
    """Describe a rate that was not reached, and the side that was too slow."""
    assert options.rate is not None
    count = results.latencies.count
    late = results.seconds - count / options.rate
    slow = "the probe sent too slowly" if results.lag > late / 2 else "the server answered too slowly"
    return f"rate not reached: {_per_second(count, results):,.0f}/s of {options.rate:,.10g}/s: {slow}"


def _bars(rows: Iterable[tuple[str, str, float]]) -> Table:
    """Return a table of bars. Each row has a name, a figure, and the bar's part of the longest bar."""
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(style="cyan")
    for name, figure, part in rows:
        # Rounded up, so that a small value is visible.
        eighths = max(math.ceil(part * _BAR * 8), 0)
        table.add_row(name, figure, _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip())
    return table
