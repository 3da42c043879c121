"""The three workloads of a measurement: they decide when a message is sent.

A workload does no I/O and gets the time as an argument. Times are nanoseconds on the clock of the load generator.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from echod.probe.connection import LARGEST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echod.probe.connection import Connection
    from echod.probe.options import ProbeOptions

_NANO = 1_000_000_000
# Larger than any number of bytes that a stream can send.
_ENDLESS = 1 << 62
# Messages that are due together are sent in batches, so that echoes are received in between.
_BATCH = 64

Schedule = tuple["Sequence[int]", "int | None"]
_NOTHING_DUE: Schedule = (), None


class Workload(Protocol):
    """Decides how many messages are sent, and when."""

    exhausted: bool
    """Whether no further message will be sent."""
    message_size: int
    """Bytes per message."""
    write_size: int
    """Bytes that one call sends at most."""

    def start(self, now: int) -> float:
        """Start the clock. Return the time at which to call `stop`, or infinity."""

    def first(self) -> int:
        """Return the number of messages that the next connection sends at the start."""

    def after(self, echoes: int) -> int:
        """Return the number of messages that a connection sends after it has received some complete echoes."""

    def schedule(self, now: int) -> Schedule:
        """Return the due times of messages to send now, and the time until the next call.

        The time is None if nothing is scheduled, so that only events of the sockets matter.
        """

    def stop(self) -> None:
        """Send no further message."""

    def finish(self, connection: Connection) -> None:
        """Prepare a connection for its end, when the workload is exhausted."""


class PingPong:
    """Closed loop: each connection sends a message when an earlier one has come back.

    Args:
        pipeline: messages in flight per connection.
        size: bytes per message.
        count: messages over all connections, or None to stop at the duration.
        duration: seconds.

    """

    def __init__(self, *, pipeline: int, size: int, count: int | None, duration: float) -> None:
        self.exhausted = False
        self.message_size = size
        self.write_size = LARGEST
        self._pipeline = pipeline
        self._left = math.inf if count is None else count
        self._duration = math.inf if count is not None else duration * _NANO

    def start(self, now: int) -> float:
        """Return the end of the duration."""
        return now + self._duration

    def first(self) -> int:
        """Return the pipeline's depth, or fewer if the count is lower."""
        return self.after(self._pipeline)

    def after(self, echoes: int) -> int:
        """Return one message per echo, as long as messages are left."""
        left = self._left
        if echoes < left:
            self._left = left - echoes
            return echoes
        self._left = 0
        self.exhausted = True
        return int(left)

    def schedule(self, _: int) -> Schedule:
        """Return no message."""
        return _NOTHING_DUE

    def stop(self) -> None:
        """Send no further message."""
        self._left = 0
        self.exhausted = True

    def finish(self, connection: Connection) -> None:
        """Let the connection send the rest of its messages."""


class Rate:
    """Open loop: messages are due on a schedule, whether or not earlier ones have come back.

    Args:
        rate: messages per second.
        size: bytes per message.
        count: number of messages.

    """

    def __init__(self, *, rate: float, size: int, count: int) -> None:
        self.exhausted = False
        self.message_size = size
        self.write_size = LARGEST
        self._rate = rate
        self._count = count
        self._next = 0
        self._began = 0

    def start(self, now: int) -> float:
        """Start the schedule, which ends by itself."""
        self._began = now
        return math.inf

    def first(self) -> int:
        """Return no message."""
        return 0

    def after(self, _: int) -> int:
        """Return no message."""
        return 0

    def schedule(self, now: int) -> Schedule:
        """Return the due times that have passed, one batch at most."""
        due: list[int] = []
        while self._next < self._count:
            moment = self._began + int(self._next / self._rate * _NANO)
            if moment > now:
                return due, moment - now
            if len(due) == _BATCH:
                return due, 0
            due.append(moment)
            self._next += 1
        self.exhausted = True
        return due, None

    def stop(self) -> None:
        """Send no further message."""
        self._next = self._count
        self.exhausted = True

    def finish(self, connection: Connection) -> None:
        """Let the connection send the rest of its messages."""


class Stream:
    """One endless message per connection, which ends with the duration.

    Args:
        size: bytes per write.
        duration: seconds.

    """

    message_size = _ENDLESS

    def __init__(self, *, size: int, duration: float) -> None:
        self.exhausted = False
        self.write_size = min(size, LARGEST)
        self._duration = duration * _NANO

    def start(self, now: int) -> float:
        """Return the end of the duration."""
        return now + self._duration

    def first(self) -> int:
        """Return one message."""
        return 1

    def after(self, _: int) -> int:
        """Return no message, as none is ever complete."""
        return 0

    def schedule(self, _: int) -> Schedule:
        """Return no message."""
        return _NOTHING_DUE

    def stop(self) -> None:
        """Send no further message."""
        self.exhausted = True

    def finish(self, connection: Connection) -> None:
        """End the message with the bytes that are sent."""
        connection.cut()


def choose(options: ProbeOptions) -> Workload:
    """Return the workload for the options."""
    if options.stream:
        return Stream(size=options.size, duration=options.duration)
    if options.rate is not None:
        count = options.count or math.ceil(options.rate * options.duration)
        return Rate(rate=options.rate, size=options.size, count=count)
    return PingPong(pipeline=options.pipeline, size=options.size, count=options.count, duration=options.duration)
