"""Decide when a worker that has died is started again."""

from __future__ import annotations

from collections import deque

_FIRST_DELAY = 0.05
_LAST_DELAY = 5.0

# This many deaths within this many seconds are too many.
_DEATHS = 5
_SPAN = 10.0


class Restarts:
    """The deaths of one worker. The delay doubles with each death, until a worker has run for ten seconds."""

    def __init__(self) -> None:
        self._deaths = deque[float](maxlen=_DEATHS)
        self._delay = 0.0
        self.count = 0
        """The number of deaths."""

    def delay(self, now: float, lived: float) -> float | None:
        """Count a death. Return the seconds until the next start, or None if there were five deaths within ten seconds.

        Args:
            now: the time in seconds.
            lived: for how many seconds the worker ran.

        """
        self.count += 1
        self._deaths.append(now)
        if len(self._deaths) == _DEATHS and now - self._deaths[0] <= _SPAN:
            return None
        self._delay = _FIRST_DELAY if lived >= _SPAN else min(max(_FIRST_DELAY, 2 * self._delay), _LAST_DELAY)
        return self._delay
