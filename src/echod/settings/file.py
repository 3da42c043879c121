"""Read the settings file."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any, NamedTuple

from echod.net import files
from echod.settings import places, toml
from echod.settings.problems import Problem, SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from echod.settings.places import Place
    from echod.settings.types import Key

_POSITION = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)")
_UNQUOTED = re.compile(r"""\s*[^\s=]+\s*=\s*([^\s"'\[{#=][^"'#]*?)\s*(?:#.*)?""")

# tomllib's reasons that need other words, by their first words.
_PLAIN = {
    r"Illegal character '\n'": "this text has no closing quote",
    r"Found invalid character '\n'": "this text has no closing quote",
    "Cannot overwrite a value": "this key has a value already",
    "Cannot declare ": "this table is defined already: add its keys there",
    "Cannot mutate immutable namespace ": "this table is defined already: add its keys there",
}


class Document(NamedTuple):
    """The content of the file."""

    tables: dict[str, Any]
    places: Mapping[Key, Place]


def read(file: str, *, had_values: bool) -> Document:
    """Read the settings file.

    Args:
        file: its name.
        had_values: whether settings in force are from this file. If it is empty now, it was a pipe.

    Raises:
        SettingsError: it cannot be read, or is not TOML.

    """
    if not file:
        raise SettingsError([Problem("--config", "", "names no file")])
    try:
        # Not read by pydantic-settings, which takes a pipe for an empty file.
        data, regular = files.read(file)
    except OSError as error:
        raise _error(file, f"cannot be read: {error.strerror}") from error
    if had_values and not data and not regular:
        message = "is empty now: a pipe can be read only once; use a regular file if the settings are to be reloaded"
        raise _error(file, message)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        lines = error.object[: error.start].split(b"\n")
        byte = error.object[error.start]
        message = f"is not UTF-8 text, because of the byte 0x{byte:02x}: save the file as UTF-8"
        place = f"{file}:{len(lines)}:{len(lines[-1]) + 1}"
        raise _error(place, message) from error
    try:
        return Document(tomllib.loads(text), places.find(text))
    except (ValueError, RecursionError) as error:  # tomllib raises these for endless numbers and for deep nesting
        raise _syntax_error(file, text, str(error)) from error


def _error(source: str, message: str) -> SettingsError:
    return SettingsError([Problem(source, "", message)])


def _syntax_error(file: str, text: str, reason: str) -> SettingsError:
    """Return one of tomllib's errors with the line and column in front, and with advice."""
    position = _POSITION.search(reason)
    if position is None:
        return _error(file, f"is not TOML: {reason}")
    reason = reason.replace(position[0], "")
    plain = next((words for start, words in _PLAIN.items() if reason.startswith(start)), reason)
    message = f"is not TOML: {plain}"
    if position[1]:
        line = int(position[1])
        source = f"{file}:{line}:{position[2]}"
    else:
        line = text.rstrip().count("\n") + 1
        source = f"{file}:{line}"
        message += ", at the end of the file"
    if (value := _UNQUOTED.fullmatch(text.split("\n")[line - 1])) and not _is_value(value[1]):
        message += f": text needs quotes: write {toml.value(value[1])}"
    return _error(source, message)


def _is_value(text: str) -> bool:
    try:
        tomllib.loads(f"x = {text}")
    except ValueError:
        return False
    return True
