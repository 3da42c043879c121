"""The sources of the settings: their precedence, and the origins of values."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from echod.settings import toml
from echod.settings.model import Settings, leaves
from echod.settings.problems import SettingsError
from echod.settings.sources import load
from loading import UDP_FORMS, loaded, problems

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import BaseModel

    from loading import Write

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("no_settings_in_the_environment")]


def test_precedence(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line overrides the environment, that overrides the file, and that overrides the defaults."""
    config = write("[limits]\nidle_timeout = 1\nwrite_timeout = 2\nbacklog = 3\n")
    monkeypatch.setenv("ECHOD_LIMITS__IDLE_TIMEOUT", "10")
    monkeypatch.setenv("ECHOD_LIMITS__WRITE_TIMEOUT", "20")
    result = loaded("--limits.idle-timeout", "100", config=config)
    limits = result.settings.limits
    assert (limits.idle_timeout, limits.write_timeout, limits.backlog, limits.max_connections) == (100, 20, 3, 10_000)
    assert result.origins["limits", "idle_timeout"] == "--limits.idle-timeout"
    assert result.origins["limits", "write_timeout"] == "ECHOD_LIMITS__WRITE_TIMEOUT"
    assert result.origins["limits", "backlog"] == f"{config}:4"
    assert ("limits", "max_connections") not in result.origins


SAMPLES = {
    "loop": "asyncio",
    "workers": "4",
    "listen": "127.0.0.1:1",
    "limits.max_connections": "5",
    "limits.backlog": "6",
    "limits.idle_timeout": "7.5",
    "limits.write_timeout": "8",
    "limits.max_connections_per_client": "3",
    "limits.handshake_timeout": "4.5",
    "limits.write_buffer": "9KiB",
    "limits.max_line": "100",
    "limits.datagram_rate": "11",
    "limits.datagram_burst": "12",
    "limits.datagram_total_rate": "13",
    "limits.max_flows": "14",
    "limits.flow_timeout": "15.5",
    "shutdown.delay": "1",
    "shutdown.quiet_period": "2.5",
    "shutdown.drain_timeout": "3.5",
    "shutdown.linger_timeout": "4",
    "log.level": "debug",
    "log.format": "logfmt",
    "log.file": "x.log",
    "log.connections": "failed",
    "admin.address": "127.0.0.1:9",
}


def at(settings: BaseModel, name: str) -> Any:
    """Return the value of a dotted name."""
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_every_key_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both spellings of an option and the variable have the same effect, for every key."""
    assert {".".join(key) for key, _ in leaves()} == set(SAMPLES)
    for name, text in SAMPLES.items():
        by_option = at(loaded(f"--{name}", text).settings, name)
        by_dashes = at(loaded(f"--{name.replace('_', '-')}={text}").settings, name)
        with monkeypatch.context() as patch:
            patch.setenv("ECHOD_" + name.replace(".", "__").upper(), text)
            by_variable = at(loaded().settings, name)
        assert by_option == by_dashes == by_variable != at(Settings(), name)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("limits.idle_timeout", "250ms", 0.25),
        ("limits.handshake_timeout", "1h30m", 5400),
        ("shutdown.drain_timeout", "8760h", 365 * 24 * 3600),
        ("limits.write_buffer", "64k", 64_000),
        ("limits.max_line", "1.5MiB", 3 * 2**19),
        ("log.level", "WARNING", "warning"),
        ("log.format", "Logfmt", "logfmt"),
        ("log.connections", "ALL", "all"),
        ("loop", "AsyncIO", "asyncio"),
        ("workers", "AUTO", "auto"),
        ("workers", "1024", 1024),
    ],
)
def test_forms_of_values(write: Write, monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: object) -> None:
    """Durations and sizes with a unit, and choices in any case, are accepted from every source and are read back."""
    results = [loaded(f"--{name}", text), loaded(config=write(f'{name} = "{text}"'))]
    monkeypatch.setenv("ECHOD_" + name.replace(".", "__").upper(), text)
    results.append(loaded())
    monkeypatch.undo()
    results.append(loaded(config=write(toml.document(results[0].settings, {}))))
    assert [at(result.settings, name) for result in results] == [value] * 4


def test_size_as_a_whole_float(write: Write) -> None:
    """Helm writes large whole numbers as floats."""
    assert loaded(config=write("limits.write_buffer = 1.048576e+06")).settings.limits.write_buffer == 2**20


def test_listen(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--listen` may be repeated. Option and variable accept commas. A list replaces the list of another source."""
    config = write('listen = ["h:1", "h:2"]')
    assert loaded(config=config).settings.listen == ("h:1", "h:2")
    monkeypatch.setenv("ECHOD_LISTEN", "h:3, [::1]:4")
    assert loaded(config=config).settings.listen == ("h:3", "[::1]:4")
    assert loaded("--listen", "h:5", "--listen", "h:6, h:7", config=config).settings.listen == ("h:5", "h:6", "h:7")
    assert loaded(config=config).origins["listen",] == "ECHOD_LISTEN"


def test_the_last_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """If an option is repeated, even in another spelling, the last one counts."""
    monkeypatch.setenv("ECHOD_LIMITS__IDLE_TIMEOUT", "0")
    result = loaded("--limits.idle-timeout", "1", "--limits.idle_timeout=2")
    assert result.settings.limits.idle_timeout == 2
    assert result.origins["limits", "idle_timeout"] == "--limits.idle_timeout"


def test_named_tables(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named listeners are added to `listen`. Its default applies only without named listeners."""
    monkeypatch.setenv("ECHOD_FAULTS__BOOM__TRIGGER", "boom")
    monkeypatch.setenv("ECHOD_FAULTS__BOOM__ACTION", "raise")
    config = write('[listeners."a b"]\naddress = "h:1"\nfault = "boom"')
    options = ("--listeners.my-lab.address", "h:2")
    tables = loaded(*options, config=config).settings.all_listeners()
    assert {name: (table.address, table.fault) for name, table in tables.items()} == {
        "a b": ("h:1", "boom"),
        "my-lab": ("h:2", ""),
    }
    tables = loaded(*options, "--listen", "h:3", config=config).settings.all_listeners()
    assert list(tables) == ["h:3", "a b", "my-lab"]
    assert list(Settings().all_listeners()) == ["127.0.0.1:8000"]


def test_one_table_from_every_source(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named tables are merged from all sources. A variable's origin is its name as the user wrote it."""
    config = write('[faults.boom]\ntrigger = "file"\naction = "none such"\n[listeners.lab]\naddress = "h:1"')
    monkeypatch.setenv("ECHOD_FAULTS__BOOM__ACTION", "raise")
    monkeypatch.setenv("ECHOD_LISTENERS__Lab__FAULT", "boom")
    result = loaded("--faults.boom.trigger=-x", config=config)
    assert result.settings.faults["boom"].trigger == "-x"
    assert result.settings.listeners["lab"].fault == "boom"
    assert {key: origin for key, origin in result.origins.items() if len(key) == 3} == {
        ("faults", "boom", "trigger"): "--faults.boom.trigger",
        ("faults", "boom", "action"): "ECHOD_FAULTS__BOOM__ACTION",
        ("listeners", "lab", "address"): f"{config}:5",
        ("listeners", "lab", "fault"): "ECHOD_LISTENERS__Lab__FAULT",
    }


@pytest.mark.parametrize("text", ["123", "true", "null", '"quoted"', "[1]", '{"a": 1}'])
def test_variables_are_not_json(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """The value of a variable is plain text, even if it looks like JSON."""
    monkeypatch.setenv("ECHOD_FAULTS__BOOM__TRIGGER", text)
    monkeypatch.setenv("ECHOD_FAULTS__BOOM__ACTION", "raise")
    assert loaded().settings.faults["boom"].trigger == text
    assert loaded("--faults.boom.trigger", text).settings.faults["boom"].trigger == text


def test_unknown_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that Kubernetes injects for a service named echod are collected and cause no error."""
    monkeypatch.setenv("ECHOD_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("ECHOD_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("ECHOD_CONFIG", "")
    monkeypatch.setenv("ECHOD_LOOP__X", "1")  # loop is not a section
    monkeypatch.setenv("ECHOD_LISTEN__0", "h:1")
    monkeypatch.setenv("echod_loop", "asyncio")
    result = loaded()
    assert result.unknown_variables == {
        "ECHOD_LISTEN__0": "ECHOD_LISTEN",
        "ECHOD_LOOP__X": "ECHOD_LOOP",
        "ECHOD_PORT": "",
        "ECHOD_SERVICE_HOST": "",
    }
    assert (result.settings, result.origins) == (Settings(), {})


@pytest.mark.parametrize(
    ("variable", "text", "line"),
    [
        (
            "LISTEN",
            "",
            "listen[0]: '' has no port: write HOST:PORT, [V6]:PORT, :PORT, unix:PATH, unix:@NAME or systemd:NAME"
            + UDP_FORMS,
        ),
        (
            "LISTEN",
            "h:1,",
            "listen[1]: '' has no port: write HOST:PORT, [V6]:PORT, :PORT, unix:PATH, unix:@NAME or systemd:NAME"
            + UDP_FORMS,
        ),
        (
            "LISTEN",
            '["h:1"]',
            "listen[0]: '[\"h:1\"]' has no port: write HOST:PORT, [V6]:PORT, :PORT, unix:PATH, unix:@NAME or systemd:NAME"
            + UDP_FORMS,
        ),
        ("LISTEN", "h:1, H:1", "listen[1]: 'H:1' is already listened on: choose another address"),
        ("LOOP", "", 'loop: should be "auto", "uvloop" or "asyncio", not ""'),
        ("WORKERS", "many", 'workers: should be "auto" or a number, not "many"'),
        ("WORKERS", "0", 'workers: should be at least 1, not "0"'),
        ("WORKERS", "99999999999", 'workers: should be at most 1024, not "99999999999"'),
        (
            "LIMITS__IDLE_TIMEOUT",
            "",
            "limits.idle_timeout: '' is not a duration: write seconds, or for example 250ms, 10s, 5m or 1h",
        ),
        (
            "LIMITS__IDLE_TIMEOUT",
            "1 m",
            "limits.idle_timeout: '1 m' is not a duration: write seconds, or for example 250ms, 10s, 5m or 1h",
        ),
        ("LIMITS__WRITE_BUFFER", "", "limits.write_buffer: '' is not a size: write bytes, or for example 64KiB"),
        ("LIMITS__BACKLOG__X", "1", 'limits.backlog: should be a whole number, not {x = "1"}'),
        (
            "SHUTDOWN__",
            "1",
            'shutdown."": unknown key; use one of: delay, quiet_period, drain_timeout, linger_timeout',
        ),
        ("LIMITS__IDLE_TIMOUT", "1", "limits.idle_timout: unknown key; did you mean 'idle_timeout'?"),
        ("LIMITS", "{}", "is a section: set ECHOD_LIMITS__KEY for each key"),
        ("LISTENERS", "", "is a section: set ECHOD_LISTENERS__NAME__KEY for each key"),
        ("FAULTS__BOOM", '{"trigger": "x", "action": "raise"}', "faults.boom: should be a table"),
        ("LISTENERS__ADDRESS", "x", "listeners.address: should be a table; write ECHOD_LISTENERS__NAME__ADDRESS"),
        ("LISTENERS__A__FAULT", "x", "listeners.a.address: is missing"),
    ],
)
def test_bad_variables(monkeypatch: pytest.MonkeyPatch, variable: str, text: str, line: str) -> None:
    """Invalid variables are problems, and so are empty ones."""
    monkeypatch.setenv(f"ECHOD_{variable}", text)
    source, _, rest = problems()[0].partition(": ")
    assert rest == line
    assert f"ECHOD_{variable}".startswith(source)  # a missing key has no variable, so the source is its table's
    assert source.count("_") > 0


def test_table_replaces_a_value(write: Write) -> None:
    """A table on the command line replaces a value in the file."""
    assert loaded("--limits.backlog", "7", config=write("limits = 3")).settings.limits.backlog == 7


@pytest.mark.parametrize("text", ["[limits]\nbacklog = " + "9" * 5000, "x = " + "[" * 5000])
def test_documents_beyond_the_parser(write: Write, text: str) -> None:
    """Endless numbers and deep nesting are errors in the file, as any other syntax error."""
    (line,) = problems(config=write(text))
    assert line.startswith("FILE: is not TOML: ")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("log.file", 'log.file: should be UTF-8 text, not "\\udcff"'),
        ("faults.b.trigger", 'faults.b.trigger: should be UTF-8 text, not "\\udcff"'),
        (
            "listen",
            "listen[0]: '\\udcff' has no port: write HOST:PORT, [V6]:PORT, :PORT, unix:PATH, unix:@NAME or systemd:NAME"
            + UDP_FORMS,
        ),
    ],
)
def test_bytes_that_are_not_utf8(key: str, message: str) -> None:
    """The command line may contain any bytes, but a value must be UTF-8 text."""
    assert problems(f"--{key}", os.fsdecode(b"\xff"))[0] == f"--{key}: {message}"


def test_name_that_is_not_utf8() -> None:
    """The name of a table must be UTF-8 text too, and the problem is printable."""
    option = f"--faults.{os.fsdecode(bytes([255]))}"
    lines = problems(f"{option}.trigger=x", f"{option}.action=raise")
    assert len(lines) == 1
    assert lines[0].endswith('should be UTF-8 text, not "\\udcff"')
    assert lines[0].isprintable()


def test_empty_file_name() -> None:
    """An empty name, such as that of an unset shell variable, is a problem and does not mean "no file"."""
    with pytest.raises(SettingsError) as caught:
        load({}, "")
    assert str(caught.value) == "--config: names no file"


def test_pipe_as_file() -> None:
    """A pipe, as the shell passes it for `--config <(...)`, is read once."""
    receiver, sender = os.pipe()
    try:
        os.write(sender, b"[limits]\nbacklog = 3\n")
        os.close(sender)
        assert loaded(config=f"/dev/fd/{receiver}").settings.limits.backlog == 3
    finally:
        os.close(receiver)
    receiver, sender = os.pipe()
    try:
        os.write(sender, b"\n\n\na = [\n")
        os.close(sender)
        assert problems(config=f"/dev/fd/{receiver}") == ["FILE: is not TOML: Invalid value, at the end of the file"]
    finally:
        os.close(receiver)


def test_unreadable_files(tmp_path: Path) -> None:
    """An unreadable file is reported with the reason, together with the problems of other sources."""
    missing = str(tmp_path / "none.toml")
    assert problems("--limits.backlog=x", config=missing)[0] == "FILE: cannot be read: No such file or directory"
    assert len(problems("--limits.backlog=x", config=missing)) == 2
    assert problems(config=str(tmp_path)) == ["FILE: cannot be read: Is a directory"]
    binary = tmp_path / "binary"
    binary.write_bytes(b"x = 1\xff")
    assert problems(config=str(binary)) == ["FILE: is not UTF-8 text, because of the byte 0xff: save the file as UTF-8"]
