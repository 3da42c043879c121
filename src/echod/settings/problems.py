"""Problems with settings: all of them at once, each with its origin and with advice."""

from __future__ import annotations

from datetime import date, time
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from echod.settings import suggestions, toml
from echod.settings.model import Settings
from echod.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic_core import ErrorDetails

    from echod.settings.types import Key, Location


_LONGEST_VALUE = 80

# By the types of Pydantic's errors.
_EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "should be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "should be a number"),
    "finite_number": "should be a finite number",
    "string_type": "should be text",
    "string_unicode": "should be UTF-8 text",
    "tuple_type": "should be a list",
}


class Problem(NamedTuple):
    """One problem with the settings."""

    source: str
    """The file and the line, the variable or the option; empty if the origin is unknown."""
    key: str
    """Dotted; empty if the problem concerns the whole source."""
    message: str

    def __str__(self) -> str:
        """Return the line for the user."""
        return printable(": ".join(part for part in self if part))


class SettingsError(Exception):
    """The settings are invalid; `problems` lists every reason."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


def validate(
    values: Mapping[str, Any],
    origins: Mapping[Key, str],
    problems: Iterable[Problem] = (),
    written: Mapping[Key, str] = MappingProxyType({}),
) -> Settings:
    """Validate merged values.

    Args:
        values: tables of tables.
        origins: the place in the file, the variable or the option of each value, if it is known.
        problems: those found earlier.
        written: the values that are from the file, as they are written there.

    Raises:
        SettingsError: with the earlier problems and every problem with the values.

    """
    problems = list(problems)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError([*problems, *(_problem(each, origins, written) for each in error.errors())]) from None
    if problems:
        raise SettingsError(problems)
    return settings


def _problem(details: ErrorDetails, origins: Mapping[Key, str], written: Mapping[Key, str]) -> Problem:
    location = details["loc"]
    key = tuple(str(part) for part in location)
    match details["type"]:
        case "extra_forbidden":
            origin = _origin(key, origins)
            advice = suggestions.for_option(origin) if origin.startswith("--") else suggestions.for_key(key)
            message = f"unknown key; {advice}"
        case "missing":
            message = "is missing"
        case "dict_type":
            message = f"should be a table for each name: write [{key[0]}.NAME]"
        case "model_type":
            message = "should be a table" + suggestions.for_value(key, _origin(key, origins))
        case "value_error":  # the message names the value
            message = details["msg"].removeprefix("Value error, ")
        case kind:
            value, text = details["input"], written.get(key, "")
            expected = _EXPECTED.get(kind) or _expected(details["msg"])
            message = f"{expected}, not {_shown(value, text)}"
            quoted = toml.value(text.replace("0o", "0"))
            if text and isinstance(value, int | float | date | time) and (kind == "string_type" or quoted in expected):
                message += f": write {quoted}"
    return Problem(_origin(key, origins), _dotted(location), message)


def _dotted(location: Location) -> str:
    """Return a key as TOML writes it, with the index of an item in brackets."""
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{toml.key_part(part)}" for part in location
    ).removeprefix(".")


def _expected(message: str) -> str:
    """Return the requirement of one of Pydantic's messages, with choices as TOML writes them."""
    return message.removeprefix("Input ").removeprefix("String ").replace("'", '"')


def _shown(value: object, written: str) -> str:
    """Return a value as it is written, or as TOML would write it, shortened to a part of a line."""
    text = written
    if not text or "\n" in text:
        try:
            text = toml.value(value)
        except TypeError:  # an object from Python
            text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _origin(key: Key, origins: Mapping[Key, str]) -> str:
    """Return the origin of a key, or else of the nearest table around it."""
    lengths = range(len(key), 0, -1)
    return next((origins[key[:length]] for length in lengths if key[:length] in origins), "")
