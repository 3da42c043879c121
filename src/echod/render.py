"""The settings in force as TOML that `--config` reads back, each line with where its value came from."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from pydantic import BaseModel, ByteSize

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from echod.settings import Key
    from echod.sources import Loaded

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def toml(loaded: Loaded) -> str:
    """Return the settings as a TOML document, tables last, as TOML wants it."""
    return "\n".join(_table(loaded.settings, (), loaded.origins)) + "\n"


def value(setting: object) -> str:
    """Return one setting as a TOML value.

    Raises:
        TypeError: the settings have no values of that type.

    """
    match setting:
        case ByteSize():
            return _string(_size(setting))
        case int() | float():
            return repr(setting)
        case str():
            return _string(setting)
        case tuple():
            return f"[{', '.join(value(item) for item in setting)}]"
        case _:
            raise TypeError(type(setting).__name__)


def printable(text: str) -> str:
    """Return a text as part of one line: a line break, or another character that is no sign, as its escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _table(table: BaseModel | dict[str, BaseModel], path: Key, origins: Mapping[Key, str]) -> Iterator[str]:
    for name, item in table.items() if isinstance(table, dict) else table:
        key = (*path, name)
        if item is None:
            continue  # a table that is not there
        if isinstance(item, BaseModel | dict):
            if not isinstance(item, dict):
                yield f"\n[{'.'.join(map(_key, key))}]"
            yield from _table(item, key, origins)
        else:
            yield f"{_key(name)} = {value(item)}  # {printable(origins.get(key, 'default'))}"


def _size(size: int) -> str:
    """Return the largest unit that leaves a whole number."""
    power = 0
    while size % 1024 == 0 and power + 1 < len(_UNITS):
        size //= 1024
        power += 1
    return f"{size}{_UNITS[power]}"


def _string(text: str) -> str:
    # JSON's escapes are TOML's too, but for the one character that JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _string(name)
