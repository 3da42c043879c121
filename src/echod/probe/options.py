"""The options of a probe, parsed and free of contradictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from echod.net.addresses import TcpAddress, UnixAddress
    from echod.probe.connect import Route


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions:
    """The options of a quick check, and of a measurement if `measure` is set."""

    target: TcpAddress | UnixAddress
    route: Route
    timeout: float
    """Seconds to connect, and seconds to wait for any echo."""
    half_close: bool
    json: bool
    measure: bool
    """Whether to measure. A quick check ignores the options below."""
    count: int | None
    """Number of messages over all connections."""
    duration: float
    """Seconds to measure, or 0 if `count` ends the measurement."""
    connections: int
    size: int
    """Bytes per message; in a stream, bytes per write."""
    rate: float | None
    """Messages per second over all connections, or None to send the next message when an echo has arrived."""
    pipeline: int
    """Messages in flight per connection."""
    stream: bool
    seed: int
    plot: Path | None
