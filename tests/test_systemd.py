"""The daemon under systemd: by a socket that stands in for it, by the units' text, and in a container that runs it."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
import tomllib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
import structlog

from crowd import Crowd
from echod.settings import Settings
from echod.systemd import Manager, Notifier, count, find_manager, message
from harness import PATIENCE, receive, run, until
from nspawn import Container, wait, why_not

if TYPE_CHECKING:
    from collections.abc import Iterator
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
        deadline = time.monotonic() + PATIENCE
        while not (fields := self.receive()).get(name, "").startswith(value):
            assert time.monotonic() < deadline, f"no {name}={value} in {self.messages}"
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


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[FakeManager]:
    with FakeManager(str(tmp_path / "notify")) as manager:
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


def test_abstract_address(start: Start) -> None:
    """The socket may be one without a file."""
    with FakeManager(f"@echod-test-{os.getpid()}") as manager:
        daemon = start(env=environment(manager))
        manager.wait_for("READY", "1")
        assert daemon.stop() == 0
        manager.wait_for("STATUS", "Drained")


def test_log_file_that_cannot_be_reopened(start: Start, manager: FakeManager, tmp_path: Path) -> None:
    """A reload that fails at its last step, the opening of the log file, is told of too."""
    config, fifo = tmp_path / "echod.toml", tmp_path / "fifo"
    config.write_text("")
    daemon = start("--config", str(config), env=environment(manager))
    config.write_text(f"log.file = '{fifo}'")
    os.mkfifo(fifo)  # only the opening finds that it has no reader
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("reload_failed")
    manager.wait_for("RELOADING", "1")
    assert f"settings not reloaded, 1 problem: {config}: log.file" in manager.wait_for("READY", "1")["STATUS"]
    assert daemon.stop() == 0


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
    assert time.monotonic() - began < 5 * 0.6
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


@pytest.mark.parametrize("value", ["soon", "0", "-1", "٣", "9" * 400, "9" * 5000])
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
    notifier = Notifier(None, unexpected, structlog.get_logger)
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


def test_manager_goes_away_after_a_reload(start: Start, tmp_path: Path) -> None:
    """The warning is in the log that is in force by then."""
    config, log = tmp_path / "echod.toml", tmp_path / "log"
    config.write_text("")
    with FakeManager(str(tmp_path / "notify")) as manager:
        daemon = start("--config", str(config), env=environment(manager, WATCHDOG_USEC="150000"))
        config.write_text(f"log.file = '{log}'")
        daemon.send_signal(signal.SIGHUP)
        while "; settings reloaded" not in manager.wait_for("STATUS", "Serving")["STATUS"]:
            pass
    until(lambda: "notify_failed" in log.read_text())
    assert daemon.stop() == 0
    assert daemon.all("notify_failed") == []


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
    assert daemon.stop() == 0


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
    assert daemon.stop() == 0


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


# In a container

DROP_IN = "/etc/systemd/system/echod.service.d/test.conf"


def block(name: str) -> str:
    """Return the block of the README that a comment in front of it names."""
    found = re.search(
        rf"^<!-- {name} -->\n```\w+\n(.*?)^```$", (UNITS / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert found is not None, name
    return found[1]


def drop_in(container: Container, text: str) -> None:
    """Put a drop-in of the test's in force."""
    container.write(DROP_IN, text)
    container.shell("systemctl daemon-reload; systemctl restart echod")


def echo(client: socket.socket, text: bytes) -> None:
    """Be a client that sends a message, takes its echo, and closes."""
    with client:
        client.sendall(text)
        client.shutdown(socket.SHUT_WR)
        assert receive(client, len(text) + 1) == text


def status(container: Container) -> dict[str, str]:
    """Return what the kernel says of the service's process."""
    pid = container.property("MainPID")
    lines = container.run("cat", f"/proc/{pid}/status").stdout.splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.container
def test_in_a_container(tmp_path: Path) -> None:
    """All of it with real systemd, by the README's own commands: scene after scene, as one boot is dear."""
    if (reason := why_not()) is not None:
        pytest.skip(f"a container that runs systemd {reason}")
    with Container() as container:
        container.shell(block("install"))
        installed(container)
        started(container)
        reloaded(container)
        stuck(container)
        stopped_under_load(container)
        with_tls(container, tmp_path)
        restarted_under_load(container)
        logged(container)


def installed(container: Container) -> None:
    """Neither unit gives systemd anything to say, and the exposure is what the README says."""
    units = "/etc/systemd/system/echod.service", "/etc/systemd/system/echod.socket"
    verified = container.run("systemd-analyze", "verify", *units)
    assert (verified.stdout, verified.stderr) == ("", "")
    assert "exposure level for echod.service: 1.4 " in security(container)


def security(container: Container) -> str:
    return container.run("systemd-analyze", "security", "--no-pager", "--threshold=15", "echod.service").stdout


def started(container: Container) -> None:
    """It serves port 7 in both families, as a user of its own, with the one right that takes, behind a filter."""
    assert container.property("ActiveState") == "active"
    echo(container.connect("127.0.0.1"), b"four")
    echo(container.connect("::1"), b"six")
    process = status(container)
    assert set(process["Uid"].split()).isdisjoint({"0"})
    assert {process[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {f"{1 << 10:016x}"}
    assert (process["NoNewPrivs"], process["Seccomp"]) == ("1", "2")
    assert container.property("StatusText").startswith("Serving: ")


def reloaded(container: Container) -> None:
    """A reload puts settings in force; one of wrong settings fails, by systemctl and by the signal, and harms nobody."""
    path, text = "/etc/echod/echod.toml", (UNITS / "echod.toml").read_text()
    pid = container.property("MainPID")
    container.write(path, text + 'connections = "all"\n')
    container.run("systemctl", "reload", "echod")
    wait(lambda: container.property("StatusText").endswith("; settings reloaded"))
    wait(lambda: container.events("reloaded"))
    assert container.events("reloaded")[-1]["changed"] == ["log.connections"]
    container.write(path, text + 'connections = "everything"\n')
    assert container.run("systemctl", "reload", "echod", check=False).returncode == 1
    assert "log.connections" in "".join(entry["MESSAGE"] for entry in container.journal("_COMM=echod"))
    container.run("systemctl", "kill", "--signal=HUP", "echod")
    problem = "settings not reloaded, 1 problem: /etc/echod/echod.toml: log.connections"
    wait(lambda: problem in container.property("StatusText"))
    states = {name: container.property(name) for name in ("ActiveState", "SubState", "MainPID", "NRestarts")}
    assert states == {"ActiveState": "active", "SubState": "running", "MainPID": pid, "NRestarts": "0"}
    echo(container.connect(), b"still there")
    container.write(path, text)


def stuck(container: Container) -> None:
    """A loop that stands still is killed by the watchdog, says where it stood, and is started again."""
    drop_in(container, "[Service]\nWatchdogSec=1\n")
    pid = container.property("MainPID")
    echo(container.connect(), b"before")
    # Until its line is written: a thread that writes in the moment of the abort spoils what that says.
    wait(lambda: container.events("client_closed", f"_PID={pid}"))
    container.run("kill", "-STOP", pid)
    wait(lambda: container.property("NRestarts") == "1")
    wait(lambda: container.property("StatusText").startswith("Serving: "))
    assert container.property("MainPID") != pid
    echo(container.connect(), b"after")
    told = "\n".join(entry["MESSAGE"] for entry in container.journal())
    assert "Watchdog timeout" in told
    assert "Fatal Python error: Aborted" in told
    assert re.search(r'File "/opt/echod/.*/echod/daemon.py", line \d+ in serve', told)


def stopped_under_load(container: Container) -> None:
    """A stop takes longer than TimeoutStopSec, since clients need the time, and each gets what is due to it."""
    drop_in(
        container,
        "[Service]\nTimeoutStopSec=1\nEnvironment=ECHOD_SHUTDOWN__DRAIN_TIMEOUT=4 ECHOD_SHUTDOWN__QUIET_PERIOD=20\n",
    )
    with Crowd() as crowd:
        whole = [crowd.add(container.connect(), 20_000_000, seed) for seed in range(10)]
        endless = crowd.add(container.connect(), None, 99)
        crowd.run(lambda: all(peer.received for peer in crowd.peers))
        began = time.monotonic()
        stop = container.spawn(lambda: container.run("systemctl", "stop", "echod"))
        draining = container.spawn(lambda: wait(lambda: "Draining: 1 client now" in container.property("StatusText")))
        crowd.finish()
        stop.result()
        draining.result()
        assert time.monotonic() - began > 3.5
        assert not any(peer.wrong for peer in crowd.peers)
        assert [peer.received for peer in whole] == [20_000_000] * 10
        assert endless.end == "eof"
    assert (container.property("Result"), container.property("ExecMainStatus")) == ("success", "0")
    receipt = container.events("drained")[-1]
    assert (receipt["clients"], receipt["completed"], receipt["cut"]) == (11, 10, 1)
    assert receipt["unsent_bytes"] == 0
    assert container.property("StatusText").startswith("Drained: clients=11 completed=10 quiet=0 cut=1 aborted=0 ")


def with_tls(container: Container, folder: Path) -> None:
    """The README's drop-in gives it a key that it could not read by itself."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "90",
    ]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    for file in (certificate, key):
        container.write(f"/etc/echod/{file.name}", file.read_text())
    container.run("chmod", "600", "/etc/echod/key.pem")
    drop_in(container, block("tls"))
    context = ssl.create_default_context(cafile=certificate)
    with context.wrap_socket(container.connect(port=7443), server_hostname="localhost") as client:
        client.sendall(b"secret")
        assert receive(client, 6) == b"secret"


def restarted_under_load(container: Container) -> None:
    """Two restarts while eight clients come and go: every connect succeeds, and every echo is whole."""
    container.run("rm", DROP_IN)
    container.shell(block("socket activation"))
    process = status(container)
    assert {process[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {f"{0:016x}"}
    assert "exposure level for echod.service: 0." in security(container)
    pids = [container.property("MainPID")]
    over = threading.Event()
    served = [0] * 8

    def come_and_go(number: int) -> None:
        last = False
        while not last:
            last = over.is_set()
            echo(socket.create_connection(("::1", 7) if number % 2 else ("127.0.0.1", 7), PATIENCE), os.urandom(1000))
            served[number] += 1

    def all_served(least: list[int]) -> bool:
        for client in clients:
            if client.done():
                client.result()  # its error, since no client is done so early
        return all(number >= enough for number, enough in zip(served, least, strict=True))

    clients = [container.spawn(partial(come_and_go, number)) for number in range(len(served))]
    try:
        for _ in range(2):
            wait(partial(all_served, [number + 10 for number in served]))
            container.run("systemctl", "restart", "echod")
            pids.append(container.property("MainPID"))
    finally:
        over.set()
    for client in clients:
        client.result()
    assert len(set(pids)) == 3
    assert [event["listener"] for event in container.events("listening")[-2:]] == ["systemd:echo"] * 2
    began = [event["pid"] for event in container.events("started")][-3:]
    assert [str(pid) for pid in began] == pids
    told = sum(event["connections"] for event in container.events("stopped")[-2:])
    assert 0 < told < sum(served)
    container.run("systemctl", "stop", "echod")
    assert container.property("ActiveState") == "inactive"
    echo(container.connect(), b"wake up")
    assert container.property("ActiveState") == "active"


def logged(container: Container) -> None:
    """The journal has the fields of every line, and its level as its own."""
    with container.connect() as client:
        peer = "{}:{}".format(*client.getsockname())
        echo(client, b"noted")
    (line,) = wait(lambda: [event for event in container.events("client_closed") if event["peer"] == peer])
    assert (line["received"], line["acked"], line["reason"]) == (5, 5, "eof")
    failed = container.events("reload_failed", "PRIORITY=3")
    assert "log.connections" in failed[0]["problems"][0]
    assert container.events("started", "PRIORITY=6")
    assert container.events("started", "PRIORITY=3") == []
