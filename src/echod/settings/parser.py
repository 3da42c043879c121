"""The parser of the command line: an option for each setting of the model, and the help."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

from pydantic import ByteSize

from echod.settings import toml
from echod.settings.model import Settings, has_named_tables, leaves
from echod.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic.fields import FieldInfo

    from echod.settings.types import Key

_LISTEN = ("listen",)
_WORKERS = ("workers",)

_USAGE = """\
echod [serve | check | config] [ADDRESS ...] [OPTION ...]
       echod probe TARGET [OPTION ...]"""

_DESCRIPTION = {
    "": "A TCP echo daemon (RFC 862) that returns every byte and reports exactly what it did.",
    "serve": "Run the echo daemon in the foreground. SIGTERM and Ctrl-C stop it gracefully, SIGHUP reloads the settings.",
    "check": "Report every problem with the settings, and open no address. Every option of `echod serve` is accepted.",
    "config": "Print the settings in force as a TOML file that --config reads back. Each value is followed by its origin: "
    "a file, a variable, an option or the default. Every option of `echod serve` is accepted.",
}

COMMANDS = {
    "serve": "Run the daemon. This is the default.",
    "check": "Report every problem with the settings.",
    "config": "Print the settings in force, each with its origin.",
    "probe": "Check or measure an echo server.",
    "completion": "Print a completion script for bash, zsh or fish.",
    "help": "Print the help, or that of a command: `help probe`.",
    "version": "Print the version.",
}

_ADDRESS = (
    "Listen on this address, as --listen does. A PORT alone means 127.0.0.1, and :PORT means all addresses. Several "
    "addresses may be given, and --listen too."
)

_NOTES = """
Each named fault and listener has options that contain its name: --faults.NAME.trigger TEXT, --listeners.NAME.address
ADDRESS, --listeners.NAME.tls.certificate FILE.

A TIME is in seconds, or has a unit: 250ms, 10s, 5m, 1h. A SIZE is in bytes, or has a unit: 64KiB, 1MB.

Each option is also a key of the settings file, such as idle_timeout in the table [limits], and a variable, such as
ECHOD_LIMITS__IDLE_TIMEOUT. The command line overrides the environment, and both override the file.
"""

_EXIT_CODES = {
    "serve": """
exit codes:
  0              stopped gracefully
  1              unexpected failure
  2              the command line could not be parsed
  69             an address could not be opened
  78             the settings are invalid
  130, 131, 143  a second SIGINT, a SIGQUIT or a second SIGTERM forced the stop
""",
    "check": """
exit codes:
  0   the settings are valid
  1   the output could not be written
  2   the command line could not be parsed
  78  the settings are invalid
""",
}

_EXAMPLES = {
    "": """
examples:
  echod 8000                    listen on 127.0.0.1, port 8000
  echod :8000 unix:/run/echo    listen on all addresses, and on a unix socket
  echod check -c echo.toml      check a settings file
  echod -c echo.toml            run with it
  echod probe localhost:8000    check that a server echoes
""",
    "serve": """
examples:
  echod serve 8000              listen on 127.0.0.1, port 8000
  echod serve -c echo.toml      read a settings file
  echod serve :8000 [::1]:7     listen on all addresses, and on an IPv6 address
""",
    "check": """
examples:
  echod check                   check the variables, or only the defaults
  echod check -c echo.toml      check a settings file
""",
    "config": """
examples:
  echod config -c echo.toml     print the settings of a file, and all defaults
  echod config > echo.toml      start a settings file
""",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def build_parser(version: str) -> argparse.ArgumentParser:
    """Return the parser of the options. It leaves the command and the addresses to its caller."""
    parser = _Parser(prog="echod", usage=_USAGE, allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.set_defaults(options={})
    _add_options(parser, version)
    _add_sections(parser)
    return parser


def help_text(command: str) -> str:
    """Return the help of a command that reads settings, or of all commands if the name is empty."""
    page = argparse.ArgumentParser(
        prog="echod",
        usage=f"echod {command} [ADDRESS ...] [OPTION ...]" if command else _USAGE,
        description=_DESCRIPTION[command],
        epilog=_epilog(command),
        formatter_class=_Formatter,
        add_help=False,
    )
    if not command:
        commands = page.add_argument_group("commands")
        for name, text in COMMANDS.items():
            commands.add_argument(name, help=text)
    page.add_argument_group("arguments").add_argument("ADDRESS", help=_ADDRESS)
    _add_options(page, "")
    if command in {"", "serve"}:
        _add_sections(page)
    return page.format_help()


def _add_options(to: argparse.ArgumentParser, version: str) -> None:
    add = to.add_argument_group("options").add_argument
    add("-h", "--help", action="store_true", help="Print the help.")
    add("-V", "--version", action="version", version=f"echod {version}", help="Print the version.")
    text = "Read this TOML file. (default: the variable ECHOD_CONFIG, or no file)"
    add("-c", "--config", action="append", metavar="FILE", help=text)
    for key, field in leaves():
        if len(key) == 1:
            short = ("-l",) if key == _LISTEN else ()
            _add_setting(add, key, field, *short)


def _add_sections(to: argparse.ArgumentParser) -> None:
    groups: dict[str, Any] = {}
    for key, field in leaves():
        if len(key) > 1:
            if key[0] not in groups:
                title = str(Settings.model_fields[key[0]].description).rstrip(".")
                groups[key[0]] = to.add_argument_group(title[0].lower() + title[1:])
            _add_setting(groups[key[0]].add_argument, key, field)


def add_unlisted(to: argparse.ArgumentParser, option: str) -> None:
    """Add the option of a key that is not in the help."""
    to.add_argument(option, dest="options", action=_Set, metavar="VALUE")


def _add_setting(add: Callable[..., object], key: Key, field: FieldInfo, *short: str) -> None:
    default = _default_text(field.default)
    text = f"{field.description} (default: {default})" if default else str(field.description)
    add(
        *short,
        f"--{'.'.join(key)}".replace("_", "-"),
        dest="options",
        action=_Append if key == _LISTEN else _Set,
        metavar=_metavar(key, field.annotation),
        help=text.replace("%", "%%"),
    )


def _metavar(key: Key, annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return f"{{{','.join(get_args(annotation))}}}"
    if key == _LISTEN:
        return "ADDRESS"
    if key == _WORKERS:
        return "N"
    return {float: "TIME", int: "N", ByteSize: "SIZE"}.get(annotation) or key[-1].upper()


def _default_text(default: object) -> str:
    """Return a default as it is written on the command line."""
    match default:
        case tuple():
            return ", ".join(default)
        case float():
            return f"{default:g}"
        case ByteSize():
            return toml.value(default).strip('"')
        case _:
            return str(default)


def _epilog(command: str) -> str:
    serves = command in {"", "serve"}
    return (_NOTES if serves else "") + _EXIT_CODES["serve" if serves else "check"] + _EXAMPLES[command]


class _Formatter(argparse.HelpFormatter):
    """Wrap each paragraph of a text by itself, and keep one with indented lines as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(part if "\n " in part else fill(part, width, indent) for part in text.strip().split("\n\n"))


class _Set(argparse.Action):
    def __call__(self, _: object, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        assert option is not None
        namespace.options[_key(option)] = option, value


class _Append(argparse.Action):
    def __call__(self, _: object, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        assert option is not None
        append_addresses(namespace.options, option, value)


def append_addresses(options: dict[Key, tuple[str, object]], option: str, text: str) -> list[str]:
    """Add addresses, separated by commas, to those that were given before. Return the new ones.

    A port alone is on 127.0.0.1.
    """
    new = [f"127.0.0.1:{part}" if part.isdecimal() else part for part in map(str.strip, text.split(","))]
    before: Any
    _, before = options.get(_LISTEN, (option, []))
    options[_LISTEN] = option, [*before, *new]
    return new


def _key(option: str) -> Key:
    parts = option.removeprefix("--").split(".")
    field = Settings.model_fields.get(parts[0])
    # The name of a named table is kept as the user wrote it.
    names = {1} if field is not None and has_named_tables(field) else set()
    return tuple(part if index in names else part.replace("-", "_") for index, part in enumerate(parts))
