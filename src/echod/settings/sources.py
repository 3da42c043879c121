"""Sources of the settings: command line, environment and file, merged by pydantic-settings."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

from pydantic_settings import BaseSettings, EnvSettingsSource, InitSettingsSource

from echod.settings import suggestions
from echod.settings.model import Config, Settings, has_named_tables, section
from echod.settings.problems import Problem, SettingsError, validate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic.fields import FieldInfo
    from pydantic_settings import PydanticBaseSettingsSource

    from echod.settings.places import Place
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
    had_values = before is not None and config in {origin.rpartition(":")[0] for origin in before.values()}
    file = _File(config, problems, had_values=had_values)
    environment = _Environment(problems)
    command_line = _CommandLine(options)
    origins = file.origins | environment.origins | command_line.origins
    written = {key: place.value for key, place in file.places.items() if origins[key] == file.origins[key]}
    settings = validate(_merge(command_line, environment, file), origins, problems, written)
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
        self.unknown: dict[str, str] = {}
        values: dict[str, str] = {}
        for name in sorted(name for name in os.environ if name.startswith(_PREFIX)):
            key = tuple(name.removeprefix(_PREFIX).lower().split(_DELIMITER))
            field = Settings.model_fields.get(key[0])
            if name == CONFIG_VARIABLE:
                continue
            if field is None or (len(key) > 1 and section(field) is None):
                meant = suggestions.for_variable(name.removeprefix(_PREFIX))
                self.unknown[name] = _variable(meant) if meant else ""
            elif len(key) == 1 and section(field) is not None:
                table = f"{name}__NAME" if has_named_tables(field) else name
                problems.append(Problem(name, "", f"is a section: set {table}__KEY for each key"))
            else:
                values[name.lower()] = os.environ[name]
                for path in _tables_around(key):
                    self.origins[path] = _variable(path)
                self.origins[key] = name
        self.env_vars = values

    def __call__(self) -> dict[str, Any]:
        return {"tables": super().__call__()}

    def decode_complex_value(self, field_name: str, field: FieldInfo | None, value: Any) -> Any:  # noqa: ARG002
        """Return every value as it is written: JSON would be a second syntax for each."""
        return value


class _File(InitSettingsSource):
    def __init__(self, file: str | None, problems: list[Problem], *, had_values: bool) -> None:
        self.places: Mapping[Key, Place] = {}
        tables: dict[str, Any] = {}
        if file is not None:
            from echod.settings.file import read  # noqa: PLC0415  (a file is optional)

            try:
                tables, self.places = read(file, had_values=had_values)
            except SettingsError as error:
                problems += error.problems
        self.origins = {key: f"{file}:{place.line}" for key, place in self.places.items()}
        super().__init__(_MODEL, {"tables": tables})


def _variable(key: Key) -> str:
    return (_PREFIX + _DELIMITER.join(key)).upper()


def _tables_around(key: Key) -> Iterator[Key]:
    """Yield the paths of the tables that contain a key, outermost first."""
    return (key[:length] for length in range(1, len(key)))
