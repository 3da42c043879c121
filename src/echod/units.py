"""Sizes and times as people write and read them."""

from __future__ import annotations

import re

_DECIMAL = ("B", "kB", "MB", "GB", "TB")
_SIZES = {"": 1} | {name.lower(): 1000**power for power, name in enumerate(_DECIMAL)}
_SIZES |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([a-z]*)", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return bytes: of a number, or of one with a unit, such as 64KiB or 1.5MB.

    Raises:
        ValueError: it is neither.

    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _SIZES:
        msg = f"{text!r} is no size: write bytes, or such as 64KiB"
        raise ValueError(msg)
    return int(float(match[1]) * _SIZES[match[2].lower()])


def bytes_text(count: float) -> str:
    """Return bytes with three digits, in decimal units as networks have them."""
    power = 0
    while count >= 999.5 and power < len(_DECIMAL) - 1:  # noqa: PLR2004  (it would be shown as four digits)
        count /= 1000
        power += 1
    return f"{count:.3g} {_DECIMAL[power]}"


def seconds_text(seconds: float) -> str:
    """Return a time with three digits."""
    if seconds >= 0.9995:  # noqa: PLR2004  (it would be shown as 1000 ms)
        return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"  # noqa: PLR2004  (likewise)
    unit, factor = ("ms", 1e3) if seconds >= 0.0009995 else ("µs", 1e6)  # noqa: PLR2004  (likewise)
    return f"{seconds * factor:.3g} {unit}"
