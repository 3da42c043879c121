"""Completion scripts for shells. shtab generates them from the parsers."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import shtab

from echod.probe import arguments
from echod.settings.parser import COMMANDS, build_parser

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHELLS = ("bash", "zsh", "fish")

_EPILOG = """\
examples (create a missing folder with mkdir -p):
  echod completion bash > ~/.local/share/bash-completion/completions/echod
  echod completion fish > ~/.config/fish/completions/echod.fish
  echod completion zsh > ~/.zfunc/_echod
                          with fpath+=~/.zfunc above compinit in ~/.zshrc
"""


def parse(command_line: Sequence[str]) -> str:
    """Parse the arguments after `completion`, and return the name of the shell.

    Raises:
        SystemExit: with 2 for a usage error, with 0 after --help.

    """
    return str(_parser().parse_args(command_line).shell)


def script(shell: str) -> str:
    """Return the completion script of a shell."""
    return shtab.complete(_all_commands(), shell)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="echod completion",
        description="Print a script that completes commands, options and their values in a shell.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    group = parser.add_argument_group("arguments")
    group.add_argument("shell", choices=_SHELLS, help="The shell that runs the script.")
    parser.add_argument_group("options").add_argument("-h", "--help", action="help", help="Print the help.")
    return parser


def _all_commands() -> argparse.ArgumentParser:
    """Return a parser of the whole command line, with a subparser for each command. It serves only as shtab's input."""
    with_settings = build_parser("")
    with_settings.add_argument("address", nargs="*")  # zsh completes nothing after an argument that it does not know
    help_parser = argparse.ArgumentParser()
    help_parser.add_argument("name", choices=tuple(COMMANDS))
    of_command = {
        "probe": arguments.build_parser(),
        "completion": _parser(),
        "help": help_parser,
        "version": argparse.ArgumentParser(),
    }
    root = build_parser("")
    commands = root.add_subparsers()
    for name, text in COMMANDS.items():
        parents = [of_command.get(name, with_settings)]
        commands.add_parser(name, help=text, description=text, parents=parents, add_help=False)
    for command in (root, *commands.choices.values()):
        for action in command._actions:  # noqa: SLF001  (argparse has no public list of actions)
            _complete_value(action)
    return root


def _complete_value(action: argparse.Action) -> None:
    """Tell shtab the values of an option, which its placeholder shows."""
    match str(action.metavar):
        case "FILE" | "FILE.svg":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        case choices if choices.startswith("{"):
            action.choices = choices.strip("{}").split(",")
