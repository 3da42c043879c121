"""The settings as TOML that `--config` reads back."""

from __future__ import annotations

import json
import re
from datetime import date, time
from typing import TYPE_CHECKING

from pydantic import BaseModel, ByteSize

from echod.settings.types import size_text
from echod.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from echod.settings.types import Key

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def document(settings: BaseModel, origins: Mapping[Key, str]) -> str:
    """Return the settings as a TOML document, each line with its value's origin as a comment."""
    return "\n".join(_table(settings, (), origins)) + "\n"


def value(setting: object) -> str:
    """Return a value as TOML writes it.

    Raises:
        TypeError: TOML has no value of that type.

    """
    match setting:
        case ByteSize():
            return size_text(setting)
        case bool() | str():
            return _string(setting)
        case int() | float():
            return repr(setting)
        case date() | time():
            return setting.isoformat()
        case dict():
            return f"{{{', '.join(f'{key_part(name)} = {value(item)}' for name, item in setting.items())}}}"
        case list() | tuple():
            return f"[{', '.join(value(item) for item in setting)}]"
        case _:
            raise TypeError(type(setting).__name__)


def key_part(name: str) -> str:
    """Return a part of a key as TOML writes it."""
    return name if _BARE_KEY.fullmatch(name) else _string(name)


def _table(table: BaseModel | dict[str, BaseModel], path: Key, origins: Mapping[Key, str]) -> Iterator[str]:
    items = table if isinstance(table, dict) else {name: getattr(table, name) for name in type(table).model_fields}
    for name, item in items.items():
        key = (*path, name)
        if item is None:
            continue  # TOML has no null
        if isinstance(item, BaseModel | dict):
            if not isinstance(item, dict):
                yield f"\n[{'.'.join(map(key_part, key))}]"
            yield from _table(item, key, origins)
        else:
            yield f"{key_part(name)} = {value(item)}  # {printable(origins.get(key, 'default'))}"


def _string(text: str | bool) -> str:  # noqa: FBT001  (a value, as text is)
    # JSON's escapes are valid in TOML. JSON leaves DEL as it is, which TOML forbids.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
