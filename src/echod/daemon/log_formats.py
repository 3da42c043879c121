"""Render the log for programs: JSON lines and logfmt, with the time in UTC."""

from __future__ import annotations

import contextlib
import json
import re
import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING

from pydantic_core import to_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import EventDict

# Values with one of these are quoted in logfmt.
_QUOTED = frozenset(' ="')


def renderer(form: str) -> Callable[[object, str, EventDict], str]:
    """Return the processor of structlog that renders "json" or "logfmt"."""
    encode = _logfmt if form == "logfmt" else _json

    def render(_: object, level: str, event: EventDict) -> str:
        """Render a line that begins with the time, the level and the event."""
        second, fraction = divmod(time.time_ns() // 1000, 1_000_000)
        timestamp = f"{_second(second)}.{fraction:06}Z"
        return encode({"timestamp": timestamp, "level": level, "event": event.pop("event"), **event})

    return render


@lru_cache(maxsize=1)
def _second(when: int) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _json(event: EventDict) -> str:
    """Render one line of JSON in ASCII."""
    with contextlib.suppress(ValueError):  # a lone surrogate
        line = to_json(event, fallback=repr)
        if line.isascii():
            return line.decode()
    # This takes four times as long, and escapes all other characters.
    return json.dumps(event, separators=(",", ":"), default=repr)


def _logfmt(event: EventDict) -> str:
    """Render one line of logfmt, in printable characters only."""
    return " ".join(f"{_logfmt_key(key)}={_logfmt_value(value)}" for key, value in event.items())


def _logfmt_key(key: str) -> str:
    # logfmt has no escapes in keys.
    return key if key.isidentifier() else re.sub(r"\W", "_", key) or "_"


def _logfmt_value(value: object) -> str:
    if value is None:
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if text.isprintable() and _QUOTED.isdisjoint(text):
        return text
    # JSON escapes only the ASCII control characters.
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in quoted)
