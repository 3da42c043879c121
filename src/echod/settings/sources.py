"""Sources of the settings: command line, environment and file, merged by pydantic-settings."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

from pydantic_settings import BaseSettings, EnvSettingsSource, InitSettingsSource

from echod.net import files
from echod.settings.model import Config, Settings, section
from echod.settings.problems import Problem, validate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic.fields import FieldInfo
    from pydantic_settings import PydanticBaseSettingsSource

    from echod.settings.types import Key

CONFIG_VARIABLE = "ECHOD_CONFIG"

_PREFIX = "ECHOD_"
_DELIMITER = "__"

# Sources only read the fields and the configuration of this class, which every model has.
_MODEL = cast("type[BaseSettings]", Settings)


def load(
    options: Mapping[Key, tuple[str, object]], config: str | None, before: Mapping[Key, str] | None = None
) -> Config:
    """Read and validate the settings. The command line overrides the environment, and both override the file.

    Args:
        options: the command line's values by key, each with its option as the user wrote it.
        config: the file, or None.
        before: for a reload, the origins of the settings in force.

    Raises:
        SettingsError: with every problem of every source.

    """
    problems: list[Problem] = []
    file = _File(config, problems, had_values=before is not None and config in before.values())
    environment = _Environment(problems)
    command_line = _CommandLine(options)
    origins = file.origins | environment.origins | command_line.origins
    settings = validate(_merge(command_line, environment, file), origins, problems)
    return Config(settings, origins, environment.unknown)


def _merge(*sources: PydanticBaseSettingsSource) -> dict[str, Any]:
    """Merge the sources' tables, and validate nothing yet. Earlier sources override later ones."""

    class Merged(BaseSettings):
        tables: dict[Any, Any] = {}

        @classmethod
        def settings_customise_sources(cls, *_: object, **__: object) -> tuple[PydanticBaseSettingsSource, ...]:
            return sources

    return Merged().tables


class _CommandLine(InitSettingsSource):
    def __init__(self, options: Mapping[Key, tuple[str, object]]) -> None:
        self.origins: dict[Key, str] = {}
        tables: dict[str, Any] = {}
        for key, (option, value) in options.items():
            table = tables
            for path in _tables_around(key):
                if not isinstance(table.get(path[-1]), dict):
                    table[path[-1]] = {}
                table = table[path[-1]]
                self.origins[path] = option
            table[key[-1]] = value
            self.origins[key] = option
        super().__init__(_MODEL, {"tables": tables})


class _Environment(EnvSettingsSource):
    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(_MODEL, env_prefix=_PREFIX, env_nested_delimiter=_DELIMITER)
        self.origins: dict[Key, str] = {}
        unknown: list[str] = []
        values: dict[str, str] = {}
        for name in sorted(name for name in os.environ if name.startswith(_PREFIX)):
            key = tuple(name.removeprefix(_PREFIX).lower().split(_DELIMITER))
            field = Settings.model_fields.get(key[0])
            if name == CONFIG_VARIABLE:
                continue
            if field is None or (len(key) > 1 and section(field) is None):
                unknown.append(name)
            elif len(key) == 1 and section(field) is not None:
                problems.append(Problem(name, "", f"is a section: set {name}__KEY for each key"))
            else:
                values[name.lower()] = os.environ[name]
                for path in _tables_around(key):
                    self.origins[path] = (_PREFIX + _DELIMITER.join(path)).upper()
                self.origins[key] = name
        self.env_vars = values
        self.unknown = tuple(unknown)

    def __call__(self) -> dict[str, Any]:
        return {"tables": super().__call__()}

    def decode_complex_value(self, field_name: str, field: FieldInfo | None, value: Any) -> Any:  # noqa: ARG002
        """Return every value as it is written: JSON would be a second syntax for each."""
        return value


class _File(InitSettingsSource):
    def __init__(self, file: str | None, problems: list[Problem], *, had_values: bool) -> None:
        tables = {} if file is None else _read_file(file, problems, had_values=had_values)
        self.origins = dict.fromkeys(_keys(tables), file or "")
        super().__init__(_MODEL, {"tables": tables})


def _tables_around(key: Key) -> Iterator[Key]:
    """Yield the paths of the tables that contain a key, outermost first."""
    return (key[:length] for length in range(1, len(key)))


def _keys(tables: Mapping[str, Any], path: Key = ()) -> Iterator[Key]:
    """Yield the key of every table and every value."""
    for name, value in tables.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from _keys(value, (*path, name))


def _read_file(file: str, problems: list[Problem], *, had_values: bool) -> dict[str, Any]:
    if not file:
        problems.append(Problem("--config", "", "names no file"))
        return {}
    import tomllib  # noqa: PLC0415  (needed with a file only)

    data = b""
    try:
        # Not read by pydantic-settings, which takes a pipe for an empty file.
        data, regular = files.read(file)
        if data or regular or not had_values:
            return tomllib.loads(data.decode())
        message = "is empty now: a pipe can be read only once; use a regular file if the settings are to be reloaded"
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text: byte {error.start}"
    except (ValueError, RecursionError) as error:  # tomllib raises these for endless numbers and for deep nesting
        last = data.count(b"\n") + 1
        message = f"is not TOML: {error}".replace("at end of document", f"at line {last}, the end of the file")
    problems.append(Problem(file, "", message))
    return {}
