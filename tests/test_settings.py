"""The settings: their sources, precedence and origins, and every problem told at once."""

from __future__ import annotations

import importlib.util
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import pytest

from echod import render
from echod.options import parse
from echod.settings import FaultSettings, LimitsSettings, Settings, leaves
from echod.sources import Loaded, SettingsError, load

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel

    from echod.settings import Key

    Write = Callable[[str], str]

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what the person who runs the tests may have set."""
    for name in list(os.environ):
        if name.startswith("ECHOD_"):
            monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes the file and gives its name."""
    path = tmp_path / "echo.toml"

    def write(text: str) -> str:
        path.write_text(text)
        return str(path)

    return write


def loaded(*arguments: str, config: str | None = None) -> Loaded:
    """Return the settings of a command line."""
    line = parse([*arguments, *(("--config", config) if config else ())])
    return load(line.options, line.config)


def problems(*arguments: str, config: str | None = None) -> list[str]:
    """Return what is wrong with the settings of a command line."""
    with pytest.raises(SettingsError) as caught:
        loaded(*arguments, config=config)
    lines = [str(problem) for problem in caught.value.problems]
    assert str(caught.value) == "\n".join(lines)
    return [line.replace(config, "FILE") if config else line for line in lines]


def test_precedence(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line is over the environment, that over the file, and that over the defaults; origins say which."""
    config = write("[limits]\nidle_timeout = 1\nwrite_timeout = 2\nbacklog = 3\n")
    monkeypatch.setenv("ECHOD_LIMITS__IDLE_TIMEOUT", "10")
    monkeypatch.setenv("ECHOD_LIMITS__WRITE_TIMEOUT", "20")
    result = loaded("--limits.idle-timeout", "100", config=config)
    limits = result.settings.limits
    assert (limits.idle_timeout, limits.write_timeout, limits.backlog, limits.max_connections) == (100, 20, 3, 10_000)
    assert result.origins["limits", "idle_timeout"] == "--limits.idle-timeout"
    assert result.origins["limits", "write_timeout"] == "ECHOD_LIMITS__WRITE_TIMEOUT"
    assert result.origins["limits", "backlog"] == config
    assert ("limits", "max_connections") not in result.origins


SAMPLES = {
    "loop": "asyncio",
    "listen": "127.0.0.1:1",
    "limits.max_connections": "5",
    "limits.backlog": "6",
    "limits.idle_timeout": "7.5",
    "limits.write_timeout": "8",
    "limits.max_connections_per_client": "3",
    "limits.handshake_timeout": "4.5",
    "limits.write_buffer": "9KiB",
    "limits.max_line": "100",
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
    """Return the value at a dotted name."""
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_every_key_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key can be set on the command line, in both spellings, and in the environment, to the same effect."""
    assert {".".join(key) for key, _ in leaves()} == set(SAMPLES)
    for name, text in SAMPLES.items():
        by_option = at(loaded(f"--{name}", text).settings, name)
        by_dashes = at(loaded(f"--{name.replace('_', '-')}={text}").settings, name)
        with monkeypatch.context() as patch:
            patch.setenv("ECHOD_" + name.replace(".", "__").upper(), text)
            by_variable = at(loaded().settings, name)
        assert by_option == by_dashes == by_variable != at(Settings(), name)


def test_listen(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--listen` repeats; variable and option take commas; one source's list replaces another's."""
    config = write('listen = ["h:1", "h:2"]')
    assert loaded(config=config).settings.listen == ("h:1", "h:2")
    monkeypatch.setenv("ECHOD_LISTEN", "h:3, [::1]:4")
    assert loaded(config=config).settings.listen == ("h:3", "[::1]:4")
    assert loaded("--listen", "h:5", "--listen", "h:6, h:7", config=config).settings.listen == ("h:5", "h:6", "h:7")
    assert loaded(config=config).origins["listen",] == "ECHOD_LISTEN"


def test_the_last_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an option given twice, in whichever spelling, the last counts."""
    monkeypatch.setenv("ECHOD_LIMITS__IDLE_TIMEOUT", "0")
    result = loaded("--limits.idle-timeout", "1", "--limits.idle_timeout=2")
    assert result.settings.limits.idle_timeout == 2
    assert result.origins["limits", "idle_timeout"] == "--limits.idle_timeout"


def test_named_tables(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listeners and faults have names; tables add to `listen`, whose default applies only without them."""
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
    """Sources put a table of a name together; a variable's name is told as it was written."""
    config = write('[faults.boom]\ntrigger = "file"\naction = "none such"\n[listeners.lab]\naddress = "h:1"')
    monkeypatch.setenv("ECHOD_FAULTS__BOOM__ACTION", "raise")
    monkeypatch.setenv("ECHOD_LISTENERS__Lab__FAULT", "boom")
    result = loaded("--faults.boom.trigger=-x", config=config)
    assert result.settings.faults["boom"].trigger == "-x"
    assert result.settings.listeners["lab"].fault == "boom"
    assert {key: origin for key, origin in result.origins.items() if len(key) == 3} == {
        ("faults", "boom", "trigger"): "--faults.boom.trigger",
        ("faults", "boom", "action"): "ECHOD_FAULTS__BOOM__ACTION",
        ("listeners", "lab", "address"): config,
        ("listeners", "lab", "fault"): "ECHOD_LISTENERS__Lab__FAULT",
    }


@pytest.mark.parametrize("text", ["123", "true", "null", '"quoted"', "[1]", '{"a": 1}'])
def test_a_variable_is_no_json(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A variable's value is the text as it is written, whatever it looks like."""
    monkeypatch.setenv("ECHOD_FAULTS__BOOM__TRIGGER", text)
    monkeypatch.setenv("ECHOD_FAULTS__BOOM__ACTION", "raise")
    assert loaded().settings.faults["boom"].trigger == text
    assert loaded("--faults.boom.trigger", text).settings.faults["boom"].trigger == text


def test_unknown_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Kubernetes injects for a service named echod is remarked, and no error."""
    monkeypatch.setenv("ECHOD_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("ECHOD_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("ECHOD_CONFIG", "")
    monkeypatch.setenv("ECHOD_LOOP__X", "1")  # loop is no section, so this is nobody's
    monkeypatch.setenv("ECHOD_LISTEN__0", "h:1")
    monkeypatch.setenv("echod_loop", "asyncio")
    result = loaded()
    assert result.unknown_variables == ("ECHOD_LISTEN__0", "ECHOD_LOOP__X", "ECHOD_PORT", "ECHOD_SERVICE_HOST")
    assert (result.settings, result.origins) == (Settings(), {})


@pytest.mark.parametrize(
    ("variable", "text", "line"),
    [
        (
            "LISTEN",
            "",
            "listen.0: '' has no port: write HOST:PORT, [V6]:PORT, :PORT, unix:PATH, unix:@NAME or systemd:NAME",
        ),
        (
            "LISTEN",
            "h:1,",
            "listen.1: '' has no port: write HOST:PORT, [V6]:PORT, :PORT, unix:PATH, unix:@NAME or systemd:NAME",
        ),
        (
            "LISTEN",
            '["h:1"]',
            "listen.0: '[\"h:1\"]' has no port: write HOST:PORT, [V6]:PORT, :PORT, unix:PATH, unix:@NAME or systemd:NAME",
        ),
        ("LISTEN", "h:1, H:1", "listen: 'H:1' is listened on already"),
        ("LOOP", "", "loop: should be 'auto', 'uvloop' or 'asyncio', not ''"),
        ("LIMITS__IDLE_TIMEOUT", "", "limits.idle_timeout: should be a valid number, not ''"),
        ("LIMITS__IDLE_TIMEOUT", "1m", "limits.idle_timeout: should be a valid number, not '1m'"),
        ("LIMITS__WRITE_BUFFER", "", "limits.write_buffer: should be bytes, or a size like '64KiB', not ''"),
        ("LIMITS__BACKLOG__X", "1", "limits.backlog: should be a valid integer, not {'x': '1'}"),
        (
            "SHUTDOWN__",
            "1",
            "shutdown.: unknown key; there are: delay, quiet_period, drain_timeout, linger_timeout",
        ),
        ("LIMITS__IDLE_TIMOUT", "1", "limits.idle_timout: unknown key; did you mean 'idle_timeout'?"),
        ("LIMITS", "{}", "is a section: set ECHOD_LIMITS__KEY for each key"),
        ("LISTENERS", "", "is a section: set ECHOD_LISTENERS__KEY for each key"),
        ("FAULTS__BOOM", '{"trigger": "x", "action": "raise"}', "faults.boom: should be a table"),
        ("LISTENERS__A__FAULT", "x", "listeners.a.address: is missing"),
    ],
)
def test_bad_variables(monkeypatch: pytest.MonkeyPatch, variable: str, text: str, line: str) -> None:
    """One that is set to nothing is a mistake like any other."""
    monkeypatch.setenv(f"ECHOD_{variable}", text)
    source, _, rest = problems()[0].partition(": ")
    assert rest == line
    assert f"ECHOD_{variable}".startswith(source)  # a key that is missing has no variable, but its table has
    assert source.count("_") > 0


def test_all_problems_at_once(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each problem of each source is one line, which names the source, the key, and what would be right."""
    monkeypatch.setenv("ECHOD_LIMITS__QUX", "1")
    monkeypatch.setenv("ECHOD_SHUTDOWN__DELAY", "abc")
    monkeypatch.setenv("ECHOD_LOG", "debug")
    config = write("""
listen = ["a", "h:70000", "h:1", "h:1"]
colour = "red"
[limits]
idle_timout = 3
backlog = "x"
max_connections = true
write_buffer = "64 potatoes"
idle_timeout = nan
write_timeout = 0
[faults.b]
action = "zap"
[listeners.q]
address = "h:1"
fault = "bo"
[listeners.r]
fault = 3
[log]
level = "loud"
""")
    limits = f"there are: {', '.join(LimitsSettings.model_fields)}"
    choices = "'raise', 'close', 'reset', 'half_close', 'stall', 'blackhole', 'corrupt', 'duplicate' or 'truncate'"
    assert problems("--limits.zz=4", "--log.file=", "--faults.b.when", "x", config=config) == [
        "ECHOD_LOG: is a section: set ECHOD_LOG__KEY for each key",
        "FILE: listen.0: 'a' has no port: write HOST:PORT, [V6]:PORT, :PORT, unix:PATH, unix:@NAME or systemd:NAME",
        "FILE: listen.1: 'h:70000': '70000' is no port: write a number from 0 to 65535",
        "FILE: limits.max_connections: should be a number, not True",
        "FILE: limits.backlog: should be a valid integer, not 'x'",
        "FILE: limits.idle_timeout: should be a finite number, not nan",
        "FILE: limits.write_timeout: should be greater than 0, not 0",
        "FILE: limits.write_buffer: should be bytes, or a size like '64KiB', not '64 potatoes'",
        "FILE: limits.idle_timout: unknown key; did you mean 'idle_timeout'?",
        f"ECHOD_LIMITS__QUX: limits.qux: unknown key; {limits}",
        f"--limits.zz: limits.zz: unknown key; {limits}",
        "ECHOD_SHUTDOWN__DELAY: shutdown.delay: should be a valid number, not 'abc'",
        "FILE: log.level: should be 'debug', 'info', 'warning' or 'error', not 'loud'",
        "--log.file: log.file: should be the name of a file, not ''",
        f"FILE: faults.b.action: should be {choices}, not 'zap'",
        f"--faults.b.when: faults.b.when: unknown key; there are: {', '.join(FaultSettings.model_fields)}",
        "FILE: listeners.r.address: is missing",
        "FILE: listeners.r.fault: should be a valid string, not 3",
        "FILE: colour: unknown key; there are: loop, listen, limits, shutdown, log, admin, faults, listeners",
        "FILE: listen: 'h:1' is listened on already",
        "FILE: listeners.q.address: 'h:1' is listened on already",
        "FILE: listeners.q.fault: no fault is named 'bo'; did you mean 'b'?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("limits = 3\nlog = []\nlisteners = 4\nfaults = [1]", ["limits", "log", "faults", "listeners"]),
        ("[limits.backlog]\nx = 3", []),
        ("listeners = {a = 3}", ["listeners.a"]),
    ],
)
def test_tables_and_values_mixed_up(write: Write, text: str, expected: list[str]) -> None:
    """A value where a table belongs, and the other way round."""
    lines = problems(config=write(text))
    assert [line for line in lines if "should be a table" in line] == [
        f"FILE: {key}: should be a table" for key in expected
    ]
    if not expected:
        assert lines == ["FILE: limits.backlog: should be a valid integer, not {'x': 3}"]


def test_table_over_a_value(write: Write) -> None:
    """A table on the command line replaces a value that the file has in its place."""
    assert loaded("--limits.backlog", "7", config=write("limits = 3")).settings.limits.backlog == 7


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("listen = []", "FILE: listen: there is no address to listen on"),
        ("listen = 3", "FILE: listen: should be a list, not 3"),
        ("listen = {a = 3}", "FILE: listen: should be a list, not {'a': 3}"),
        ("listen = [3]", "FILE: listen.0: should be a valid string, not 3"),
        (
            '[listeners.a]\naddress = "h:1"\nfault = "x"',
            "FILE: listeners.a.fault: no fault is named 'x'; there are none",
        ),
        ('[listeners.a]\naddress = "h:1"\nfualt = "x"', "FILE: listeners.a.fualt: unknown key; did you mean 'fault'?"),
        ('listen = ["[::1]:1", "[0::1]:1"]', "FILE: listen: '[0::1]:1' is listened on already"),
        ('listen = ["h:0", "H:0"]', "FILE: listen: 'H:0' is listened on already"),
        (
            'listen = ["h:1"]\n[listeners."h:1"]\naddress = "h:2"',
            "FILE: listeners.h:1: an address in listen has this name already",
        ),
        (
            '[admin]\naddress = "127.0.0.1"',
            "FILE: admin.address: '127.0.0.1' has no port: write HOST:PORT, [V6]:PORT, :PORT, unix:PATH or unix:@NAME",
        ),
        (
            '[admin]\naddress = "systemd:admin"',
            (
                "FILE: admin.address: 'systemd:admin': it opens its socket itself: "
                "write HOST:PORT, [V6]:PORT, :PORT, unix:PATH or unix:@NAME"
            ),
        ),
        ("[admin]\naddress = 9000", "FILE: admin.address: should be a valid string, not 9000"),
        (
            'listen = ["h:1"]\n[admin]\naddress = "H:1"',
            "FILE: admin.address: 'H:1' is listened on already",
        ),
        (
            '[listeners.admin]\naddress = "h:1"\n[admin]\naddress = "h:2"',
            "FILE: listeners.admin: admin.address has this name already",
        ),
        ("[limits]\nbacklog = 0", "FILE: limits.backlog: should be greater than or equal to 1, not 0"),
        (
            "[limits]\nbacklog = 1.5",
            "FILE: limits.backlog: should be a valid integer, got a number with a fractional part, not 1.5",
        ),
        (
            "[limits]\nbacklog = 2147483648",
            "FILE: limits.backlog: should be less than or equal to 2147483647, not 2147483648",
        ),
        (
            "[limits]\nmax_connections = 1000000000000000000000",
            "FILE: limits.max_connections: should be less than or equal to 2147483647, not 1000000000000000000000",
        ),
        ("[limits]\nwrite_buffer = 0", "FILE: limits.write_buffer: should be greater than or equal to 1, not 0"),
        (
            "[limits]\nwrite_buffer = '2GiB'",
            "FILE: limits.write_buffer: should be less than or equal to 1073741824, not '2GiB'",
        ),
        ("[limits]\nwrite_buffer = inf", "FILE: limits.write_buffer: should be bytes, or a size like '64KiB', not inf"),
        ("[limits]\nwrite_buffer = -5", "FILE: limits.write_buffer: should be bytes, or a size like '64KiB', not -5"),
        ("[limits]\nwrite_buffer = []", "FILE: limits.write_buffer: should be bytes, or a size like '64KiB', not []"),
        ("[limits]\nwrite_buffer = true", "FILE: limits.write_buffer: should be a number, not True"),
        ("[limits]\nidle_timeout = true", "FILE: limits.idle_timeout: should be a number, not True"),
        ("[limits]\nidle_timeout = -0.5", "FILE: limits.idle_timeout: should be greater than or equal to 0, not -0.5"),
        ("[limits]\nidle_timeout = inf", "FILE: limits.idle_timeout: should be a finite number, not inf"),
        ('[log]\nfile = "a\\u0000b"', "FILE: log.file: should be the name of a file, not 'a\\x00b'"),
        ("[log]\nfile = 1", "FILE: log.file: should be a valid string, not 1"),
        (
            '[faults.a]\naction = "raise"\ntrigger = ""',
            "FILE: faults.a.trigger: should have at least 1 character, not ''",
        ),
        (
            '"a\\nb" = 1',
            "FILE: a\\nb: unknown key; there are: loop, listen, limits, shutdown, log, admin, faults, listeners",
        ),
        ("a = [", "FILE: is not TOML: Invalid value (at line 1, the end of the file)"),
        ("[limits]\nbacklog = = 3", "FILE: is not TOML: Invalid value (at line 2, column 11)"),
        (
            "[limits]\nbacklog = 1\nbacklog = 2",
            "FILE: is not TOML: Cannot overwrite a value (at line 3, the end of the file)",
        ),
    ],
)
def test_single_problems(write: Write, text: str, line: str) -> None:
    assert problems(config=write(text)) == [line]


NO_ECHO = (
    "ends the echo at the first message, so there is none to delay, slow or slice: give it a trigger, after_bytes, "
    "after_seconds or probability, or leave out delay, rate and slice"
)
NO_CHANCE = "is of use with probability, jitter or action = 'corrupt' only: nothing else is left to chance"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('trigger = "x"', "action: is missing, and so are delay, rate and slice: such a fault does nothing"),
        ("delay = 1\njitter = 1.5", "jitter: is by how much delay differs, so it cannot be more than delay"),
        ('action = "close"\njitter = 1', "jitter: is by how much delay differs, so it cannot be more than delay"),
        ('action = "close"\nseed = 1', f"seed: {NO_CHANCE}"),
        ('action = "close"\ndelay = 1', f"action: {NO_ECHO}"),
        ('action = "stall"\nrate = 1', f"action: {NO_ECHO}"),
        ('action = "blackhole"\nslice = 1\nafter_seconds = 0', f"action: {NO_ECHO}"),
        ('action = "raise"\nslice = 1\nprobability = 1', f"action: {NO_ECHO}"),
        ('action = "close"\nprobability = 0', "probability: should be greater than 0, not 0"),
        ('action = "close"\nprobability = 1.5', "probability: should be less than or equal to 1, not 1.5"),
        ('action = "close"\nafter_bytes = 0', "after_bytes: should be greater than or equal to 1, not 0"),
        ('action = "close"\nafter_seconds = nan', "after_seconds: should be a finite number, not nan"),
        ("rate = 0", "rate: should be greater than or equal to 1, not 0"),
        ("slice = true", "slice: should be a number, not True"),
        ("delay = -1", "delay: should be greater than or equal to 0, not -1"),
    ],
)
def test_faults_that_make_no_sense(write: Write, text: str, line: str) -> None:
    assert problems(config=write(f"[faults.a]\n{text}")) == [f"FILE: faults.a.{line}"]


@pytest.mark.parametrize(
    ("fault", "listener", "line"),
    [
        *(
            (
                f'action = "close"\ntrigger = {trigger}',
                'address = "h:1"\nmode = "line"',
                "no message equals its trigger: in mode line that is one line, with the line feed at its end",
            )
            for trigger in (r'"x"', r'"x\n\n"', r'"\nx"')
        ),
        (
            'action = "reset"',
            'address = "unix:x"',
            "a unix socket has no RST that action = 'reset' could send: choose close",
        ),
        (
            "delay = 1",
            'address = "h:1"\nmode = "info"',
            "in mode info there is no echo that could be wrong: choose stream or line",
        ),
    ],
)
def test_faults_that_a_listener_cannot_show(write: Write, fault: str, listener: str, line: str) -> None:
    """The same fault may be right for another one."""
    text = f'[faults.a]\n{fault}\n[listeners.right]\naddress = "h:2"\nfault = "a"'
    loaded(config=write(text))
    text += f'\n[listeners.wrong]\n{listener}\nfault = "a"'
    assert problems(config=write(text)) == [f"FILE: listeners.wrong.fault: {line}"]


def test_all_problems_of_a_fault_at_once(write: Write) -> None:
    """What does not go together is told of key by key; other faults may have it, and a trigger is one listener's matter."""
    config = write("""
[faults.a]
jitter = 1
seed = 1
[faults.b]
jitter = 1
seed = 1
[faults.c]
trigger = "x"
action = "corrupt"
seed = 1
delay = 1
[listeners.c]
address = "h:1"
fault = "c"
""")
    nothing = "is missing, and so are delay, rate and slice: such a fault does nothing"
    assert problems(config=config) == [
        f"FILE: faults.{name}.{line}"
        for name in "ab"
        for line in (f"action: {nothing}", "jitter: is by how much delay differs, so it cannot be more than delay")
    ]


def test_free_ports_are_no_duplicates(write: Write) -> None:
    """Port 0 is another port each time, where the names differ."""
    config = write('[listeners.a]\naddress = "h:0"\n[listeners.b]\naddress = "h:0"')
    assert list(loaded(config=config).settings.all_listeners()) == ["a", "b"]


@pytest.mark.parametrize("text", ["[limits]\nbacklog = " + "9" * 5000, "x = " + "[" * 5000])
def test_what_the_parser_cannot_bear(write: Write, text: str) -> None:
    """Numbers without end and tables in tables in tables are an error in the file, as any other is."""
    (line,) = problems(config=write(text))
    assert line.startswith("FILE: is not TOML: ")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("log.file", "log.file: should be UTF-8 text, not '\\udcff'"),
        ("faults.b.trigger", "faults.b.trigger: should be a valid string, not '\\udcff'"),
        (
            "listen",
            "listen.0: '\\udcff' has no port: write HOST:PORT, [V6]:PORT, :PORT, unix:PATH, unix:@NAME or systemd:NAME",
        ),
    ],
)
def test_bytes_that_are_no_text(key: str, message: str) -> None:
    """The command line may hold any bytes; such a value is an error, since no document could hold it."""
    assert problems(f"--{key}", os.fsdecode(b"\xff"))[0] == f"--{key}: {message}"


def test_a_name_that_is_no_text() -> None:
    option = f"--faults.{os.fsdecode(bytes([255]))}"
    lines = problems(f"{option}.trigger=x", f"{option}.action=raise")
    assert len(lines) == 1
    assert lines[0].endswith("should be UTF-8 text, not '\\udcff'")
    assert lines[0].isprintable()


def test_no_file() -> None:
    """An empty name, as an unset variable of a shell gives it, does not stand for no file."""
    with pytest.raises(SettingsError) as caught:
        load({}, "")
    assert str(caught.value) == "--config: names no file"


def test_a_pipe_for_a_file() -> None:
    """What a shell gives for `--config <(...)` is read, and once."""
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
        assert problems(config=f"/dev/fd/{receiver}") == [
            "FILE: is not TOML: Invalid value (at line 5, the end of the file)"
        ]
    finally:
        os.close(receiver)


def test_unreadable_files(tmp_path: Path) -> None:
    """The file is named, with what is wrong with it; the other sources' problems are told of all the same."""
    missing = str(tmp_path / "none.toml")
    assert problems("--limits.backlog=x", config=missing)[0] == "FILE: cannot be read: No such file or directory"
    assert len(problems("--limits.backlog=x", config=missing)) == 2
    assert problems(config=str(tmp_path)) == ["FILE: cannot be read: Is a directory"]
    binary = tmp_path / "binary"
    binary.write_bytes(b"x = 1\xff")
    assert problems(config=str(binary)) == ["FILE: is not UTF-8 text: byte 5"]


@pytest.mark.parametrize("trigger", ["boom\r\n", 'quote " and \\', "tab\t\x7f\x00\x1f", "für 🎉", "#"])
def test_config_is_read_back(write: Write, trigger: str) -> None:
    """What `config` prints is TOML, says where each value is from, and gives the same settings."""
    settings = Settings(
        listen=("h:1", "[::1]:2"),
        limits={"write_buffer": "3MiB", "idle_timeout": 0.25},
        faults={
            "a b.c": {"trigger": trigger, "action": "raise"},
            "far": {"probability": 0.5, "seed": 3, "delay": 2, "jitter": 0.5, "rate": "1MiB", "slice": 10},
            "late": {"after_bytes": 1000, "after_seconds": 0, "action": "half_close"},
        },
        listeners={"x": {"address": "h:3", "fault": "a b.c"}},
    )
    text = render.toml(Loaded(settings, {("limits", "idle_timeout"): "ECHOD_X"}, ()))
    assert loaded(config=write(text)).settings == settings
    assert 'write_buffer = "3MiB"  # default' in text
    assert "idle_timeout = 0.25  # ECHOD_X" in text
    assert all(line.startswith("[") or "  # " in line for line in text.splitlines() if line)


def test_origins_cannot_break_the_document(tmp_path: Path, write: Write) -> None:
    """A file's name may hold anything; what `config` prints is read back nevertheless."""
    path = tmp_path / "odd\nname = 1.toml"
    path.write_text("[limits]\nbacklog = 3\n")
    text = render.toml(loaded(config=str(path)))
    assert loaded(config=write(text)).settings.limits.backlog == 3


@pytest.mark.parametrize(
    ("size", "text"), [(1, '"1B"'), (1000, '"1000B"'), (1024, '"1KiB"'), (1536, '"1536B"'), (1 << 30, '"1GiB"')]
)
def test_sizes(size: int, text: str) -> None:
    settings = Settings(limits={"write_buffer": size})
    assert render.value(settings.limits.write_buffer) == text
    assert Settings(limits={"write_buffer": tomllib.loads(f"x = {text}")["x"]}) == settings


def test_values_without_a_form() -> None:
    with pytest.raises(TypeError):
        render.value(None)


def test_example_file(write: Write) -> None:
    """config.example.toml has every key with its default, and its commented tables are right."""
    path = ROOT / "config.example.toml"
    result = loaded(config=str(path))
    assert result.settings == Settings()
    assert {key for key, _ in leaves()} <= set(result.origins)
    uncommented = re.sub(r"^# (?=\[|[a-z_]+ = )", "", path.read_text(), flags=re.MULTILINE)
    settings = loaded(config=write(uncommented)).settings
    assert settings.all_listeners()["127.0.0.1:8000"].fault == ""
    assert settings.listeners["boom"].fault == "boom"
    assert settings.faults["boom"].trigger == "boom\r\n"


def test_example_file_explains() -> None:
    """Above each key of config.example.toml stands what the model says of it, and what can be chosen."""
    comments: list[str] = []
    section: Key = ()
    found: dict[Key, str] = {}
    for line in (ROOT / "config.example.toml").read_text().splitlines():
        if line.startswith("# "):
            comments.append(line.removeprefix("# "))
            continue
        if line.startswith("["):
            section = (line.strip("[]"),)
        elif line:
            found[*section, line.partition(" = ")[0]] = " ".join(comments)
        comments.clear()
    expected = {}
    for key, field in leaves():
        choices = " | ".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else ""
        expected[key] = f"{field.description} {choices}".rstrip()
    assert found == expected


def test_reference_page() -> None:
    """docs/configuration.md is what `make docs` writes."""
    path = ROOT / "docs" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    assert spec is not None
    assert spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert path.with_name("configuration.md").read_text() == "\n".join(reference.page())
