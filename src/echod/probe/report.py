"""Report the results of a measurement as text, as JSON and as a plot."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

from echod.probe import plot
from echod.probe.model import Outcome, ProbeResult
from echod.probe.page import Page, latency_keys
from echod.units import bytes_text, seconds_text

if TYPE_CHECKING:
    import collections
    from pathlib import Path

    from echod.probe.latencies import Latencies
    from echod.probe.load import Results
    from echod.probe.model import ProbeOptions

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
        problem = f"{options.target}: {results.problem} (errors by kind: {kinds(results.errors)})"
    outcome = Outcome.FAILED if problem else Outcome.RIGHT
    if results.signal is not None:
        outcome = interrupted(results.signal)
    elif not results.connected:
        return ProbeResult(
            Outcome.UNREACHABLE, _json(options, results, Outcome.UNREACHABLE) if options.json else "", problem
        )
    if unwritten := write_plot(options.plot, _title(options), results.latencies):
        problem = problem or unwritten
        outcome = Outcome.FAILED if outcome is Outcome.RIGHT else outcome
    return ProbeResult(outcome, _json(options, results, outcome) if options.json else _text(options, results), problem)


def interrupted(by: signal.Signals) -> Outcome:
    """Return the outcome of a measurement that a signal has ended."""
    return Outcome.INTERRUPTED if by == signal.SIGINT else Outcome.TERMINATED


def kinds(errors: collections.Counter[str]) -> str:
    """List the kinds of errors with their numbers."""
    return ", ".join(f"{kind} {count}" for kind, count in errors.most_common())


def write_plot(path: Path | None, title: str, latencies: Latencies) -> str:
    """Write the plot if there is a path and a latency. Return the problem if that fails, or nothing."""
    if path is None or not latencies.count:
        return ""
    try:
        path.write_text(plot.svg(title, latencies.percentiles(plot.percentiles(latencies.count))), "utf-8")
    except OSError as error:
        return f"--plot: {str(path)!r} cannot be written: {error.strerror}"
    return ""


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
        **latency_keys(latencies),
        "send_lag": results.lag if options.rate else None,
        "errors": dict(results.errors),
        "mismatch": {"connection": results.mismatch[0]} | results.mismatch[1]._asdict() if results.mismatch else None,
        "problem": results.problem or None,
        "signal": results.signal.name if results.signal is not None else None,
    }
    return json.dumps(found) + "\n"


def _text(options: ProbeOptions, results: Results) -> str:
    page = Page(f"{_title(options)}, {results.seconds:.3f} s", results.signal)
    rows = [
        ("bytes", f"{results.received:,}", f"{bytes_text(_per_second(results.received, results))}/s"),
        ("connections", f"{results.connected:,}", f"within {seconds_text(results.connect_seconds)}"),
        ("errors", f"{results.errors.total():,}", kinds(results.errors)),
    ]
    if not options.stream:
        count = results.latencies.count
        rows[:0] = [
            ("messages", f"{count:,}", f"{_per_second(count, results):,.0f}/s"),
            ("unanswered", f"{results.unanswered:,}", ""),
        ]
    if options.rate:
        rows.append(("sent late by", seconds_text(results.lag), "at most"))
    page.table(rows)
    if _rate_reached(options, results) is False:
        page.warning(_verdict(options, results))
    if options.stream and len(results.throughput) > 1:
        most = max(results.throughput)
        page.bars(
            (f"second {second}", f"{bytes_text(value)}/s", value / most if most else 0)
            for second, value in enumerate(results.throughput, 1)
        )
    page.latencies(results.latencies)
    return page.text()


def _verdict(options: ProbeOptions, results: Results) -> str:
    """Describe a rate that was not reached, and the side that was too slow."""
    assert options.rate is not None
    count = results.latencies.count
    late = results.seconds - count / options.rate
    slow = "the probe sent too slowly" if results.lag > late / 2 else "the server answered too slowly"
    return f"rate not reached: {_per_second(count, results):,.0f}/s of {options.rate:,.10g}/s: {slow}"
