"""The syntax of the command line, derived from the model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

from echod.settings import toml
from echod.settings.model import Settings, has_named_tables, leaves
from echod.text import closest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from echod.settings.types import Key

_EPILOG = """\
To check and measure an echo server, use `echod probe TARGET`: see `echod probe --help`.

The options of faults and listeners contain their name: --faults.NAME.trigger TEXT, --listeners.NAME.address ADDRESS,
--listeners.NAME.tls.certificate FILE.
Every option is also a key of the file, and a variable: ECHOD_LIMITS__IDLE_TIMEOUT. The command line has precedence, then
the environment, then the file.

exit codes: 0 stopped gracefully; 1 unexpected failure; 2 the command line could not be parsed; 69 an address could not be
opened; 78 the settings are invalid; 130, 131, 143 a second SIGINT, a SIGQUIT or a second SIGTERM forced the stop
"""


class CommandLine(NamedTuple):
    """A parsed command line."""

    command: str
    config: str | None
    options: dict[Key, tuple[str, object]]
    """The given settings by key, each with its option as the user wrote it."""


def parse(arguments: Sequence[str], version: str) -> CommandLine:
    """Parse the arguments.

    A setting's option is `--` and its dotted key, with dashes or underscores. Neither the key nor the value is checked
    here: the model does that.

    Args:
        arguments: those after the command's name.
        version: the version that --version prints.

    Raises:
        SystemExit: with 2 if the arguments cannot be parsed, with 0 after --help and --version.

    """
    parser = _parser(version)
    known = parser._option_string_actions  # noqa: SLF001  (argparse has no public list of options)
    for argument in arguments:
        option = argument.partition("=")[0]
        if not option.startswith("--") or option in known:
            continue
        if "." in option:
            parser.add_argument(option, dest="options", action=_Set, help=argparse.SUPPRESS)
        else:
            near = closest(option, known)
            parser.error(f"unknown option {option}" + (f"; did you mean {near}?" if near else ""))
    parsed = parser.parse_args(arguments)
    return CommandLine(parsed.command, parsed.config, parsed.options)


def _parser(version: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="echod",
        usage="%(prog)s [serve | check | config] [--config FILE] [--listen ADDRESS]... [--SECTION.KEY VALUE]...",
        description="A TCP echo daemon (RFC 862) that returns every byte and reports exactly what it did.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(options={})
    parser.add_argument(
        "command",
        nargs="?",
        choices=("serve", "check", "config"),
        default="serve",
        help="serve (the default): run the daemon; check: report all problems with the settings; config: print the "
        "settings in force",
    )
    parser.add_argument("--version", action="version", version=f"echod {version}")
    parser.add_argument(
        "--config", metavar="FILE", help="the TOML file of settings (default: the variable ECHOD_CONFIG, else none)"
    )
    for group, keys in _groups():
        section = parser.add_argument_group(group)
        for key, text in keys:
            option = f"--{'.'.join(key)}"
            spellings = dict.fromkeys((option.replace("_", "-"), option))
            action = _Append if key == ("listen",) else _Set
            section.add_argument(*spellings, dest="options", action=action, metavar="VALUE", help=text)
    return parser


def _groups() -> Iterator[tuple[str, list[tuple[Key, str]]]]:
    groups: dict[str, list[tuple[Key, str]]] = {}
    for key, field in leaves():
        text = f"{field.description} (default: {toml.value(field.default)})".replace("%", "%%")
        title = Settings.model_fields[key[0]].description if len(key) > 1 else "settings"
        groups.setdefault(f"{key[0]}: {title}" if len(key) > 1 else "settings", []).append((key, text))
    yield from groups.items()


class _Set(argparse.Action):
    def __call__(self, _: object, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        assert option is not None
        namespace.options[_key(option)] = option, value


class _Append(argparse.Action):
    def __call__(self, _: object, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        assert option is not None
        _, values = namespace.options.get(_key(option), (option, []))
        namespace.options[_key(option)] = option, [*values, *(part.strip() for part in value.split(","))]


def _key(option: str) -> Key:
    parts = option.removeprefix("--").split(".")
    field = Settings.model_fields.get(parts[0])
    # The name of a named table is kept as the user wrote it.
    names = {1} if field is not None and has_named_tables(field) else set()
    return tuple(part if index in names else part.replace("-", "_") for index, part in enumerate(parts))
