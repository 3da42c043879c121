"""Decide which messages a fault applies to, and modify them. Without I/O and without a clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from echod.connection.faults.chance import new_chance

if TYPE_CHECKING:
    from random import Random

    from echod.connection.faults.profile import FaultProfile


class Echo(NamedTuple):
    """The echo of one message."""

    data: bytes
    shaped: bool
    """Whether to delay, slow or slice it."""
    copies: int = 1
    """How often to send it: 0 for a dropped datagram."""


class Injector:
    """Apply one fault to the messages of one connection.

    Args:
        profile: the fault.
        random: the connection's generator.

    """

    __slots__ = (
        "_bytes_seen",
        "_chooses",
        "_fires_without_message",
        "_random",
        "_settings",
        "_time_reached",
        "ended_echo",
        "fired",
    )

    def __init__(self, profile: FaultProfile, random: Random) -> None:
        self._settings = profile.settings
        self._fires_without_message = profile.fires_without_message
        self._random = random
        self._chooses = new_chance(profile.settings, random)
        self._bytes_seen = 0
        self._time_reached = not profile.settings.after_seconds
        self.fired = False
        """Whether the fault has had an effect, shaping included."""
        self.ended_echo = False
        """Whether an action has started after which the client gets no more echo."""

    def decide(self, message: bytes) -> Echo | None:
        """Return the echo of a message, or None if the action ends the echo at this message."""
        settings = self._settings
        matches = (
            self._time_reached
            and self._bytes_seen >= (settings.after_bytes or 0)
            and settings.trigger_bytes in {None, message}
        )
        self._bytes_seen += len(message)
        # Draw for every message. Then the n-th message gets the n-th number, whatever the other conditions are.
        matches = self._chooses() and matches
        if matches and settings.ends_echo:
            return None
        # Beside an action, the conditions say when the action comes, and shaping applies to all messages.
        shaped = settings.shapes and (matches or settings.action is not None)
        self.fired = self.fired or matches or shaped
        if not matches:
            return Echo(message, shaped)
        return Echo(self._modify(message), shaped, {"duplicate": 2, "drop": 0}.get(settings.action or "", 1))

    def reach_time(self) -> None:
        """Record that `after_seconds` have passed."""
        self._time_reached = True

    def is_due(self) -> bool:
        """Return whether the action starts now, without another message."""
        return (
            self._fires_without_message
            and not self.ended_echo
            and self._time_reached
            and self._bytes_seen >= (self._settings.after_bytes or 0)
        )

    def end_echo(self) -> None:
        """Record that the action has started."""
        self.fired = self.ended_echo = True

    def _modify(self, message: bytes) -> bytes:
        match self._settings.action:
            case "corrupt" if message:
                bit = self._random.randrange(8 * len(message))
                corrupt = bytearray(message)
                corrupt[bit // 8] ^= 1 << bit % 8
                return bytes(corrupt)
            case "truncate":
                return message[: len(message) // 2]
            case _:
                return message
