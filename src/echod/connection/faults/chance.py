"""The random choice of the messages that match. Without I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from echod.settings.model import FaultSettings


def new_chance(settings: FaultSettings, random: Random) -> Callable[[], bool]:
    """Return a function that decides for one message after another. It draws one number for each.

    Args:
        settings: probability and burst.
        random: the generator.

    """
    probability = settings.probability
    if probability is None:
        return lambda: True
    if settings.burst is None:
        return lambda: random.random() < probability
    return GilbertElliott(probability, settings.burst, random).draw


class GilbertElliott:
    """Choose messages in bursts.

    The simple Gilbert model: in the bad state every message is chosen, in the good state none. Both the lengths of bursts
    and those of the gaps between them are geometric. Source: E. N. Gilbert, Capacity of a Burst-Noise Channel, 1960.

    Args:
        probability: share of the chosen messages, below 1.
        burst: mean number of chosen messages in a row, at least probability / (1 - probability).
        random: the generator.

    """

    __slots__ = ("_is_bad", "_probability", "_random", "_to_bad", "_to_good")

    def __init__(self, probability: float, burst: float, random: Random) -> None:
        self._random = random
        self._probability = probability
        self._to_good = 1 / burst
        self._to_bad = probability * self._to_good / (1 - probability)
        self._is_bad: bool | None = None

    def draw(self) -> bool:
        """Return whether the next message is chosen. The first one is with the given probability."""
        number = self._random.random()
        if self._is_bad is None:
            self._is_bad = number < self._probability
        else:
            self._is_bad = number >= self._to_good if self._is_bad else number < self._to_bad
        return self._is_bad
