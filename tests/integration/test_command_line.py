"""Test the syntax of the command line: addresses, help, and answers to what it does not accept."""

from __future__ import annotations

import re
import shlex
import tomllib
from typing import TYPE_CHECKING

import pytest

import echod
from echod.settings.model import leaves
from harness import Daemon, run

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Command

pytestmark = pytest.mark.once


@pytest.mark.parametrize("arguments", ["--version", "-V", "version", "version 8000"])
def test_version(command: Command, arguments: str) -> None:
    result = command(*arguments.split())
    assert (result.returncode, result.stdout, result.stderr) == (0, f"echod {echod.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "listen"),
    [
        ("8000", ["127.0.0.1:8000"]),
        (":8000", [":8000"]),
        ("localhost:1 [::1]:2 unix:/run/echo unix:@name systemd:web", None),
        ("8000,:9000", ["127.0.0.1:8000", ":9000"]),
        ("-l 8000", ["127.0.0.1:8000"]),
        ("-l8000 --listen :9000 h:1", ["127.0.0.1:8000", ":9000", "h:1"]),
        ("h:1 --loop asyncio h:2 --log.level=debug h:3 -- h:4", ["h:1", "h:2", "h:3", "h:4"]),
        ("--limits.backlog 3", ["127.0.0.1:8000"]),
    ],
)
def test_addresses(command: Command, arguments: str, listen: list[str] | None) -> None:
    """Every argument after the command is an address. `config` shows how it is read."""
    result = command("config", *arguments.split())
    assert (result.returncode, result.stderr) == (0, "")
    assert tomllib.loads(result.stdout)["listen"] == (listen or arguments.split())
    assert ("  # command line\n" in result.stdout) == (":" in arguments.rpartition(" ")[2] or arguments == "8000")


@pytest.mark.parametrize("serve", [(), ("serve",)])
def test_serving_addresses(serve: tuple[str, ...], tmp_path: Path) -> None:
    """With or without `serve`, echod listens on the addresses after it, and not on those of the file."""
    path = tmp_path / "echo.toml"
    path.write_text('listen = ["127.0.0.1:1"]\n')
    sock = f"unix:{tmp_path / 'sock'}"
    with Daemon(*serve, "0", "--config", str(path), sock, listen=None) as daemon:
        daemon.wait_for("listening", address=sock)
        daemon.echo(b"x")
        assert daemon.address[0] == "127.0.0.1"
        assert len(daemon.all("listening")) == 2
        assert daemon.stop() == 0


def test_help(command: Command) -> None:
    """The help lists every command, and every setting with its default."""
    result = command("--help")
    assert (result.returncode, result.stderr) == (0, "")
    text = " ".join(result.stdout.split())  # without the line breaks
    for key, field in leaves():
        assert f" --{'.'.join(key)} ".replace("_", "-") in text
        assert f" {field.description} " in text
    for part in (
        "echod probe TARGET",
        "config Print the settings in force",
        "-l, --listen ADDRESS Addresses" if "-l, --listen" in text else "-l ADDRESS, --listen ADDRESS Addresses",
        "--log.level {debug,info,warning,error} Lowest",
        "--log.file FILE",
        "--limits.max-line SIZE",
        "--limits.backlog N",
        "(default: 127.0.0.1:8000)",
        "(default: 64KiB)",
        "(default: 2)",
        "limits and timeouts of clients: --limits.",
        "--faults.NAME.trigger TEXT",
        "ECHOD_CONFIG",
        "exit codes: 0 stopped",
        "examples: echod 8000 ",
    ):
        assert part in text
    assert not re.search(r"--[a-z.]*_", text), "options are listed with dashes"
    assert "(default: )" not in text


@pytest.mark.parametrize("arguments", [["help"], ["help", "help"], ["-h"], ["help", "version"], ["help", "--help"]])
def test_ways_to_the_help(command: Command, arguments: list[str]) -> None:
    assert command(*arguments) == command_result(command, "--help", arguments)


@pytest.mark.parametrize(
    ("name", "about", "example"),
    [
        ("serve", "Run the echo daemon in the foreground.", "echod serve 8000"),
        ("check", "Report every problem with the settings", "echod check -c echo.toml"),
        ("config", "Print the settings in force", "echod config > echo.toml"),
        ("probe", "Check or measure an echo server", ""),
        ("completion", "Print a script", "echod completion bash >"),
    ],
)
def test_help_of_commands(command: Command, name: str, about: str, example: str) -> None:
    """`help NAME` and `NAME --help` describe the command itself."""
    result = command("help", name)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: echod {name}")
    assert about in result.stdout
    assert example in result.stdout
    assert command(name, "--help").stdout == result.stdout
    assert ("--limits.backlog" in result.stdout) == (name == "serve")


@pytest.mark.parametrize("name", ["", "serve", "check", "config", "completion"])
@pytest.mark.parametrize("columns", [None, "80", "120"])
def test_width_of_the_help(name: str, columns: str | None) -> None:
    """The help fits the terminal, and 80 columns in a pipe."""
    result = run("help", *name.split(), env={"COLUMNS": columns} if columns else {"COLUMNS": ""})
    lines = result.stdout.splitlines()
    width = int(columns or 80)
    assert max(map(len, lines)) < width
    assert columns != "120" or name == "completion" or max(map(len, lines)) > 80
