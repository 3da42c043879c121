"""The result of a probe, as `echod.cli` reports it."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Outcome(enum.Enum):
    """How a probe ended. The values are those of the JSON key `ending`."""

    RIGHT = "right"
    FAILED = "failed"
    UNREACHABLE = "unreachable"
    INTERRUPTED = "interrupted"
    TERMINATED = "terminated"


class ProbeResult(NamedTuple):
    """The outcome of a probe and its output."""

    outcome: Outcome
    text: str = ""
    """Text for standard output."""
    problem: str = ""
    """A line for standard error, or nothing."""
