"""Bounds on the cost of the admin listener."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdminLimits:
    """Bounds that keep clients of the admin listener from slowing down the echo. Times are in seconds."""

    max_connections: int = 32
    """At this number, a new connection replaces the one that has asked for nothing for the longest time."""
    patience: float = 15.0
    """Time for a request head; then for its answer and the next head."""
    max_head: int = 16 * 1024
    """Bytes of a request head, together with the requests that are pipelined after it."""
    accept_interval: float = 0.01
    answer_interval: float = 0.005
    rest_factor: int = 9
    """A read of all clients is followed by this many times its duration without another one."""
    longest_rest: float = 1.0
    backlog: int = 64
    grace: float = 0.5
    """Time for unfinished answers at the stop."""


DEFAULT_LIMITS = AdminLimits()
