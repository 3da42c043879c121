"""The syntax of the command line."""

from __future__ import annotations

import argparse
import re
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from echod.net import addresses
from echod.settings import suggestions
from echod.settings.parser import COMMANDS, add_unlisted, append_addresses, build_parser, help_text
from echod.text import closest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echod.settings.types import Key

# The commands that read settings. Each of the others has a command line of its own.
_WITH_SETTINGS = ("serve", "check", "config")

_ADDRESS_ALONE = "write the address alone: `echod 8000` listens on 127.0.0.1, `echod :8000` on all addresses"

# Advice on options that other servers have.
_INSTEAD = (
    dict.fromkeys(("-p", "--port", "-H", "--host", "-b", "--bind", "--address"), _ADDRESS_ALONE)
    | dict.fromkeys(("-d", "--debug", "--verbose"), "write --log.level debug")
    | dict.fromkeys(("-q", "--quiet"), "write --log.level warning")
    | {
        "-v": "write --log.level debug for a more detailed log, or -V for the version",
        "--tls": "write --listeners.NAME.address, --listeners.NAME.tls.certificate and --listeners.NAME.tls.private-key",
    }
)


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
    parser = build_parser(version)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for argument in arguments[:end]:
        _check_option(argument, parser)
    try:
        given, words = parser.parse_known_args(arguments[:end])
    except argparse.ArgumentError as error:
        parser.error(_wrong_value(error, parser))
    words += arguments[end + 1 :]
    command = words.pop(0) if words and words[0] in _WITH_SETTINGS else ""
    for word, after in pairwise([*words, ""]):
        for address in append_addresses(given.options, "command line", word):
            _check_address(address, after, command, parser)
    if given.help:
        sys.stdout.write(help_text(command))
        parser.exit()
    config, *second = given.config or [None]
    if second:
        parser.error(f"--config is given twice, with {config!r} and {second[0]!r}: echod reads one file")
    return CommandLine(command or "serve", config, given.options)


def _check_option(argument: str, parser: argparse.ArgumentParser) -> None:
    """Add an option with a dot, as the model knows whether it is one. Reject every other unknown option."""
    option = argument.partition("=")[0]
    known = _by_name(parser)
    # For argparse, a negative number or a text with a space is a value.
    if option in known or " " in option or not re.match("--|-[A-Za-z]", option):
        return
    if option.startswith("--"):
        if "." in option:
            add_unlisted(parser, option)
            return
    elif f"-{option}" not in known:
        if option[:2] in known:  # such as -lADDRESS
            return
        option = option[:2]
    parser.error(f"unknown option {option}; {_INSTEAD.get(option) or suggestions.for_option(option)}")


def _by_name(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return parser._option_string_actions  # noqa: SLF001  (argparse has no public list of options)


def _wrong_value(error: argparse.ArgumentError, parser: argparse.ArgumentParser) -> str:
    option = str(error.argument_name).rpartition("/")[2]
    action = _by_name(parser)[option]
    return (
        f"{option} takes no value" if action.nargs == 0 else f"{option} needs a value: write {option} {action.metavar}"
    )


def _check_address(text: str, after: str, command: str, parser: argparse.ArgumentParser) -> None:
    try:
        addresses.parse_bindable(text)
    except addresses.AddressError as error:
        parser.error(str(error) if ":" in text else _advice_on_word(text, after, command))


def _advice_on_word(word: str, after: str, command: str) -> str:
    if word in _WITH_SETTINGS:
        return f"{word!r} is a command: write only one command, and write it first"
    if word in COMMANDS:
        return f"{word!r} is a command that reads no settings: write `echod {word}` first, then its own arguments"
    if "/" in word or word.endswith(".toml"):
        return (
            f"{word!r} is not an address; write --config {word!r} for a settings file, {f'unix:{word}'!r} for a socket"
        )
    if after.isdecimal() and ("." in word or word == "localhost"):
        return f"{word!r} is not an address; did you mean {word}:{after}?"
    if not command and (near := closest(word, COMMANDS)):
        return f"{word!r} is neither a command nor an address; did you mean {near}?"
    wrong = "not an address" if command else f"neither a command ({', '.join(COMMANDS)}) nor an address"
    return f"{word!r} is {wrong}, such as 8000, :8000, HOST:8000 or unix:PATH"
