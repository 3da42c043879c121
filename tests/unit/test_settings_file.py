"""The settings file: its encoding, its syntax, and values as they are written in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from echod.settings.problems import SettingsError, validate
from echod.settings.sources import load
from loading import loaded, problems

if TYPE_CHECKING:
    from pathlib import Path

    from loading import Write

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("no_settings_in_the_environment")]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["no-mark", "mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_byte_order_mark_and_line_endings(tmp_path: Path, mark: bytes, end: bytes) -> None:
    """Both are accepted, and change neither the lines nor the columns of problems."""
    path = tmp_path / "echo.toml"
    path.write_bytes(mark + end.join([b"[limits]", b"backlog = 3", b""]))
    result = loaded(config=str(path))
    assert result.settings.limits.backlog == 3
    assert result.origins["limits", "backlog"] == f"{path}:2"
    path.write_bytes(mark + end.join([b"[limits]", b"backlog = 0", b""]))
    assert problems(config=str(path), places=True) == ["FILE:2: limits.backlog: should be at least 1, not 0"]
    path.write_bytes(mark + b"a = !" + end)
    assert problems(config=str(path), places=True)[0].startswith("FILE:1:5: is not TOML: Invalid value")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["no-mark", "mark"])
def test_other_encodings(tmp_path: Path, mark: bytes) -> None:
    """The problem names the line and the column of the byte that is not UTF-8."""
    path = tmp_path / "echo.toml"
    path.write_bytes(mark + "# a\r\n# déjà\n".encode("latin-1"))
    message = "is not UTF-8 text, because of the byte 0xe9: save the file as UTF-8"
    assert problems(config=str(path), places=True) == [f"FILE:2:4: {message}"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a = [", "FILE:1: is not TOML: Invalid value, at the end of the file"),
        ("[log]\n\na = [\n\n", "FILE:3: is not TOML: Invalid value, at the end of the file"),
        ("[limits]\nbacklog = = 3", "FILE:2:11: is not TOML: Invalid value"),
        ("[log]\nlevel = 'a' 'b'\n", "FILE:2:13: is not TOML: Expected newline or end of document after a statement"),
        ("backlog = 1\nbacklog = 2\nx = 1", "FILE:2:12: is not TOML: this key has a value already"),
        ('level = "info\nx = 1', "FILE:1:14: is not TOML: this text has no closing quote"),
        ("level = 'info\nx = 'a'", "FILE:1:14: is not TOML: this text has no closing quote"),
        ("[a]\n[a]\n", "FILE:2:3: is not TOML: this table is defined already: add its keys there"),
        ("a.b = 1\n[a]\n", "FILE:2:3: is not TOML: this table is defined already: add its keys there"),
        ("a = {}\na.b = 1\n", "FILE:2:8: is not TOML: this table is defined already: add its keys there"),
        ("[log]\nlevel = debug\n", 'FILE:2:9: is not TOML: Invalid value: text needs quotes: write "debug"'),
        ("level = debug # x", 'FILE:1:9: is not TOML: Invalid value: text needs quotes: write "debug"'),
        (
            "idle_timeout = 5m\nx = 1",
            (
                "FILE:1:17: is not TOML: Expected newline or end of document after a statement: text needs quotes: "
                'write "5m"'
            ),
        ),
        (
            "listen = 127.0.0.1:80\nx = 1",
            (
                "FILE:1:15: is not TOML: Expected newline or end of document after a statement: text needs quotes: "
                'write "127.0.0.1:80"'
            ),
        ),
        (
            "socket_mode = 0660\nx = 1",
            (
                "FILE:1:16: is not TOML: Expected newline or end of document after a statement: text needs quotes: "
                'write "0660"'
            ),
        ),
        ("x = 1\nx = 2\ny = 3", "FILE:2:6: is not TOML: this key has a value already"),
    ],
)
def test_syntax_errors(write: Write, text: str, line: str) -> None:
    """A syntax error has its line and column, and says which text lacks its quotes."""
    assert problems(config=write(text), places=True) == [line]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[log]\nconnections = true", 'log.connections: should be "all", "nonempty", "failed" or "none", not true'),
        ("[log]\nfile = 2020-01-01", 'log.file: should be text, not 2020-01-01: write "2020-01-01"'),
        ("[log]\nlevel = 1979-05-27T07:32:00Z", "log.level: should be {levels}, not 1979-05-27T07:32:00Z"),
        ("[limits]\nidle_timeout = 07:32:00", "limits.idle_timeout: should be {seconds}, not 07:32:00"),
        (
            "[limits]\nmax_connections = 0xFFFF_FFFF",
            "limits.max_connections: should be at most {count}, not 0xFFFF_FFFF",
        ),
        ("[limits]\nwrite_buffer = '2 GiB'", "limits.write_buffer: should be at most \"1GiB\", not '2 GiB'"),
        ("[limits]\nidle_timeout = 1e300", 'limits.idle_timeout: should be at most "8760h", not 1e300'),
        (
            "[limits]\nidle_timeout = '1000000000h'",
            "limits.idle_timeout: should be at most \"8760h\", not '1000000000h'",
        ),
        ("[limits]\nidle_timeout = -1", "limits.idle_timeout: should be at least 0, not -1"),
        ("[limits]\nwrite_timeout = '0s'", "limits.write_timeout: should be above 0, not '0s'"),
        ("[limits]\nbacklog = [\n1, true, 2020-01-01]", "limits.backlog: should be a whole number, not {list}"),
        (f"[limits]\nbacklog = '{'x' * 200}'", f"limits.backlog: should be a whole number, not '{'x' * 79}..."),
        (
            "[listeners.a]\naddress = 'unix:x'\nsocket_mode = 0o660",
            'listeners.a.socket_mode: should be text, not 0o660: write "0660"',
        ),
        (
            "[listeners.a]\naddress = 'unix:x'\nsocket_mode = 660",
            'listeners.a.socket_mode: should be text, not 660: write "660"',
        ),
        (
            "[listeners.a]\naddress = 'h:1'\ntls = {certificate = 'x', private_key = 'x', minimum_version = 1.2}",
            'listeners.a.tls.minimum_version: should be "1.2" or "1.3", not 1.2: write "1.2"',
        ),
        (
            "[listeners.a]\naddress = 'unix:x'\nsocket_mode = '888'",
            "listeners.a.socket_mode: should be permissions in octal such as \"0660\", not '888'",
        ),
        ("[admin]\naddress = 99999", "admin.address: '99999': '99999' is not a port: use 0 to 65535"),
    ],
)
def test_values_as_they_are_written(write: Write, text: str, line: str) -> None:
    """A problem shows the value as the file has it, and the quoted text to write instead."""
    expected = {
        "{levels}": '"debug", "info", "warning" or "error"',
        "{seconds}": 'seconds, or a duration such as "250ms", "10s", "5m" or "1h"',
        "{count}": "2147483647",
        "{list}": "[1, true, 2020-01-01]",
    }
    for name, value in expected.items():
        line = line.replace(name, value)
    assert problems(config=write(text)) == [f"FILE: {line}"]


def test_values_of_other_sources(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that overrides one of the file is shown, and not the one that the file has."""
    config = write("[limits]\nbacklog = 0x0\nmax_line = 0")
    monkeypatch.setenv("ECHOD_LIMITS__BACKLOG", "many")
    assert problems("--limits.max-line=x", "--loop=Twisted", config=config, places=True) == [
        '--loop: loop: should be "auto", "uvloop" or "asyncio", not "Twisted"',
        'ECHOD_LIMITS__BACKLOG: limits.backlog: should be a whole number, not "many"',
        "--limits.max-line: limits.max_line: 'x' is not a size: write bytes, or for example 64KiB",
    ]


def test_values_from_python() -> None:
    """A program may pass a value that TOML does not have."""
    with pytest.raises(SettingsError, match=r"^limits\.backlog: should be a whole number, not None$"):
        validate({"limits": {"backlog": None}}, {})


def test_pipe_whose_settings_are_in_force() -> None:
    """A pipe that provided values before is empty, and its problem says that it can be read only once."""
    receiver, sender = os.pipe()
    os.close(sender)
    file = f"/dev/fd/{receiver}"
    try:
        assert load({}, file, {("loop",): "--loop"}).origins == {}
        with pytest.raises(SettingsError, match=f"^{file}: is empty now: a pipe can be read only once"):
            load({}, file, {("limits", "backlog"): f"{file}:2"})
    finally:
        os.close(receiver)
