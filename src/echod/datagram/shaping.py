"""Faults of a flow: which datagrams to drop or change, and when to send the others. Without I/O and without a clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echod.connection.faults.injector import Injector
from echod.datagram.bucket import SECOND

if TYPE_CHECKING:
    from echod.connection.faults.injector import Echo
    from echod.connection.faults.profile import FaultProfile


class FlowFault:
    """The fault that one flow shows.

    The generator depends on the seed only, so datagram number N of every flow gets the same treatment.

    Args:
        profile: the fault.
        now: the time of the first datagram, nanoseconds.

    """

    __slots__ = ("_free_at", "_injector", "_latest", "_opened", "_random", "profile")

    def __init__(self, profile: FaultProfile, now: int) -> None:
        self.profile = profile
        self._random = profile.new_random(1)
        self._injector = Injector(profile, self._random)
        self._opened = now
        self._free_at = 0
        self._latest = 0

    @property
    def fired(self) -> bool:
        """Whether the fault has had an effect."""
        return self._injector.fired

    def decide(self, datagram: bytes, now: int) -> Echo | None:
        """Return the answer to a datagram, or None if it gets none.

        Args:
            datagram: the payload.
            now: nanoseconds.

        """
        injector = self._injector
        if now - self._opened >= (self.profile.settings.after_seconds or 0) * SECOND:
            injector.reach_time()
        if injector.ended_echo or injector.is_due():
            injector.end_echo()
            return None
        echo = injector.decide(datagram)
        if echo is None:
            injector.end_echo()
            return None
        return echo if echo.copies else None

    def due(self, size: int, now: int) -> int:
        """Return the time at which to send an answer of `size` bytes, in nanoseconds.

        At a rate, the answer first passes a line of that speed, and is delayed after it.
        """
        settings = self.profile.settings
        start = now
        if settings.rate is not None:
            self._free_at = max(now, self._free_at) + round(size * SECOND / settings.rate)
            start = self._free_at
        delay = settings.delay + self._random.uniform(-settings.jitter, settings.jitter)
        due = start + round(delay * SECOND)
        if not settings.reorder:
            due = max(due, self._latest)
        self._latest = due
        return due
