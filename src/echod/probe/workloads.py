"""The three workloads of a measurement. They decide how many messages are sent and when, and do no I/O."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from echod.probe.connection import LARGEST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echod.probe.model import ProbeOptions

_NANO = 1_000_000_000
# Larger than the number of bytes that any stream sends.
_ENDLESS = 1 << 62
# Messages that are due together are sent in batches, so that echoes are received in between.
_BATCH = 64

Schedule = tuple["Sequence[int]", "int | None"]
_NOTHING_DUE: Schedule = (), None


class Workload(Protocol):
    """Decides how many messages are sent, and when."""

    duration: float
    """Seconds after which no further message is sent."""
    exhausted: bool
    """Whether no further message is left before that."""
    message_size: int
    """Bytes per message."""
    write_size: int
    """Bytes that one call sends at most."""
    cut: bool
    """Whether the last message of a connection is cut off at the end."""

    def first(self) -> int:
        """Return the number of messages that the next connection sends at the start."""

    def after(self, echoes: int) -> int:
        """Return the number of messages that a connection sends after some complete echoes."""

    def schedule(self, elapsed: int) -> Schedule:
        """Return the due times of messages to send now, and the time until the next one is due.

        Times are nanoseconds since the start. The latter is None if nothing else is scheduled.
        """


class PingPong:
    """Closed loop: each connection sends a message when an earlier one has come back.

    Args:
        pipeline: messages in flight per connection.
        size: bytes per message.
        count: messages over all connections, or None for no limit.
        duration: seconds.

    """

    write_size = LARGEST
    cut = False

    def __init__(self, *, pipeline: int, size: int, count: int | None, duration: float) -> None:
        self.duration = duration
        self.exhausted = False
        self.message_size = size
        self._pipeline = pipeline
        self._left = math.inf if count is None else count

    def first(self) -> int:
        """Return the depth of the pipeline, or fewer if the count is lower."""
        return self.after(self._pipeline)

    def after(self, echoes: int) -> int:
        """Return one message per echo, as long as messages are left."""
        self._left -= echoes
        if self._left > 0:
            return echoes
        messages = echoes + int(self._left)
        self._left = 0
        self.exhausted = True
        return messages

    def schedule(self, _: int) -> Schedule:
        """Return no message."""
        return _NOTHING_DUE


class Rate:
    """Open loop: messages are due on a schedule, whether or not earlier ones have come back.

    Args:
        rate: messages per second.
        size: bytes per message.
        count: number of messages.

    """

    duration = math.inf
    write_size = LARGEST
    cut = False

    def __init__(self, *, rate: float, size: int, count: int) -> None:
        self.exhausted = False
        self.message_size = size
        self._rate = rate
        self._count = count
        self._next = 0

    def first(self) -> int:
        """Return no message."""
        return 0

    def after(self, _: int) -> int:
        """Return no message."""
        return 0

    def schedule(self, elapsed: int) -> Schedule:
        """Return the due times that have passed, one batch at most."""
        due: list[int] = []
        while self._next < self._count:
            moment = int(self._next / self._rate * _NANO)
            if moment > elapsed:
                return due, moment - elapsed
            if len(due) == _BATCH:
                return due, 0
            due.append(moment)
            self._next += 1
        self.exhausted = True
        return due, None


class Stream:
    """One endless message per connection.

    Args:
        size: bytes per write.
        duration: seconds.

    """

    exhausted = False
    message_size = _ENDLESS
    cut = True

    def __init__(self, *, size: int, duration: float) -> None:
        self.duration = duration
        self.write_size = min(size, LARGEST)

    def first(self) -> int:
        """Return one message."""
        return 1

    def after(self, _: int) -> int:
        """Return no message."""
        return 0

    def schedule(self, _: int) -> Schedule:
        """Return no message."""
        return _NOTHING_DUE


def choose(options: ProbeOptions) -> Workload:
    """Return the workload for the options."""
    if options.stream:
        return Stream(size=options.size, duration=options.duration)
    if options.rate is not None:
        # Rounded first, because the inverse of --interval is not exact.
        count = options.messages or max(1, math.ceil(round(options.rate * options.duration, 6)))
        return Rate(rate=options.rate, size=options.size, count=count)
    duration = options.duration if options.messages is None else math.inf
    return PingPong(pipeline=options.pipeline, size=options.size, count=options.messages, duration=duration)
