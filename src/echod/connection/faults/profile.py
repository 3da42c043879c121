"""A fault of the settings, with its name."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from echod.settings.model import FaultSettings


class FaultProfile(NamedTuple):
    """A named fault."""

    name: str
    settings: FaultSettings

    @property
    def fires_without_message(self) -> bool:
        """Whether the action starts as soon as the bytes or seconds have passed, and does not wait for a message."""
        settings = self.settings
        has_start = settings.after_bytes is not None or settings.after_seconds is not None
        return settings.ends_echo and has_start and settings.trigger is None and settings.probability is None

    def new_random(self, number: int) -> random.Random:
        """Return the random generator of one connection.

        Args:
            number: the connection's number on its listener. With the same seed and number, runs are repeatable.

        """
        seed = self.settings.seed
        return random.Random(None if seed is None else f"{seed} {number}")  # noqa: S311  (not for cryptography)
