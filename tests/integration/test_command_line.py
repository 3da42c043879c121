"""Test the syntax of the command line: addresses, help, and answers to what it does not accept."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING

import pytest

import echod
from echod.settings.model import leaves
from harness import Daemon

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
        "--shutdown.delay TIME",
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
    assert command(*arguments).stdout == command("--help").stdout


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
@pytest.mark.parametrize("columns", ["", "80", "120"])
def test_width_of_the_help(command: Command, monkeypatch: pytest.MonkeyPatch, name: str, columns: str) -> None:
    """The help has the width of the terminal, or 80 columns in a pipe."""
    monkeypatch.setenv("COLUMNS", columns)
    longest = max(len(line) for line in command("help", *name.split()).stdout.splitlines())
    assert 70 < longest < 80 or (columns == "120" and 100 < longest < 120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # misspelt options
        (["--lisen", "x"], "unknown option --lisen; did you mean --listen?"),
        (["--list", "h:1"], "unknown option --list; did you mean --listen?"),
        (["--qqq"], "unknown option --qqq; `echod --help` lists the options"),
        (["-x"], "unknown option -x; `echod --help` lists the options"),
        (["-xyz=3"], "unknown option -x; `echod --help` lists the options"),
        (["--a\nb"], "unknown option --a\\nb; "),
        (["-help"], "unknown option -help; did you mean --help?"),
        (["-version"], "unknown option -version; did you mean --version?"),
        (["--idle-timeout", "5"], "unknown option --idle-timeout; did you mean --limits.idle-timeout?"),
        (["--idle_timout=5"], "unknown option --idle_timout; did you mean --limits.idle-timeout?"),
        (["--delay", "5"], "unknown option --delay; did you mean --shutdown.delay or --faults.NAME.delay?"),
        (["--private-key", "x"], "unknown option --private-key; did you mean --listeners.NAME.tls.private-key?"),
        (["--timeout=5"], "unknown option --timeout; did you mean --limits.idle-timeout or --shutdown.drain-timeout?"),
        (["--log_level", "x"], "unknown option --log_level; did you mean --log.level?"),
        (["--limits", "3"], "unknown option --limits; name a key of the section, as in --limits.max-connections"),
        (["--faults=3"], "unknown option --faults; name a key of the section, as in --faults.NAME.trigger"),
        # options of other servers
        (
            ["--port", "7"],
            "unknown option --port; write the address alone: `echod 8000` listens on 127.0.0.1, `echod :8",
        ),
        (["-p7"], "unknown option -p; write the address alone"),
        (["-port", "7"], "unknown option -p; write the address alone"),
        (["--host=h", "7"], "unknown option --host; write the address alone"),
        (["--bind", "h:7"], "unknown option --bind; write the address alone"),
        (["-v"], "unknown option -v; write --log.level debug for a more detailed log, or -V for the version"),
        (["--cert=x"], "unknown option --cert; did you mean --listeners.NAME.tls.certificate?"),
        (["--tls"], "unknown option --tls; write --listeners.NAME.address, --listeners.NAME.tls.certificate and"),
        # values
        (["--listen"], "--listen needs a value: write --listen ADDRESS"),
        (["-l"], "--listen needs a value: write --listen ADDRESS"),
        (["check", "-c"], "--config needs a value: write --config FILE"),
        (["--log.file", "--loop"], "--log.file needs a value: write --log.file FILE"),
        (["--log.level"], "--log.level needs a value: write --log.level {debug,info,warning,error}"),
        (["--limits.backlog"], "--limits.backlog needs a value: write --limits.backlog N"),
        (["--limits.idle_timeout"], "--limits.idle_timeout needs a value: write --limits.idle_timeout VALUE"),
        (["--faults.a.b"], "--faults.a.b needs a value: write --faults.a.b VALUE"),
        (["--help=check"], "--help takes no value"),
        (["-c", "a", "--config=b"], "--config is given twice, with 'a' and 'b': echod reads one file"),
        # words that are neither commands nor addresses
        (["chekc"], "'chekc' is neither a command nor an address; did you mean check?"),
        (["serv", "--help"], "'serv' is neither a command nor an address; did you mean serve?"),
        (["echo.toml", "8000"], "'echo.toml' is not an address; write --config 'echo.toml' for a settings file"),
        (["localhost", "8000"], "'localhost' is not an address; did you mean localhost:8000?"),
        (["serve", "127.0.0.1", "8000"], "'127.0.0.1' is not an address; did you mean 127.0.0.1:8000?"),
        (["serv", "8000"], "'serv' is neither a command nor an address; did you mean serve?"),
        (
            ["start"],
            "'start' is neither a command (serve, check, config, probe, completion, help, version) nor an address,",
        ),
        ([""], "'' is neither a command"),
        (
            ["check", "extra"],
            "'extra' is not an address, such as 8000, :8000, HOST:8000 or unix:PATH",
        ),
        (
            ["echo.toml"],
            "'echo.toml' is not an address; write --config 'echo.toml' for a settings file, 'unix:echo.toml'",
        ),
        (
            ["/run/x"],
            "'/run/x' is not an address; write --config '/run/x' for a settings file, 'unix:/run/x' for",
        ),
        (["8000", "check"], "'check' is a command: write only one command, and write it first"),
        (["serve", "check"], "'check' is a command: write only one command, and write it first"),
        (["--config", "x", "probe", "h:1"], "'probe' is a command that reads no settings: write `echod probe` first,"),
        (
            ["check", "version"],
            "'version' is a command that reads no settings: write `echod version` first, then its own",
        ),
        (["8000", "--", "-x"], "'-x' is neither a command"),
        (["70000"], "'127.0.0.1:70000': '70000' is not a port: use 0 to 65535"),
        (["7,٣"], "'127.0.0.1:٣': '٣' is not a port: use 0 to 65535"),
        (["8000", "h:http"], "'h:http': 'http' is not a port: use 0 to 65535"),
        (["::1"], "'::1': an IPv6 address needs brackets: write [V6]:PORT"),
    ],
)
def test_syntax_errors(command: Command, arguments: list[str], message: str) -> None:
    result = command(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    *usage, error = result.stderr.splitlines()
    assert usage == [
        "usage: echod [serve | check | config] [ADDRESS ...] [OPTION ...]",
        "       echod probe TARGET [OPTION ...]",
    ]
    assert error.startswith(f"echod: error: {message}")


def test_values_that_look_like_options(command: Command) -> None:
    """A negative number, and a text with a space, are values. Any other value with a dash needs the form with `=`."""
    words = [
        "--faults.a.trigger",
        "-x --y",
        "--faults.a.action",
        "raise",
        "--faults.b.trigger=-x",
        "--faults.b.action=raise",
    ]
    faults = tomllib.loads(command("config", *words).stdout)["faults"]
    assert [faults[name]["trigger"] for name in ("a", "b")] == ["-x --y", "-x"]
    result = command("check", "--limits.idle-timeout", "-5")
    assert result.returncode == 78
    assert result.stderr.startswith("echod: --limits.idle-timeout: limits.idle_timeout: ")


def test_repeated_address(command: Command) -> None:
    """An address that is given twice, with and without its host, is a problem with the settings."""
    result = command("check", "--listen", "127.0.0.1:8000", "8000")
    assert result.returncode == 78
    assert result.stderr.startswith("echod: command line: listen[1]: '127.0.0.1:8000' is already listened on")


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("--limits.idle-timout", "did you mean --limits.idle-timeout?"),
        ("--limits.idle_timout", "did you mean --limits.idle-timeout?"),
        ("--limts.idle-timeout", "did you mean --limits.idle-timeout?"),
        ("--shutdown.timeout", "did you mean --shutdown.drain-timeout?"),
        ("--log.Idle-Timeout", "did you mean --limits.idle-timeout?"),
        ("--log.backlog", "did you mean --limits.backlog?"),
        ("--faults.My_a.delai", "did you mean --faults.My_a.delay?"),
        ("--listeners.a.delay", "did you mean --shutdown.delay or --faults.NAME.delay?"),
        ("--listeners.a.tls.key", "did you mean --listeners.a.tls.private-key?"),
        ("--admin.colour", "use one of: --admin.address"),
        ("--colour.x", "`echod --help` lists the options"),
    ],
)
def test_unknown_keys(command: Command, option: str, advice: str) -> None:
    """An option with an unknown key is a problem with the settings, as in a file. The advice is an option."""
    result = command("check", option, "5")
    assert result.returncode == 78
    assert f"unknown key; {advice}\n" in result.stderr
    assert result.stderr.startswith(f"echod: {option}: ")
