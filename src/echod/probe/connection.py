"""One connection of a measurement: its place in the pattern, and every byte compared."""

from __future__ import annotations

import collections
import random
import selectors
import socket
from typing import TYPE_CHECKING, NamedTuple

from echod.probe.errors import EarlyEofError, Mismatch, WrongEchoError

if TYPE_CHECKING:
    from collections.abc import Callable

    from echod.probe.connect import Connected

# The random bytes that all connections send repeatedly, each from its own place. The length is prime, so it is not a
# multiple of any message size: a lost, duplicated or swapped message always shows.
PERIOD = 1_000_003
# Bytes that one call sends or receives at most.
LARGEST = 262144
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Traffic(NamedTuple):
    """The settings that all connections of a measurement share."""

    pattern: bytes
    """The random bytes of one period, followed by the first ones again, so that a slice needs no wrapping."""
    view: memoryview
    """A view of the pattern."""
    message_size: int
    send_size: int
    """Bytes that one call sends at most."""
    receive_size: int
    """Bytes that one call receives at most."""
    clock: Callable[[], int]
    """Returns nanoseconds."""
    record: Callable[[int], None]
    """Called with the latency of each message, nanoseconds."""


def random_pattern(seed: int) -> bytes:
    """Return the pattern for a seed."""
    once = random.Random(seed).randbytes(PERIOD)  # noqa: S311  (it is not a secret)
    return once + once[:LARGEST]


class Connection:
    """A connection that sends the pattern and compares its echo.

    Args:
        number: identifies the connection in messages, and chooses its place in the pattern.
        connected: the open connection.
        selector: watches the socket. Its key's data is this connection.
        traffic: the settings of the measurement.

    """

    __slots__ = (
        *("active", "ended", "eof", "number", "received", "secure", "sent", "shut", "socket"),
        *("_boundary", "_channel", "_clock", "_dues", "_goal", "_pattern", "_place", "_receive", "_receive_size"),
        *("_record", "_selector", "_send", "_send_size", "_size", "_start", "_view", "_watched"),
    )

    def __init__(self, number: int, connected: Connected, selector: selectors.BaseSelector, traffic: Traffic) -> None:
        self.number = number
        self.secure = connected.tls
        self.sent = 0
        self.received = 0
        self.active = 0
        """Time of the last progress, or of a message sent while no echo was due."""
        self.shut = False
        """Whether the sending side is closed."""
        self.eof = False
        """Whether the server has ended the connection after the whole echo."""
        self.ended = False
        """Whether the connection is closed."""
        self.socket = connected.socket
        self._channel = connected.channel
        self._receive = connected.channel.recv
        self._send = connected.channel.send
        self._pattern = traffic.pattern
        self._view = traffic.view
        self._size = traffic.message_size
        self._send_size = traffic.send_size
        self._receive_size = traffic.receive_size
        self._clock = traffic.clock
        self._record = traffic.record
        self._start = number * 7919 % PERIOD
        self._place = self._start
        """Place in the pattern of the next byte to receive."""
        self._goal = 0
        """Total of bytes that are due so far."""
        self._boundary = traffic.message_size
        """Total of bytes received when the next message is complete."""
        self._dues: collections.deque[int] = collections.deque()
        """Due times of the messages without a complete echo."""
        self._selector = selector
        self._watched = _READ
        connected.socket.settimeout(0)
        selector.register(connected.socket, _READ, self)

    @property
    def unanswered(self) -> int:
        """The number of messages without a complete echo."""
        return len(self._dues)

    @property
    def waiting(self) -> bool:
        """Whether the server still has to send something."""
        return self.received < self._goal or self.shut

    @property
    def flushed(self) -> bool:
        """Whether everything that is due has been sent."""
        return self.sent == self._goal and not (self.secure and self.secure.unsent)

    @property
    def echoed(self) -> bool:
        """Whether the echo of everything that is due has been received."""
        return self.received == self._goal

    def send(self, messages: int, due: int, now: int) -> None:
        """Send messages.

        Raises:
            OSError: the connection failed.

        """
        if not self._dues:
            self.active = now
        self._dues.extend([due] * messages)
        self._goal += messages * self._size
        if not self._watched & _WRITE:
            self.write()

    def cut(self) -> None:
        """Drop the unsent bytes of an endless message."""
        self._goal = self.sent

    def write(self) -> None:
        """Send as much as the socket accepts now.

        Raises:
            OSError: the connection failed.

        """
        sent = self.sent
        try:
            if left := self._goal - sent:
                place = (self._start + sent) % PERIOD
                taken = self._send(self._view[place : place + min(left, self._send_size)])
                self.sent = sent + taken
                if taken < left:  # progress, even if the server echoes complete messages only
                    self.active = self._clock()
            elif self.secure:
                self.secure.flush()
        except BlockingIOError:
            pass
        wanted = _READ
        if self.sent < self._goal or (self.secure and self.secure.unsent):
            wanted |= _WRITE
        if wanted != self._watched:
            self._watched = wanted
            self._selector.modify(self.socket, wanted, self)

    def read(self) -> int | None:
        """Receive once and compare. Return the number of completed messages, or None if nothing can be received.

        Raises:
            OSError: the connection failed.
            EarlyEofError: the server ended the connection too early.
            WrongEchoError: the data is not the echo.

        """
        try:
            data = self._receive(self._receive_size)
        except BlockingIOError:
            return None
        now = self._clock()
        received = self.received + len(data)
        if not data or received > self.sent or not self._pattern.startswith(data, self._place):
            return self._end(data)
        self.active = now
        self.received = received
        self._place = (self._place + len(data)) % PERIOD
        completed = 0
        while received >= self._boundary:
            self._record(now - self._dues.popleft())
            self._boundary += self._size
            completed += 1
        return completed

    def shutdown(self, now: int) -> None:
        """Half-close the connection.

        Raises:
            OSError: the connection failed.

        """
        self.shut = True
        self.active = now
        self._channel.shutdown(socket.SHUT_WR)
        self.write()  # TLS may not be able to send close_notify yet

    def close(self) -> None:
        """Close the connection."""
        self.ended = True
        self._selector.unregister(self.socket)
        self._channel.close()

    def _end(self, data: bytes) -> int:
        """Handle EOF and wrong data. Return 0, as no message is complete."""
        if data:
            expected = self._pattern[self._place : self._place + min(len(data), self.sent - self.received)]
            raise WrongEchoError(Mismatch.find(expected, data, self.received), data)
        if not (self.shut and self.echoed):
            msg = f"the server closed it with {self.sent - self.received} bytes of echo missing"
            raise EarlyEofError(msg)
        self.eof = True
        return 0
