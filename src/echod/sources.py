"""Where settings come from: the command line, the environment, the file; merged in that order, each value's origin kept."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple, get_origin

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource

from echod import addresses, files, render
from echod.settings import PREFIX, Key, ListenerSettings, Settings, section

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from pydantic import BaseModel
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

CONFIG_VARIABLE = "ECHOD_CONFIG"


class Problem(NamedTuple):
    """One thing that is wrong with the settings."""

    source: str
    """The file, variable or option; empty where it is the settings as a whole."""
    key: str
    """Dotted; empty where a source as a whole is meant."""
    message: str

    def __str__(self) -> str:
        """Return the line for the user."""
        return render.printable(": ".join(part for part in self if part))


class SettingsError(Exception):
    """The settings cannot be used; `problems` has everything that is wrong with them."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class Loaded(NamedTuple):
    """Settings, and how they came about."""

    settings: Settings
    origins: Mapping[Key, str]
    """Where each value was set that is not a default."""
    unknown_variables: tuple[str, ...]
    """`ECHOD_` variables that name no setting, as Kubernetes injects them for a service called echod."""


def load(
    options: Mapping[Key, tuple[str, object]], config: str | None, before: Mapping[Key, str] | None = None
) -> Loaded:
    """Read and validate the settings: command line over environment over file over defaults.

    Args:
        options: the command line's values by key, each with the option as it was written.
        config: the file, or None.
        before: for a reload, the origins of the settings in force.

    Raises:
        SettingsError: with every problem of every source.

    """
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    origins: dict[Key, str] = {}
    if config is not None:
        had_values = before is not None and config in before.values()
        _overlay(values, origins, _read_file(config, problems, had_values=had_values), lambda _: config)
    variables = sorted(name for name in os.environ if name.startswith(PREFIX))
    names = {name.lower(): name for name in variables if _is_setting(name)}
    environment = _read_environment(names, problems)
    _overlay(values, origins, environment, lambda key: names.get(_variable(key), _variable(key).upper()))
    for key, (option, value) in options.items():
        _overlay(values, origins, _nest(key, value), lambda _, option=option: option)  # type: ignore[misc]
    if values.get("listeners"):
        values.setdefault("listen", ())
    settings = validate(values, origins, problems)
    unknown = (name for name in variables if not _is_setting(name) and name != CONFIG_VARIABLE)
    return Loaded(settings, origins, tuple(unknown))


def validate(values: Mapping[str, Any], origins: Mapping[Key, str], problems: Iterable[Problem] = ()) -> Settings:
    """Return the settings of merged values.

    Args:
        values: tables of tables.
        origins: where each was set, as far as that is to be told.
        problems: those there are already.

    Raises:
        SettingsError: with these and all that is wrong with the values.

    """
    problems = list(problems)
    settings = None
    try:
        settings = Settings(**values)
    except ValidationError as error:
        problems += (_problem(details, origins) for details in error.errors())
    problems += _conflicts(values, origins)
    if problems or settings is None:
        raise SettingsError(problems)
    return settings


# The sources


def _read_file(file: str, problems: list[Problem], *, had_values: bool) -> dict[str, Any]:
    if not file:
        problems.append(Problem("--config", "", "names no file"))
        return {}
    import tomllib  # noqa: PLC0415  (of use with a file only)

    data = b""
    try:
        # At once, and not by way of pydantic-settings, which takes what is no regular file (a pipe) for an empty one.
        data, regular = files.read(file)
        if data or regular or not had_values:
            return tomllib.loads(data.decode())
        message = "is empty now: a pipe can be read only once; use a regular file if the settings are to be reloaded"
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text: byte {error.start}"
    except (ValueError, RecursionError) as error:  # tomllib lets through those of endless numbers and of deep nesting
        last = data.count(b"\n") + 1
        message = f"is not TOML: {error}".replace("at end of document", f"at line {last}, the end of the file")
    problems.append(Problem(file, "", message))
    return {}


class _Environment(EnvSettingsSource):
    """Takes every value as it is written: JSON would be a second way to write each."""

    def decode_complex_value(self, field_name: str, field: FieldInfo | None, value: Any) -> Any:  # noqa: ARG002
        return value


def _read_environment(names: Mapping[str, str], problems: list[Problem]) -> dict[str, Any]:
    """Read the variables whose names are given, each by its lower-case form."""
    variables = {lower: os.environ[name] for lower, name in names.items()}
    for name, field in Settings.model_fields.items():
        variable = _variable((name,))
        if section(field) is not None and variables.pop(variable, None) is not None:
            problems.append(Problem(names[variable], "", f"is a section: set {names[variable]}__KEY for each key"))
    source = _Environment(Settings)
    source.env_vars = variables
    return source()


def _variable(key: Key) -> str:
    """Return the lower-case form of the variable's name."""
    return (PREFIX + "__".join(key)).lower()


def _is_setting(variable: str) -> bool:
    """Tell whether a variable is a setting's, or would be one in its section."""
    name, separator, _ = variable.removeprefix(PREFIX).lower().partition("__")
    field = Settings.model_fields.get(name)
    return field is not None and (not separator or section(field) is not None)


# Merging them


def _nest(key: Key, value: object) -> dict[str, Any]:
    table: dict[str, Any] = {key[-1]: value}
    for name in reversed(key[:-1]):
        table = {name: table}
    return table


def _overlay(
    values: dict[str, Any],
    origins: dict[Key, str],
    upper: Mapping[str, Any],
    origin: Callable[[Key], str],
    path: Key = (),
) -> None:
    """Lay one source's values over those below, table by table."""
    for name, value in upper.items():
        key = (*path, name)
        origins[key] = origin(key)
        if isinstance(value, dict):
            if not isinstance(values.get(name), dict):
                values[name] = {}
            _overlay(values[name], origins, value, origin, key)
        else:
            values[name] = value


# What is wrong with them


def _problem(details: ErrorDetails, origins: Mapping[Key, str]) -> Problem:
    key = tuple(str(part) for part in details["loc"])
    match details["type"]:
        case "extra_forbidden":
            message = _unknown(key)
        case "missing":
            message = "is missing"
        case "model_type" | "dict_type":
            message = "should be a table"
        case "value_error":  # ours, and it names the value
            message = details["msg"].removeprefix("Value error, ")
        case "tuple_type":
            message = f"should be a list, not {details['input']!r}"
        case "byte_size" | "byte_size_unit":
            message = f"should be bytes, or a size like '64KiB', not {details['input']!r}"
        case _:
            # What follows the comma tells how Pydantic went about it.
            text = details["msg"].removeprefix("Input ").removeprefix("String ").partition(", unable")[0]
            message = f"{text}, not {details['input']!r}"
    return Problem(_origin(key, origins), ".".join(key), message)


def _origin(key: Key, origins: Mapping[Key, str]) -> str:
    """Return where a key was set, or else the nearest table above it."""
    lengths = range(len(key), 0, -1)
    return next((origins[key[:length]] for length in lengths if key[:length] in origins), "")


def _unknown(key: Key) -> str:
    model: type[BaseModel] = Settings
    names = iter(key[:-1])
    for name in names:
        field = model.model_fields[name]
        if get_origin(field.annotation) is dict:
            next(names, None)  # the tables of such a table are of one model, whatever their names
        model = section(field) or model
    return f"unknown key; {hint(key[-1], model.model_fields)}"


def hint(name: str, known: Iterable[str]) -> str:
    """Return what to tell a user who wrote a name that is not known: the nearest, or else all."""
    import difflib  # noqa: PLC0415  (of use to an error only)

    known = list(known)
    if near := difflib.get_close_matches(name, known, 1):
        return f"did you mean {near[0]!r}?"
    return f"there are: {', '.join(known)}" if known else "there are none"


def _conflicts(values: Mapping[str, Any], origins: Mapping[Key, str]) -> Iterator[Problem]:
    """Yield what is wrong between values that may be right one by one; others are passed over here."""
    listen = values.get("listen")
    if isinstance(listen, str):
        listen = listen.split(",")
    tables = {name: table for name, table in _table(values, "listeners").items() if isinstance(table, dict)}
    places: list[tuple[Key, object]] = [
        *((("listen",), text) for text in (listen if isinstance(listen, list) else ())),
        *((("listeners", name, "address"), table.get("address")) for name, table in tables.items()),
    ]
    if admin := _table(values, "admin").get("address"):
        places.append((("admin", "address"), admin))
    if listen == [] and not values.get("listeners"):
        yield Problem(_origin(("listen",), origins), "listen", "there is no address to listen on")
    for key, text in _repeated(places):
        yield Problem(_origin(key, origins), ".".join(key), f"{text!r} is listened on already")
    faults = _table(values, "faults")
    names = {
        str(text).strip(): "an address in listen has this name already" for key, text in places if key == ("listen",)
    }
    if admin:
        names["admin"] = "admin.address has this name already"
    for name, table in tables.items():
        if name in names:
            key = ("listeners", name)
            yield Problem(_origin(key, origins), ".".join(key), names[name])
        for key_name, message in _useless(table, faults):
            key = ("listeners", name, key_name)
            yield Problem(_origin(key, origins), ".".join(key), message)


def _repeated(places: Iterable[tuple[Key, object]]) -> Iterator[tuple[Key, str]]:
    """Yield what another key, or the same, listens on already; what is no address is passed over."""
    seen: set[addresses.Address] = set()
    for key, value in places:
        text = str(value).strip()
        try:
            address = addresses.parse(text)
        except addresses.AddressError:
            continue
        free = isinstance(address, addresses.TcpAddress) and not address.port
        if address in seen and (not free or key == ("listen",)):
            yield key, text
        seen.add(address)


def _useless(table: Mapping[str, Any], faults: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the keys of a listener's table that could have no effect, each with why."""
    fault = table.get("fault")
    if isinstance(fault, str) and fault:
        if fault not in faults:
            yield "fault", f"no fault is named {fault!r}; {hint(fault, faults)}"
        elif table.get("mode") == "info":
            yield "fault", "in mode info there is no echo that could be wrong: choose stream or line"
        else:
            yield from _mismatches(table, _table(faults, fault))
    # With their defaults they stand in what `echod config` prints.
    if _differs(table, "proxy_trusted") and table.get("proxy_protocol", "off") == "off":
        yield "proxy_trusted", "is of use with proxy_protocol = 'require' only"
    if _differs(table, "socket_mode") and not re.match("unix:[^@]", str(table.get("address"))):
        yield "socket_mode", "is for the file of unix:PATH only"


def _mismatches(table: Mapping[str, Any], fault: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield why a listener cannot show its fault, which may be right for another one."""
    trigger = fault.get("trigger")
    if table.get("mode") == "line" and isinstance(trigger, str) and trigger.find("\n") != len(trigger) - 1:
        yield "fault", "no message equals its trigger: in mode line that is one line, with the line feed at its end"
    if fault.get("action") == "reset" and str(table.get("address")).startswith("unix:"):
        yield "fault", "a unix socket has no RST that action = 'reset' could send: choose close"


def _differs(table: Mapping[str, Any], name: str) -> bool:
    default = ListenerSettings.model_fields[name].default
    given = table.get(name, default)
    return bool(given != (list(default) if isinstance(given, list) else default))


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = values.get(name)
    return table if isinstance(table, dict) else {}
