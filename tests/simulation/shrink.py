"""Find a short part of a failing script that fails too."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Item = TypeVar("Item")


def shrink(items: Sequence[Item], fails: Callable[[Sequence[Item]], bool], tries: int) -> Sequence[Item]:
    """Remove items as long as the rest fails (delta debugging: A. Zeller, "Yesterday, my program worked", 1999).

    Args:
        items: a sequence that fails.
        fails: tells whether a part of it fails.
        tries: the most calls of `fails`.

    """
    parts = 2
    while len(items) >= 2 and tries > 0:
        size = -(-len(items) // parts)
        for start in range(0, len(items), size):
            rest = [*items[:start], *items[start + size :]]
            tries -= 1
            if fails(rest):
                items, parts = rest, max(parts - 1, 2)
                break
            if tries <= 0:
                return items
        else:
            if size == 1:
                return items
            parts = min(2 * parts, len(items))
    return items
