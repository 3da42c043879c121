"""The settings as TOML that `--config` reads back."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from pydantic import BaseModel, ByteSize

from echod.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from echod.settings.types import Key

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def document(settings: BaseModel, origins: Mapping[Key, str]) -> str:
    """Return the settings as a TOML document, each line with its value's origin as a comment."""
    return "\n".join(_table(settings, (), origins)) + "\n"


def value(setting: object) -> str:
    """Return one setting as a TOML value.

    Raises:
        TypeError: no setting has a value of that type.

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


def _table(table: BaseModel | dict[str, BaseModel], path: Key, origins: Mapping[Key, str]) -> Iterator[str]:
    items = table if isinstance(table, dict) else {name: getattr(table, name) for name in type(table).model_fields}
    for name, item in items.items():
        key = (*path, name)
        if item is None:
            continue  # TOML has no null
        if isinstance(item, BaseModel | dict):
            if not isinstance(item, dict):
                yield f"\n[{'.'.join(map(_key, key))}]"
            yield from _table(item, key, origins)
        else:
            yield f"{_key(name)} = {value(item)}  # {printable(origins.get(key, 'default'))}"


def _size(size: int) -> str:
    """Return a size in the largest unit that leaves a whole number."""
    power = 0
    while size % 1024 == 0 and power + 1 < len(_UNITS):
        size //= 1024
        power += 1
    return f"{size}{_UNITS[power]}"


def _string(text: str) -> str:
    # JSON's escapes are valid in TOML. JSON leaves DEL as it is, which TOML forbids.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _string(name)
