"""What systemd hears of the daemon, by a socket that stands in for it; and the units, as far as they can be read."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from echod.settings import Settings
from echod.systemd import Manager, Notifier, count, find_manager, message
from harness import PATIENCE, receive, run

if TYPE_CHECKING:
    from types import TracebackType

    from harness import Start

UNITS = Path(__file__).parent.parent / "packaging" / "systemd"

# A daemon whose loop stands still for two seconds where a client sends "stuck"; its other threads go on.
STUCK = """
import sys, time
from echod import cli, session
echo = session.EchoSession.data_received
def data_received(self, data):
    if data == b"stuck":
        time.sleep(2)
    echo(self, data)
session.EchoSession.data_received = data_received
sys.exit(cli.main())
"""

# A daemon with an inherited socket.
INHERITED = """
import os, socket, sys
listening = socket.create_server(("127.0.0.1", 0))
os.dup2(listening.fileno(), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="echo")
from echod import cli
sys.exit(cli.main())
"""

# A daemon whose standard error is what the journal reads.
JOURNAL = """
import os, sys
found = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{found.st_dev}:{found.st_ino}"
from echod import cli
sys.exit(cli.main())
"""


class FakeManager:
    """The end of NOTIFY_SOCKET that systemd has.

    Args:
        address: a path, or "@" and an abstract name.

    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.messages: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    @property
    def name(self) -> str:
        return "\0" + self.address[1:] if self.address.startswith("@") else self.address

    def receive(self, timeout: float = PATIENCE) -> dict[str, str]:
        """Return the next message, its fields by name."""
        self._socket.settimeout(timeout)
        fields = dict(line.split("=", 1) for line in self._socket.recv(4096).decode().splitlines())
        self.messages.append(fields)
        return fields

    def wait_for(self, name: str, value: str) -> dict[str, str]:
        """Return the next message with a field whose value begins like this."""
        while not (fields := self.receive()).get(name, "").startswith(value):
            pass
        return fields

    def rest(self) -> list[dict[str, str]]:
        """Return all messages that are there already."""
        found = []
        while select.select([self._socket], [], [], 0)[0]:
            found.append(self.receive())
        return found

    def hears_on(self, watchdog: float) -> bool:
        """Tell whether there comes message after message, none of them so many seconds after the one before."""
        with contextlib.suppress(TimeoutError):
            for _ in range(10):
                self.receive(watchdog)
            return True
        return False

    def fill(self) -> None:
        """Leave no room for another message."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(BlockingIOError):
            sender.setblocking(False)
            while True:
                sender.sendto(b"FILLING=1\n", self.name)


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    address = str(tmp_path / "notify") if request.param == "path" else f"@echod-test-{os.getpid()}-{id(tmp_path)}"
    with FakeManager(address) as manager:
        yield manager


def environment(manager: FakeManager, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": manager.address, **more}


def test_phases(start: Start, manager: FakeManager, tmp_path: Path) -> None:
    """Ready, reloading and ready again, stopping, and the receipt of the log: each is told of, in order."""
    config = tmp_path / "echod.toml"
    config.write_text("")
    daemon = start("--config", str(config), env=environment(manager))
    nothing = "0 clients now, 0 connections so far, 0 bytes received"
    assert manager.receive() == {"READY": "1", "STATUS": f"Serving: {nothing}"}
    daemon.echo(b"hello")
    daemon.wait_for("client_closed")

    config.write_text('log.connections = "all"')
    before = time.monotonic_ns()
    daemon.send_signal(signal.SIGHUP)
    reloading = manager.receive()
    assert (reloading["RELOADING"], reloading["STATUS"].partition(":")[0]) == ("1", "Reloading")
    assert before < int(reloading["MONOTONIC_USEC"]) * 1000 < time.monotonic_ns()
    done = "1 connection so far, 5 bytes received"
    ready = manager.receive()
    assert ready == {"READY": "1", "STATUS": f"Serving: 0 clients now, {done}; settings reloaded"}

    config.write_text("limits.backlog = 0\nlog.level = 'loud'\n")
    daemon.send_signal(signal.SIGHUP)
    manager.wait_for("RELOADING", "1")
    ready = manager.receive()
    problem = daemon.wait_for("reload_failed")["problems"][0]
    assert ready["READY"] == "1"
    assert ready["STATUS"] == f"Serving: 0 clients now, {done}; settings not reloaded, 2 problems: {problem}"

    assert daemon.stop() == 0
    stopping = manager.receive()
    assert (stopping["STOPPING"], stopping["STATUS"]) == ("1", f"Draining: 0 clients now, {done}")
    assert int(stopping["EXTEND_TIMEOUT_USEC"]) >= 10_000_000
    receipt = daemon.receipt()
    words = (f"{name}={value}" for name, value in receipt.items() if name not in {"timestamp", "level", "event"})
    assert manager.receive()["STATUS"] == f"Drained: {' '.join(words)}"
    assert manager.rest() == []


def test_log_file_that_cannot_be_reopened(start: Start, manager: FakeManager, tmp_path: Path) -> None:
    """A reload that fails at its last step, the opening of the log file, is told of too."""
    config, link = tmp_path / "echod.toml", tmp_path / "link"
    config.write_text("")
    daemon = start("--config", str(config), env=environment(manager))
    config.write_text(f"log.file = '{link}'")
    # The check finds no file and a folder that could take one; the opening finds where the link leads.
    link.symlink_to(tmp_path / "missing" / "target")
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("reload_failed")
    manager.wait_for("RELOADING", "1")
    assert "settings not reloaded, 1 problem: log.file" in manager.wait_for("READY", "1")["STATUS"]


def test_not_ready_before_all_listen(tmp_path: Path, loop_name: str) -> None:
    """Where one of two addresses cannot be had, READY is never said."""
    with FakeManager(str(tmp_path / "notify")) as manager, socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:0,127.0.0.1:{taken.getsockname()[1]}"
        result = run("--loop", loop_name, "--listen", listen, env=environment(manager))
        assert result.returncode == 69
        assert manager.rest() == []


def test_stopping_is_the_last_phase(start: Start, manager: FakeManager) -> None:
    """No reload is told of once the stop has begun."""
    daemon = start("--shutdown.quiet-period", "20", "--shutdown.drain-timeout", "20", env=environment(manager))
    with daemon.connect():
        manager.wait_for("STATUS", "Serving")
        daemon.send_signal(signal.SIGTERM)
        manager.wait_for("STOPPING", "1")
        daemon.send_signal(signal.SIGHUP)
        # A look at the clients each second, and more time asked for.
        for _ in range(2):
            fields = manager.receive()
            assert fields.keys() == {"STATUS", "EXTEND_TIMEOUT_USEC"}
            assert fields["STATUS"] == "Draining: 1 client now, 1 connection so far, 0 bytes received"
    assert daemon.wait() == 0
    manager.wait_for("STATUS", "Drained: clients=1 completed=1")
    assert all("READY" not in fields and "RELOADING" not in fields for fields in manager.messages[1:])


def test_numbers_are_live(start: Start, manager: FakeManager) -> None:
    """The status counts the bytes of clients that are connected, and of those that have gone."""
    daemon = start(env=environment(manager, WATCHDOG_USEC="150000"))
    daemon.echo(b"gone")
    with daemon.connect() as client:
        client.sendall(b"present")
        assert receive(client, 7) == b"present"
        manager.wait_for("STATUS", "Serving: 1 client now, 2 connections so far, 11 bytes received")


def test_watchdog_is_fed_by_the_loop(start: Start, manager: FakeManager) -> None:
    """A loop that stands still feeds no more, whatever other threads do; and one that turns does so in time."""
    daemon = start(env=environment(manager, WATCHDOG_USEC="600000"), module=("-c", STUCK))
    assert manager.receive()["WATCHDOG"] == "1"
    began = time.monotonic()
    for _ in range(5):
        assert manager.receive()["WATCHDOG"] == "1"
    assert time.monotonic() - began < 5 * 0.3 + 0.5
    with daemon.connect() as client:
        client.sendall(b"stuck")
        assert not manager.hears_on(0.6)
        assert receive(client, 5) == b"stuck"
        assert manager.receive()["WATCHDOG"] == "1"
        daemon.freeze()
        assert not manager.hears_on(0.6)
        daemon.send_signal(signal.SIGCONT)
        assert manager.receive()["WATCHDOG"] == "1"
    assert daemon.stop() == 0


@pytest.mark.parametrize(
    ("variables", "watchdog"),
    [
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "500", "WATCHDOG_PID": str(os.getpid())}, 0.0005),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getppid())}, None),
        ({"WATCHDOG_PID": str(os.getpid())}, None),
        ({}, None),
    ],
)
def test_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], watchdog: float | None) -> None:
    """The variables say who is to be told and how often, and are gone then: no child is to take them for its own."""
    for name, value in {"NOTIFY_SOCKET": "/run/notify", **variables}.items():
        monkeypatch.setenv(name, value)
    assert find_manager(unexpected) == Manager("/run/notify", watchdog)
    assert not os.environ.keys() & {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    assert find_manager(unexpected) is None
    assert "WATCHDOG_USEC" not in os.environ


@pytest.mark.parametrize("value", ["soon", "0", "-1", "٣"])
def test_watchdog_without_a_time(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """What is no time is warned about."""
    monkeypatch.setenv("NOTIFY_SOCKET", "@x")
    monkeypatch.setenv("WATCHDOG_USEC", value)
    warnings: list[object] = []
    found = find_manager(lambda event, **fields: warnings.append((event, fields)))
    assert found == Manager("@x", None)
    assert warnings == [("watchdog_unusable", {"WATCHDOG_USEC": value, "expected": "microseconds, more than 0"})]


def unexpected(*arguments: object, **fields: object) -> str:
    raise AssertionError((arguments, fields))


def test_nobody_to_tell() -> None:
    """Without a manager nothing is done at all: there is no loop here, no socket and no timer."""
    notifier = Notifier(None, unexpected, unexpected)
    notifier.ready()
    notifier.reloading()
    notifier.reloaded(["a problem"])
    notifier.stopping()
    notifier.drained({"clients": 0})


def test_messages() -> None:
    """A value stays in its line, whatever is in it, and a message in the 4096 bytes that systemd reads."""
    assert message({"READY": 1, "STATUS": "two\nlines \udc80 ü"}) == "READY=1\nSTATUS=two\\nlines \\udc80 ü\n".encode()
    assert len(message({"RELOADING": 1, "MONOTONIC_USEC": 2**63, "STATUS": "\U0001f600" * 5000})) < 4096
    assert [count(number, "byte") for number in (0, 1, 2)] == ["0 bytes", "1 byte", "2 bytes"]


def test_manager_goes_away(start: Start, tmp_path: Path) -> None:
    """A socket that has vanished is warned about once, harms nobody, and is used again when it is back."""
    address = str(tmp_path / "notify")
    with FakeManager(address) as manager:
        daemon = start(env=environment(manager, WATCHDOG_USEC="150000"))
        manager.wait_for("READY", "1")
    daemon.wait_for("notify_failed", NOTIFY_SOCKET=address, error="Connection refused")
    daemon.echo(b"still here")
    Path(address).unlink()
    with FakeManager(address) as manager:
        manager.wait_for("STATUS", "Serving")
    daemon.wait_for("notify_failed", count=2)
    assert daemon.stop() == 0
    assert len(daemon.all("notify_failed")) == 2


@pytest.mark.parametrize("address", ["/run/no/such/socket", "vsock:2:1", "/" + "x" * 200])
def test_manager_that_never_was(start: Start, address: str) -> None:
    """An address where nobody is, or that is none, costs a warning."""
    daemon = start(env={"NOTIFY_SOCKET": address})
    assert daemon.wait_for("notify_failed")["NOTIFY_SOCKET"] == address
    daemon.echo(b"hello")
    assert daemon.stop() == 0


def test_manager_that_does_not_read(start: Start, manager: FakeManager, tmp_path: Path) -> None:
    """A full queue holds nobody up, and the phase that it had no room for is told of as soon as there is some."""
    config = tmp_path / "echod.toml"
    config.write_text("")
    daemon = start("--config", str(config), env=environment(manager))
    manager.wait_for("READY", "1")
    manager.fill()
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("reloaded")
    daemon.echo(b"hello")
    daemon.wait_for("client_closed")
    assert manager.receive() == {"FILLING": "1"}
    ready = manager.wait_for("READY", "1")
    assert ready["STATUS"] == "Serving: 0 clients now, 1 connection so far, 5 bytes received; settings reloaded"
    manager.fill()
    assert daemon.stop() == 0
    assert daemon.all("notify_failed") == []


def test_reload_reaches_inherited_sockets(start: Start, tmp_path: Path) -> None:
    """Listeners that were inherited, and that no setting names, go by the settings of a reload too."""
    config = tmp_path / "echod.toml"
    config.write_text("")
    daemon = start("--config", str(config), module=("-c", INHERITED), listen=None)
    assert daemon.wait_for("listening")["listener"] == "echo"
    with daemon.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        config.write_text("limits.idle_timeout = 0.2")
        daemon.send_signal(signal.SIGHUP)
        assert client.recv(1) == b""
    assert daemon.wait_for("client_closed")["reason"] == "idle"
    assert daemon.all("restart_needed") == []


@pytest.mark.parametrize("form", ["json", "logfmt", "console"])
def test_severity_in_the_journal(start: Start, form: str) -> None:
    """Where the journal reads the log, each line begins with its level as sd-daemon(3) has it."""
    daemon = start(
        *("--log.format", form),
        env={"ECHOD_NO_SUCH": "1"},
        module=("-c", JOURNAL),
        read_log=False,
    )
    text = b""
    while b"listening" not in text:
        text += os.read(daemon.log_pipe.fileno(), 65536)
    lines = text.decode().splitlines()
    assert [line[:3] for line in lines] == ["<4>", "<6>", "<6>"]
    assert "unknown_variable" in lines[0]
    assert lines[0].startswith('<4>{"timestamp"') == (form == "json")


def seconds_to_stop(unit: str) -> float:
    found = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_timeout_of_the_unit_is_above_the_daemons() -> None:
    """A stop with the default timeouts ends before systemd would kill, also without a word from the daemon."""
    shutdown = Settings().shutdown
    longest = shutdown.delay + shutdown.quiet_period + shutdown.drain_timeout + shutdown.linger_timeout
    assert seconds_to_stop((UNITS / "echod.service").read_text()) > longest


def test_shipped_settings() -> None:
    """The settings beside the units are right."""
    assert tomllib.loads((UNITS / "echod.toml").read_text())["listen"] == [":7"]
    result = run("check", "--config", str(UNITS / "echod.toml"))
    assert (result.returncode, result.stdout) == (0, "configuration OK\n")


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Return a folder with the units, to start a command that is there."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    command = tmp_path / "echod"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    for name in ("echod.service", "echod.socket"):
        (tmp_path / name).write_text((UNITS / name).read_text().replace("/opt/echod/bin/echod", str(command)))
    return tmp_path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("dropped_in", [False, True])
def test_verify_is_silent(units: Path, *, dropped_in: bool) -> None:
    """There is nothing to say about the units, with the drop-in and without."""
    if dropped_in:
        folder = units / "echod.service.d"
        folder.mkdir()
        shutil.copy(UNITS / "socket-activation.conf", folder)
    result = analyze("verify", "--man=no", str(units / "echod.service"), str(units / "echod.socket"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_exposure(units: Path) -> None:
    """The exposure is 1.5 at most."""
    result = analyze("security", "--no-pager", "--offline=true", "--threshold=15", str(units / "echod.service"))
    assert result.returncode == 0, result.stdout + result.stderr
