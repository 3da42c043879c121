"""Render the log for programs: JSON lines and logfmt, with the time in UTC."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import EventDict, Processor

# Values with one of these are quoted in logfmt.
_QUOTED = frozenset(' ="')


def processors(form: str) -> list[Processor]:
    """Return the processors of structlog that render "json" or "logfmt"."""
    render: Processor = _logfmt if form == "logfmt" else structlog.processors.JSONRenderer(_json)
    return [_order, structlog.processors.format_exc_info, render]


def _order(_: object, level: str, event: EventDict) -> EventDict:
    """Put the time, the level and the event first."""
    second, fraction = divmod(time.time_ns() // 1000, 1_000_000)
    timestamp = f"{_second(second)}.{fraction:06}Z"
    return {"timestamp": timestamp, "level": level, "event": event.pop("event"), **event}


@lru_cache(maxsize=1)
def _second(when: int) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _json(event: EventDict, default: Callable[[object], object]) -> str:
    # json.dumps() would create an encoder for each line.
    return _encoder(default).encode(event)


@cache
def _encoder(default: Callable[[object], object]) -> json.JSONEncoder:
    return json.JSONEncoder(default=default)


def _logfmt(_: object, __: str, event: EventDict) -> str:
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
