"""The options and the result of a probe. They are named tuples because a data class takes longer to create."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fractions import Fraction
    from pathlib import Path

    from echod.net.addresses import TcpAddress, UdpAddress, UnixAddress
    from echod.probe.connect import Route


class ProbeOptions(NamedTuple):
    """The options of a quick check, and of a measurement if `measure` is set."""

    target: TcpAddress | UnixAddress | UdpAddress
    route: Route
    timeout: float
    """Seconds to connect, and seconds to wait for any echo."""
    half_close: bool
    json: bool
    measure: bool
    """Whether to measure. A quick check ignores the options below."""
    messages: int | None
    """Number of messages over all connections, or None to stop at the duration."""
    duration: float
    """Seconds to measure, or 0 if `messages` ends the measurement."""
    connections: int
    size: int
    """Bytes per message; in a stream, bytes per write; over UDP, bytes per datagram."""
    rate: float | None
    """Messages per second over all connections, or None to send the next message when an echo has arrived."""
    pipeline: int
    """Messages in flight per connection; over UDP, datagrams in flight."""
    stream: bool
    seed: int
    plot: Path | None
    max_loss: Fraction | int
    """The highest percentage of lost datagrams that is right. Of no meaning for TCP."""


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
