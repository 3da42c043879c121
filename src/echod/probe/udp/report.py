"""Report the results of a UDP measurement as text, as JSON and as a plot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from echod.probe.errors import identify
from echod.probe.model import Outcome, ProbeResult
from echod.probe.page import Page, latency_keys
from echod.probe.report import interrupted, kinds, write_plot
from echod.units import seconds_text

if TYPE_CHECKING:
    from echod.probe.model import ProbeOptions
    from echod.probe.udp.measure import Results

# The part of the requested rate that counts as reached.
_REACHED = 0.95


def result(options: ProbeOptions, results: Results) -> ProbeResult:
    """Format the results, and write the plot."""
    problem = _problem(options, results)
    outcome = Outcome.FAILED if problem else Outcome.RIGHT
    if results.signal is not None:
        outcome = interrupted(results.signal)
    elif not results.reached:
        outcome = Outcome.UNREACHABLE
    line = f"{options.target}: {problem}" if problem else ""
    if unwritten := write_plot(options.plot, _title(options), results.latencies):
        line = line or unwritten
        outcome = Outcome.FAILED if outcome is Outcome.RIGHT else outcome
    if options.json:
        text = _json(options, results, outcome, problem)
    else:
        text = _text(options, results) if results.tally.received or results.reached else ""
    return ProbeResult(outcome, text, line)


def _problem(options: ProbeOptions, results: Results) -> str:
    """Describe everything that makes the exit code 1 or 69. Errors alone do not, as their datagrams count as lost."""
    tally = results.tally
    problems = []
    if tally.mismatch is not None:
        problems.append(f"{tally.corrupted:,} corrupted: {tally.mismatch}")
    if tally.lost * 100 > options.max_loss * (tally.lost + tally.received):
        percent = f"{_loss(results):.3g}%, --max-loss is {float(options.max_loss):g}%"
        problems.append(f"{tally.lost:,} of {tally.lost + tally.received:,} datagrams lost ({percent})")
        if not tally.received and (answer := identify(tally.stranger)):
            problems.append(f"the server {answer}")
    if results.errors and (problems or not tally.received):
        problems.append(f"{results.problem} (errors by kind: {kinds(results.errors)})")
    return "; ".join(problems)


def _loss(results: Results) -> float | None:
    """Return the percentage of lost datagrams, or None if no datagram was received or lost."""
    tally = results.tally
    decided = tally.lost + tally.received
    return tally.lost / decided * 100 if decided else None


def _per_second(results: Results) -> float:
    return results.tally.sent / results.seconds if results.seconds else 0.0


def _rate_reached(options: ProbeOptions, results: Results) -> bool | None:
    """Tell whether datagrams were sent at the requested rate, or return None if none was requested."""
    if options.rate is None:
        return None
    return results.tally.sent >= _REACHED * options.rate * results.send_seconds


def _title(options: ProbeOptions) -> str:
    how = f"{options.rate:,.10g} per second" if options.rate else f"{options.pipeline:,} at a time"
    return f"{options.target}: datagrams of {options.size:,} B, {how}"


def _json(options: ProbeOptions, results: Results, outcome: Outcome, problem: str) -> str:
    tally = results.tally
    found = {
        "target": str(options.target),
        "mode": "open" if options.rate else "closed",
        "ending": outcome.value,
        "size": options.size,
        "window": None if options.rate else options.pipeline,
        "rate": options.rate,
        "rate_reached": _rate_reached(options, results),
        "seconds": results.seconds,
        "cpu_seconds": results.cpu_seconds,
        "sent": tally.sent,
        "sent_per_second": _per_second(results),
        "received": tally.received,
        "lost": tally.lost,
        "unanswered": tally.in_flight,
        "loss_percent": _loss(results),
        "max_loss_percent": float(options.max_loss),
        "late": tally.late,
        "duplicated": tally.duplicated,
        "reordered": tally.reordered,
        "corrupted": tally.corrupted,
        "foreign": tally.foreign,
        "receive_drops": results.receive_drops,
        **latency_keys(results.latencies),
        "send_lag": results.lag if options.rate else None,
        "errors": dict(results.errors),
        "mismatch": tally.mismatch._asdict() if tally.mismatch else None,
        "problem": problem or None,
        "signal": results.signal.name if results.signal is not None else None,
    }
    return json.dumps(found) + "\n"


def _text(options: ProbeOptions, results: Results) -> str:
    tally = results.tally
    page = Page(f"{_title(options)}, {results.seconds:.3f} s", results.signal)
    loss = _loss(results)
    rows = [
        ("sent", f"{tally.sent:,}", f"{_per_second(results):,.0f}/s"),
        ("received", f"{tally.received:,}", ""),
        ("lost", f"{tally.lost:,}", "" if loss is None else f"{loss:.3g}%"),
    ]
    if tally.in_flight:
        rows.append(("unanswered", f"{tally.in_flight:,}", ""))
    rows += [
        (name, f"{getattr(tally, name):,}", "") for name in ("late", "duplicated", "reordered", "corrupted", "foreign")
    ]
    rows.append(("errors", f"{results.errors.total():,}", kinds(results.errors)))
    if options.rate:
        rows.append(("sent late by", seconds_text(results.lag), "at most"))
    page.table(rows)
    if results.receive_drops:
        page.warning(f"{results.receive_drops:,} datagrams were dropped at the probe's own socket: lower the rate")
    if _rate_reached(options, results) is False:
        page.warning(f"rate not reached: {_per_second(results):,.0f}/s of {options.rate:,.10g}/s")
    page.latencies(results.latencies)
    return page.text()
