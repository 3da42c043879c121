"""Sums of the figures of several workers, for the admin listener."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from echod.admin.snapshot import Count
from echod.workers.messages import Figures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echod.workers.messages import Drained


def sums(figures: Sequence[Figures]) -> list[Figures]:
    """Return the sum, or nothing if there are no figures."""
    if not figures:
        return []
    return [
        Figures(
            tuple(map(Count.total, zip(*(each.counts for each in figures), strict=True))),
            tuple(map(any, zip(*(each.accept_paused for each in figures), strict=True))),
            sum(each.log_lines_dropped for each in figures),
        )
    ]


def final(last: Figures | None, drained: Drained | None) -> list[Figures]:
    """Return the figures of a process that has ended, or nothing if there are none.

    Args:
        last: its last figures. They may be older than its end, but no sum falls.
        drained: its last message, or None if it ended without one.

    """
    counts = () if last is None else last.counts
    if drained is not None:
        histograms = [count.histograms for count in counts] or [None] * len(drained.counters)
        counts = tuple(
            Count(counters, counters.received, counters.sent, histograms=each)
            for counters, each in zip(drained.counters, histograms, strict=True)
        )
    if not counts:
        return []
    ended = tuple(replace(count, states=Counter[str](), busiest=[], paused=[]) for count in counts)
    return [Figures(ended, (False,) * len(ended), 0 if last is None else last.log_lines_dropped)]
