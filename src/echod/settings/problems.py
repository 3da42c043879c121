"""Problems with settings: all of them at once, each with its origin and with advice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from echod.settings import toml
from echod.settings.model import Settings, has_named_tables, section
from echod.text import hint, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

    from echod.settings.types import Key


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
    """The file, variable or option; empty if the origin is unknown."""
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


def validate(values: Mapping[str, Any], origins: Mapping[Key, str], problems: Iterable[Problem] = ()) -> Settings:
    """Validate merged values.

    Args:
        values: tables of tables.
        origins: the file, variable or option of each value, if it is known.
        problems: those found earlier.

    Raises:
        SettingsError: with the earlier problems and every problem with the values.

    """
    problems = list(problems)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError([*problems, *(_problem(details, origins) for details in error.errors())]) from None
    if problems:
        raise SettingsError(problems)
    return settings


def _problem(details: ErrorDetails, origins: Mapping[Key, str]) -> Problem:
    key = tuple(str(part) for part in details["loc"])
    match details["type"]:
        case "extra_forbidden":
            message = _unknown(key)
        case "missing":
            message = "is missing"
        case "model_type" | "dict_type":
            message = "should be a table"
        case "value_error":  # the message names the value
            message = details["msg"].removeprefix("Value error, ")
        case kind:
            message = f"{_EXPECTED.get(kind) or _expected(details['msg'])}, not {_shown(details['input'])}"
    return Problem(_origin(key, origins), ".".join(key), message)


def _expected(message: str) -> str:
    """Return the requirement of one of Pydantic's messages, with choices as TOML writes them."""
    return message.removeprefix("Input ").removeprefix("String ").replace("'", '"')


def _shown(value: object) -> str:
    """Return a value as TOML writes it."""
    try:
        return toml.value(value)
    except TypeError:  # an object from Python
        return repr(value)


def _origin(key: Key, origins: Mapping[Key, str]) -> str:
    """Return the origin of a key, or else of the nearest table around it."""
    lengths = range(len(key), 0, -1)
    return next((origins[key[:length]] for length in lengths if key[:length] in origins), "")


def _unknown(key: Key) -> str:
    model: type[BaseModel] = Settings
    names = iter(key[:-1])
    for name in names:
        field = model.model_fields[name]
        if has_named_tables(field):
            next(names, None)  # all named tables of a field have one model
        model = section(field) or model
    return f"unknown key; {hint(key[-1], model.model_fields)}"
