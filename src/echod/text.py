"""Text for users: single-line output, counts, and suggestions for misspelt names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def printable(text: str) -> str:
    """Return the text on one line, with line breaks and other unprintable characters escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the singular or plural."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to a misspelt one, or None if none is similar."""
    import difflib  # noqa: PLC0415  (needed for errors only)

    return next(iter(difflib.get_close_matches(name, known, 1)), None)


def hint(name: str, known: Iterable[str]) -> str:
    """Return advice on an unknown name: the most similar known name, or else all known names."""
    known = list(known)
    if (near := closest(name, known)) is not None:
        return f"did you mean {near!r}?"
    return f"use one of: {', '.join(known)}" if known else "none is defined"
