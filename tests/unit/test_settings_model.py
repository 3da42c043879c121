"""The models: their imports, their derived values, and the conflicts between valid values."""

from __future__ import annotations

import subprocess
import sys
from ipaddress import ip_network
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from echod.net.addresses import TcpAddress, UnixAddress
from echod.settings.model import FaultSettings, ListenerSettings, Settings, changes
from harness import PATIENCE, clean_environment
from loading import UDP_FORMS, loaded, problems

if TYPE_CHECKING:
    from loading import Write

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("no_settings_in_the_environment")]


@pytest.mark.parametrize("module", ["echod.settings.model", "echod.settings.problems", "echod.server"])
def test_imports(module: str) -> None:
    """Model and server work without the modules that only the command needs."""
    code = f"import sys, {module}; print(*{{'pydantic_settings', 'argparse'}} & sys.modules.keys())"
    # Coverage measurement imports more modules itself.
    environment = {name: value for name, value in clean_environment().items() if not name.startswith("COVERAGE_")}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=True)
    assert result.stdout == "\n"


def test_derived_values_of_a_listener() -> None:
    """A listener returns its address, networks and permissions as values. Its fields keep the text."""
    listener = ListenerSettings(address="H:1", proxy_protocol="require", proxy_trusted=("10.0.0.1", "::/0"))
    assert listener.parsed_address == TcpAddress("h", 1)
    assert listener.trusted_networks == (ip_network("10.0.0.1/32"), ip_network("::/0"))
    assert listener.permissions == 0o660
    assert listener.model_dump()["proxy_trusted"] == ("10.0.0.1", "::/0")
    assert listener == ListenerSettings(address="H:1", proxy_protocol="require", proxy_trusted=("10.0.0.1", "::/0"))
    listener = ListenerSettings(address="unix:x", socket_mode="600")
    assert (listener.parsed_address, listener.permissions) == (UnixAddress("x"), 0o600)


def test_derived_values_of_a_fault() -> None:
    """A fault returns its trigger as bytes."""
    assert FaultSettings(trigger="ü", action="close").trigger_bytes == b"\xc3\xbc"
    assert FaultSettings(action="close").trigger_bytes is None


def test_frozen() -> None:
    """Settings cannot be changed."""
    with pytest.raises(ValidationError):
        Settings().loop = "asyncio"  # type: ignore[misc]


def test_invalid_values_do_not_hide_conflicts(write: Write) -> None:
    """Conflicts are reported together with wrong values, even with those of the same table."""
    config = write("""
listen = "x, h:1, h:1"
[limits]
backlog = "x"
[log]
level = 3
[admin]
address = "h:1"
port = 3
[faults.a]
seed = 1
slice = 0
delay = 1
[faults.b]
rate = "x"
jitter = 1
[listeners.a]
mode = "lines"
address = "h:1"
proxy_trusted = ["10.0.0.0/8"]
fault = "c"
[listeners.admin]
socket_mode = "0600"
fault = "c"
""")
    assert problems(config=config) == [
        "FILE: listen[0]: 'x' has no port: write HOST:PORT, [V6]:PORT, :PORT, unix:PATH, unix:@NAME or systemd:NAME"
        + UDP_FORMS,
        'FILE: limits.backlog: should be a whole number, not "x"',
        'FILE: log.level: should be "debug", "info", "warning" or "error", not 3',
        "FILE: admin.port: unknown key; did you mean 'address'?",
        'FILE: faults.a.slice: should be at least "1B", not 0',
        "FILE: faults.b.rate: 'x' is not a size: write bytes, or for example 64KiB",
        'FILE: listeners.a.mode: should be "stream", "line" or "info", not "lines"',
        "FILE: listeners.admin.address: is missing",
        "FILE: faults.a.seed: has no effect without probability, jitter or action = 'corrupt': nothing else is random",
        "FILE: faults.b.jitter: varies the delay, so it cannot be greater than delay",
        "FILE: listen[2]: 'h:1' is already listened on: choose another address",
        "FILE: listeners.a.address: 'h:1' is already listened on: choose another address",
        "FILE: admin.address: 'h:1' is already listened on: choose another address",
        "FILE: listeners.a.proxy_trusted: has no effect without proxy_protocol = 'require'",
        "FILE: listeners.a.fault: no fault is named 'c'; use one of: a, b",
        "FILE: listeners.admin: this name belongs to admin.address: choose another name",
        "FILE: listeners.admin.fault: no fault is named 'c'; use one of: a, b",
    ]


@pytest.mark.parametrize("key", ["", "limits.", "admin.", "faults.b.", "listeners.a.", "faults.", "listeners."])
def test_keys_that_are_not_utf8_do_not_hide_problems(key: str) -> None:
    """A key with invalid bytes is reported together with wrong values and conflicts in other sections."""
    lines = problems(f"--{key}\udcff.x=1", "--listen=h:1,h:1", "--shutdown.delay=x")
    assert 'not "\\udcff"' in "".join(lines)
    assert "--listen: listen[1]: 'h:1' is already listened on: choose another address" in lines
    # Pydantic validates no field of a table with such a key.
    assert (
        "--shutdown.delay: shutdown.delay: 'x' is not a duration: write seconds, or for example 250ms, 10s, 5m or 1h"
        in lines
        or not key
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("listen = ['x', 'y']", 2),
        ("listen = ['x']", 1),  # and there is an address to listen on
        ("listen = 3\n[admin]\naddress = '127.0.0.1:8000'", 1),
        ("listeners = {a = 3}", 1),
        ("[faults]\na = 3\n[listeners.a]\naddress = 'h:1'\nfault = 'a'", 1),  # and the fault has a name
        ("[faults.a]\naction = 'zap'", 1),  # and the action is not missing
        ("[faults.a]\njitter = 1\ndelay = 'x'\naction = 'close'", 1),
        ("[listeners.a]\naddress = 'h:1'\nproxy_protocol = 'on'\nproxy_trusted = ['10.0.0.0/8']", 1),
        ("[listeners.a]\naddress = 'x'\nsocket_mode = '0600'", 1),
        ("[listeners.a]\naddress = 'x'\n[listeners.b]\naddress = 'x'", 2),
        ("[listeners.a]\naddress = 'h:1'\nmode = 'x'\nproxy_trusted = ['10']\n[listeners.b.tls]\ncertificate = 1", 5),
    ],
)
def test_no_conflicts_with_invalid_values(write: Write, text: str, count: int) -> None:
    """An invalid value is one problem and causes no conflict with other values."""
    assert len(problems(config=write(text))) == count


def test_defaults_do_not_conflict(write: Write) -> None:
    """Defaults are accepted without effect, because `echod config` prints them, and in either form of a list."""
    text = "[listeners.a]\naddress = 'h:1'\nsocket_mode = '0660'\nproxy_trusted = '127.0.0.0/8, ::1/128'"
    assert loaded(config=write(text)).settings.listeners["a"] == ListenerSettings(address="h:1")


def test_changes() -> None:
    """Changed values are found in sections and in named tables, and so are the keys of a new table."""
    before = Settings(limits={"backlog": 1}, faults={"a": {"action": "close"}})
    after = Settings(limits={"backlog": 2}, faults={"a": {"action": "reset"}}, listeners={"x": {"address": "h:1"}})
    keys = list(changes(before, after))
    assert keys[:3] == [("listen",), ("limits", "backlog"), ("faults", "a", "action")]
    assert keys[3:] == [("listeners", "x", name) for name in ListenerSettings.model_fields]
    assert list(changes(after, after)) == []
