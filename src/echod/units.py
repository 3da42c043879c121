"""Parse and format sizes and durations."""

from __future__ import annotations

import re
from fractions import Fraction

_DECIMAL = ("B", "kB", "MB", "GB", "TB")
_SIZES = {"": 1} | {name.lower(): 1000**power for power, name in enumerate(_DECIMAL)}
_SIZES |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_SIZES |= {"k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,9})?"
_SIZE = re.compile(rf"({_NUMBER})\s*([a-z]*)", re.ASCII | re.IGNORECASE)

_SECONDS = {"h": Fraction(3600), "m": Fraction(60), "s": Fraction(1), "ms": Fraction(1, 1000), "us": Fraction(1, 10**6)}
_DURATION = re.compile(rf"({_NUMBER})(h|ms|m|us|s)", re.ASCII)


def parse_size(text: str) -> int:
    """Return the number of bytes in a size such as 512, 64KiB, 64k or 1.5MB.

    Units with an i are powers of 1024. All others are powers of 1000, whether they are written as k, kB or K.

    Raises:
        ValueError: the text is not a size.

    """
    match = _SIZE.fullmatch(text)
    factor = _SIZES.get(match[2].lower()) if match else None
    # A part of a byte is a forgotten unit, unless a unit makes it.
    if match is None or factor is None or (factor == 1 and Fraction(match[1]).denominator > 1):
        msg = f"{text!r} is not a size: write bytes, or for example 64KiB"
        raise ValueError(msg)
    return int(Fraction(match[1]) * factor)


def parse_duration(text: str) -> float:
    """Return the seconds in a duration such as 250ms, 10s, 5m, 1h or 1h30m. A number without a unit is in seconds.

    Raises:
        ValueError: the text is not a duration.

    """
    if re.fullmatch(_NUMBER, text):
        return float(text)
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        msg = f"{text!r} is not a duration: write seconds, or for example 250ms, 10s, 5m or 1h"
        raise ValueError(msg)
    return float(sum(Fraction(number) * _SECONDS[unit] for number, unit in parts))


def bytes_text(count: float) -> str:
    """Format bytes with three digits and a decimal unit, as is usual for networks."""
    power = 0
    while count >= 999.5 and power < len(_DECIMAL) - 1:  # noqa: PLR2004  (above this it would be formatted as 1000)
        count /= 1000
        power += 1
    return f"{count:.3g} {_DECIMAL[power]}"


def seconds_text(seconds: float) -> str:
    """Format a time with three digits."""
    if seconds >= 0.9995:  # noqa: PLR2004  (above this it would be formatted as 1000 ms)
        return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"  # noqa: PLR2004  (as above)
    unit, factor = ("ms", 1e3) if seconds >= 0.0009995 else ("µs", 1e6)  # noqa: PLR2004  (as above)
    return f"{seconds * factor:.3g} {unit}"
