"""Problems and conflicts: every one is reported at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from echod.settings.model import FaultSettings, LimitsSettings
from loading import UDP_FORMS, loaded, problems

if TYPE_CHECKING:
    from loading import Write

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("no_settings_in_the_environment")]


def test_all_problems_at_once(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every problem of every source is a line with the source, the key and the valid values."""
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
    limits = f"use one of: {', '.join(LimitsSettings.model_fields)}"
    options = f"use one of: {', '.join(f'--limits.{name}' for name in LimitsSettings.model_fields)}".replace("_", "-")
    fault_options = f"use one of: {', '.join(f'--faults.b.{name}' for name in FaultSettings.model_fields)}".replace(
        "_", "-"
    )
    choices = (
        '"raise", "close", "reset", "half_close", "stall", "blackhole", "corrupt", "duplicate", "truncate" or "drop"'
    )
    assert problems("--limits.zz=4", "--log.file=", "--faults.b.when", "x", config=config, places=True) == [
        "ECHOD_LOG: is a section: set ECHOD_LOG__KEY for each key",
        "FILE:2: listen[0]: 'a' has no port: write HOST:PORT, [V6]:PORT, :PORT, unix:PATH, unix:@NAME or systemd:NAME"
        + UDP_FORMS,
        "FILE:2: listen[1]: 'h:70000': '70000' is not a port: use 0 to 65535",
        "FILE:7: limits.max_connections: should be a number, not true",
        'FILE:6: limits.backlog: should be a whole number, not "x"',
        "FILE:9: limits.idle_timeout: should be at least 0, not nan",
        "FILE:10: limits.write_timeout: should be above 0, not 0",
        "FILE:8: limits.write_buffer: '64 potatoes' is not a size: write bytes, or for example 64KiB",
        "FILE:5: limits.idle_timout: unknown key; did you mean 'idle_timeout'?",
        f"ECHOD_LIMITS__QUX: limits.qux: unknown key; {limits}",
        f"--limits.zz: limits.zz: unknown key; {options}",
        "ECHOD_SHUTDOWN__DELAY: shutdown.delay: 'abc' is not a duration: write seconds, or for example 250ms, 10s, 5m or 1h",
        'FILE:19: log.level: should be "debug", "info", "warning" or "error", not "loud"',
        '--log.file: log.file: should be the name of a file, not ""',
        f'FILE:12: faults.b.action: should be {choices}, not "zap"',
        f"--faults.b.when: faults.b.when: unknown key; {fault_options}",
        "FILE:16: listeners.r.address: is missing",
        'FILE:17: listeners.r.fault: should be text, not 3: write "3"',
        "FILE:3: colour: unknown key; use one of: loop, workers, listen, limits, shutdown, log, admin, faults, listeners",
        "FILE:2: listen[3]: 'h:1' is already listened on: choose another address",
        "FILE:14: listeners.q.address: 'h:1' is already listened on: choose another address",
        "FILE:15: listeners.q.fault: no fault is named 'bo'; did you mean 'b'?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "limits = 3\nlog = []\nlisteners = 4\nfaults = [1]",
            [
                "limits: should be a table",
                "log: should be a table",
                "faults: should be a table for each name: write [faults.NAME]",
                "listeners: should be a table for each name: write [listeners.NAME]",
            ],
        ),
        ("[limits.backlog]\nx = 3", []),
        ("listeners = {a = 3}", ["listeners.a: should be a table"]),
    ],
)
def test_tables_in_place_of_values(write: Write, text: str, expected: list[str]) -> None:
    """A value in place of a table is a problem, and so is a table in place of a value."""
    lines = problems(config=write(text))
    assert [line for line in lines if "should be a table" in line] == [f"FILE: {line}" for line in expected]
    if not expected:
        assert lines == ["FILE: limits.backlog: should be a whole number, not {x = 3}"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("listen = []", "FILE: listen: there is no address to listen on: add one here or in a table [listeners.NAME]"),
        ("listen = 3", "FILE: listen[0]: '3' is a port without a host: write 127.0.0.1:3, or :3 for all addresses"),
        ("listen = {a = 3}", "FILE: listen: should be a list, not {a = 3}"),
        ("listen = [3]", "FILE: listen[0]: '3' is a port without a host: write 127.0.0.1:3, or :3 for all addresses"),
        (
            '[listeners.a]\naddress = "h:1"\nfault = "x"',
            "FILE: listeners.a.fault: no fault is named 'x'; none is defined",
        ),
        ('[listeners.a]\naddress = "h:1"\nfualt = "x"', "FILE: listeners.a.fualt: unknown key; did you mean 'fault'?"),
        (
            'listen = ["[::1]:1", "[0::1]:1"]',
            "FILE: listen[1]: '[0::1]:1' is already listened on: choose another address",
        ),
        ('listen = ["h:0", "H:0"]', "FILE: listen[1]: 'H:0' is already listened on: choose another address"),
        (
            'listen = ["h:1"]\n[listeners."h:1"]\naddress = "h:2"',
            'FILE: listeners."h:1": this name belongs to an address in listen: choose another name',
        ),
        (
            '[admin]\naddress = "127.0.0.1"',
            "FILE: admin.address: '127.0.0.1' has no port: write HOST:PORT, [V6]:PORT, :PORT, unix:PATH or unix:@NAME",
        ),
        (
            '[admin]\naddress = "systemd:admin"',
            (
                "FILE: admin.address: 'systemd:admin': the admin listener cannot use inherited sockets: "
                "write HOST:PORT, [V6]:PORT, :PORT, unix:PATH or unix:@NAME"
            ),
        ),
        (
            "[admin]\naddress = 9000",
            "FILE: admin.address: '9000' is a port without a host: write 127.0.0.1:9000, or :9000 for all addresses",
        ),
        (
            'listen = ["h:1"]\n[admin]\naddress = "H:1"',
            "FILE: admin.address: 'H:1' is already listened on: choose another address",
        ),
        (
            '[listeners.admin]\naddress = "h:1"\n[admin]\naddress = "h:2"',
            "FILE: listeners.admin: this name belongs to admin.address: choose another name",
        ),
        ("[limits]\nbacklog = 0", "FILE: limits.backlog: should be at least 1, not 0"),
        (
            "[limits]\nbacklog = 1.5",
            "FILE: limits.backlog: should be a whole number, not 1.5",
        ),
        (
            "[limits]\nbacklog = 2147483648",
            "FILE: limits.backlog: should be at most 2147483647, not 2147483648",
        ),
        (
            "[limits]\nmax_connections = 1000000000000000000000",
            "FILE: limits.max_connections: should be at most 2147483647, not 1000000000000000000000",
        ),
        ("[limits]\nwrite_buffer = 0", 'FILE: limits.write_buffer: should be at least "1B", not 0'),
        (
            "[limits]\nwrite_buffer = '2GiB'",
            "FILE: limits.write_buffer: should be at most \"1GiB\", not '2GiB'",
        ),
        (
            "[limits]\nwrite_buffer = inf",
            'FILE: limits.write_buffer: should be bytes, or a size such as "64KiB", not inf',
        ),
        ("[limits]\nwrite_buffer = -5", 'FILE: limits.write_buffer: should be at least "1B", not -5'),
        (
            "[limits]\nwrite_buffer = []",
            'FILE: limits.write_buffer: should be bytes, or a size such as "64KiB", not []',
        ),
        (
            "[limits]\nwrite_buffer = true",
            'FILE: limits.write_buffer: should be bytes, or a size such as "64KiB", not true',
        ),
        (
            "[limits]\nidle_timeout = true",
            'FILE: limits.idle_timeout: should be seconds, or a duration such as "250ms", "10s", "5m" or "1h", not true',
        ),
        ("[limits]\nidle_timeout = -0.5", "FILE: limits.idle_timeout: should be at least 0, not -0.5"),
        ("[limits]\nidle_timeout = inf", 'FILE: limits.idle_timeout: should be at most "8760h", not inf'),
        ('[log]\nfile = "a\\u0000b"', 'FILE: log.file: should be the name of a file, not "a\\u0000b"'),
        ("[log]\nfile = 1", 'FILE: log.file: should be text, not 1: write "1"'),
        (
            '[faults.a]\naction = "raise"\ntrigger = ""',
            'FILE: faults.a.trigger: should have at least 1 character, not ""',
        ),
        (
            '"a\\nb" = 1',
            'FILE: "a\\nb": unknown key; use one of: loop, workers, listen, limits, shutdown, log, admin, faults, listeners',
        ),
        ("a = [", "FILE: is not TOML: Invalid value, at the end of the file"),
        ("[limits]\nbacklog = = 3", "FILE: is not TOML: Invalid value"),
        (
            "[limits]\nbacklog = 1\nbacklog = 2",
            "FILE: is not TOML: this key has a value already, at the end of the file",
        ),
    ],
)
def test_single_problems(write: Write, text: str, line: str) -> None:
    """The only problem of the file is reported alone."""
    assert problems(config=write(text)) == [line]


NO_ECHO = (
    "ends the echo at the first message, so no echo is left to delay, slow or slice: set trigger, after_bytes, "
    "after_seconds or probability, or remove delay, rate and slice"
)

NO_CHANCE = "has no effect without probability, jitter or action = 'corrupt': nothing else is random"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('trigger = "x"', "action: is missing: without action, delay, rate or slice, a fault does nothing"),
        ("delay = 1\njitter = 1.5", "jitter: varies the delay, so it cannot be greater than delay"),
        ('action = "close"\njitter = 1', "jitter: varies the delay, so it cannot be greater than delay"),
        ('action = "close"\nseed = 1', f"seed: {NO_CHANCE}"),
        ('action = "close"\ndelay = 1', f"action: {NO_ECHO}"),
        ('action = "stall"\nrate = 1', f"action: {NO_ECHO}"),
        ('action = "blackhole"\nslice = 1\nafter_seconds = 0', f"action: {NO_ECHO}"),
        ('action = "raise"\nslice = 1\nprobability = 1', f"action: {NO_ECHO}"),
        ('action = "close"\nprobability = 0', "probability: should be above 0, not 0"),
        ('action = "close"\nprobability = 1.5', "probability: should be at most 1, not 1.5"),
        ('action = "close"\nafter_bytes = 0', 'after_bytes: should be at least "1B", not 0'),
        ('action = "close"\nafter_seconds = nan', "after_seconds: should be at least 0, not nan"),
        ("rate = 0", 'rate: should be at least "1B", not 0'),
        ("slice = true", 'slice: should be bytes, or a size such as "64KiB", not true'),
        ("delay = -1", "delay: should be at least 0, not -1"),
    ],
)
def test_useless_faults(write: Write, text: str, line: str) -> None:
    """Values of a fault that are invalid or have no effect are problems."""
    assert problems(config=write(f"[faults.a]\n{text}")) == [f"FILE: faults.a.{line}"]


@pytest.mark.parametrize(
    ("fault", "listener", "line"),
    [
        *(
            (
                f'action = "close"\ntrigger = {trigger}',
                'address = "h:1"\nmode = "line"',
                "never fires: in mode line, its trigger must be one line with a line feed at its end",
            )
            for trigger in (r'"x"', r'"x\n\n"', r'"\nx"')
        ),
        (
            'action = "reset"',
            'address = "unix:x"',
            "has action = 'reset', and a unix socket cannot send RST: choose close",
        ),
        (
            "delay = 1",
            'address = "h:1"\nmode = "info"',
            "has no effect in mode info, which does not echo: choose stream or line",
        ),
    ],
)
def test_faults_that_a_listener_cannot_show(write: Write, fault: str, listener: str, line: str) -> None:
    """A fault that one listener can show may be impossible for another listener."""
    text = f'[faults.a]\n{fault}\n[listeners.right]\naddress = "h:2"\nfault = "a"'
    loaded(config=write(text))
    text += f'\n[listeners.wrong]\n{listener}\nfault = "a"'
    assert problems(config=write(text)) == [f"FILE: listeners.wrong.fault: {line}"]


def test_all_problems_of_a_fault_at_once(write: Write) -> None:
    """Each conflict within a fault is reported with its key, for each fault."""
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
    nothing = "is missing: without action, delay, rate or slice, a fault does nothing"
    assert problems(config=config) == [
        f"FILE: faults.{name}.{line}"
        for name in "ab"
        for line in (f"action: {nothing}", "jitter: varies the delay, so it cannot be greater than delay")
    ]


def test_free_ports_are_not_duplicates(write: Write) -> None:
    """Listeners with different names may both use port 0, which takes another free port each time."""
    config = write('[listeners.a]\naddress = "h:0"\n[listeners.b]\naddress = "h:0"')
    assert list(loaded(config=config).settings.all_listeners()) == ["a", "b"]
