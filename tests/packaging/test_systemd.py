"""Test the messages to systemd with a socket in its place, the inherited sockets, and the journal's levels."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVarTuple

import pytest
import structlog

from echod.daemon.systemd import Manager, Notifier, find_manager, message
from echod.loops import loop_factory
from echod.text import count
from harness import PATIENCE, receive, run, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextvars import Context
    from types import TracebackType

    from harness import Start

pytestmark = pytest.mark.once

Arguments = TypeVarTuple("Arguments")

# A daemon with an inherited socket.
INHERITED = """
import os, socket, sys
listening = socket.create_server(("127.0.0.1", 0))
os.dup2(listening.fileno(), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="echo")
from echod import cli
sys.exit(cli.main())
"""

# A daemon with its standard error connected to the journal.
JOURNAL = """
import os, sys
stat = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{stat.st_dev}:{stat.st_ino}"
from echod import cli
sys.exit(cli.main())
"""


class FakeManager:
    """The receiving end of NOTIFY_SOCKET, in place of systemd.

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
        """Return the fields of the next message by name."""
        self._socket.settimeout(timeout)
        fields = dict(line.split("=", 1) for line in self._socket.recv(4096).decode().splitlines())
        self.messages.append(fields)
        return fields

    def wait_for(self, name: str, value: str) -> dict[str, str]:
        """Return the next message in which the value of a field starts with `value`."""
        deadline = time.monotonic() + PATIENCE
        while not (fields := self.receive()).get(name, "").startswith(value):
            assert time.monotonic() < deadline, f"no {name}={value} in {self.messages}"
        return fields

    def rest(self) -> list[dict[str, str]]:
        """Return all messages in the queue."""
        messages = []
        while select.select([self._socket], [], [], 0)[0]:
            messages.append(self.receive())
        return messages

    def keeps_receiving(self, watchdog: float) -> bool:
        """Return whether ten messages arrive, each within `watchdog` seconds of the previous one."""
        with contextlib.suppress(TimeoutError):
            for _ in range(10):
                self.receive(watchdog)
            return True
        return False

    def fill(self) -> None:
        """Fill the queue, so that no other message fits."""
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
    """Check the messages of a whole run: ready, reloading, ready again, stopping, and the receipt."""
    config = tmp_path / "echod.toml"
    config.write_text("")
    daemon = start("--config", str(config), env=environment(manager))
    figures = "0 clients now, 0 connections so far, 0 bytes received"
    assert manager.receive() == {"READY": "1", "STATUS": f"Serving: {figures}"}
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
    fields = (f"{name}={value}" for name, value in receipt.items() if name not in {"timestamp", "level", "event"})
    assert manager.receive()["STATUS"] == f"Drained: {' '.join(fields)}"
    assert manager.rest() == []


def test_abstract_address(start: Start) -> None:
    """Check that the socket may be in the abstract namespace."""
    with FakeManager(f"@echod-test-{os.getpid()}") as manager:
        daemon = start(env=environment(manager))
        manager.wait_for("READY", "1")
        assert daemon.stop() == 0
        manager.wait_for("STATUS", "Drained")


def test_log_file_that_cannot_be_reopened(start: Start, manager: FakeManager, tmp_path: Path) -> None:
    """Check that a reload that fails to open the log file, its last step, is reported."""
    config, fifo = tmp_path / "echod.toml", tmp_path / "fifo"
    config.write_text("")
    daemon = start("--config", str(config), env=environment(manager))
    config.write_text(f"log.file = '{fifo}'")
    os.mkfifo(fifo)  # only the opening finds that it has no reader
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("reload_failed")
    manager.wait_for("RELOADING", "1")
    assert f"settings not reloaded, 1 problem: {config}:1: log.file" in manager.wait_for("READY", "1")["STATUS"]
    assert daemon.stop() == 0


def test_not_ready_before_all_listen(tmp_path: Path, loop_name: str) -> None:
    """Check that READY is not sent if one of two addresses cannot be bound."""
    with FakeManager(str(tmp_path / "notify")) as manager, socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:0,127.0.0.1:{taken.getsockname()[1]}"
        result = run("--loop", loop_name, "--listen", listen, env=environment(manager))
        assert result.returncode == 69
        assert manager.rest() == []


def test_stopping_is_the_last_phase(start: Start, manager: FakeManager) -> None:
    """Check that a reload during a drain is not reported."""
    daemon = start("--shutdown.quiet-period", "20", "--shutdown.drain-timeout", "20", env=environment(manager))
    with daemon.connect():
        manager.wait_for("STATUS", "Serving")
        daemon.send_signal(signal.SIGTERM)
        manager.wait_for("STOPPING", "1")
        daemon.send_signal(signal.SIGHUP)
        # Every second, the status is updated and more time is requested.
        for _ in range(2):
            fields = manager.receive()
            assert fields.keys() == {"STATUS", "EXTEND_TIMEOUT_USEC"}
            assert fields["STATUS"] == "Draining: 1 client now, 1 connection so far, 0 bytes received"
    assert daemon.wait() == 0
    manager.wait_for("STATUS", "Drained: clients=1 completed=1")
    assert all("READY" not in fields and "RELOADING" not in fields for fields in manager.messages[1:])


def test_numbers_are_live(start: Start, manager: FakeManager) -> None:
    """Check that the status counts the bytes of both connected and closed clients."""
    daemon = start(env=environment(manager, WATCHDOG_USEC="150000"))
    daemon.echo(b"gone")
    with daemon.connect() as client:
        client.sendall(b"present")
        assert receive(client, 7) == b"present"
        manager.wait_for("STATUS", "Serving: 1 client now, 2 connections so far, 11 bytes received")


def test_watchdog(start: Start, manager: FakeManager) -> None:
    """Check that every message feeds the watchdog, and that a frozen daemon sends none."""
    daemon = start(env=environment(manager, WATCHDOG_USEC="600000"))
    for _ in range(6):
        assert manager.receive()["WATCHDOG"] == "1"
    daemon.freeze()
    assert not manager.keeps_receiving(0.6)
    daemon.send_signal(signal.SIGCONT)
    assert manager.receive()["WATCHDOG"] == "1"
    assert daemon.stop() == 0


@pytest.fixture
def _own_fault_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the fault handler of this process, which a notifier with a watchdog would replace."""
    monkeypatch.setattr("faulthandler.enable", lambda *_: None)


@pytest.mark.usefixtures("_own_fault_handler")
def test_only_the_loop_feeds_the_watchdog(manager: FakeManager, loop_name: str) -> None:
    """Check that no message is sent while the loop is blocked, although other threads run."""
    loop = loop_factory(loop_name)()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    blocked, release = threading.Event(), threading.Event()

    async def notify() -> Notifier:
        notifier = Notifier(Manager(manager.address, 0.6), lambda: "no clients", structlog.get_logger)
        notifier.ready()
        return notifier

    def block() -> None:
        blocked.set()
        release.wait(PATIENCE)

    notifier = asyncio.run_coroutine_threadsafe(notify(), loop).result(PATIENCE)
    try:
        for _ in range(3):
            assert manager.receive()["WATCHDOG"] == "1"
        loop.call_soon_threadsafe(block)
        assert blocked.wait(PATIENCE)
        assert not manager.keeps_receiving(0.6)
        release.set()
        assert manager.receive()["WATCHDOG"] == "1"
    finally:
        release.set()
        loop.call_soon_threadsafe(notifier.drained, {})
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE)
        loop.close()


class RecordingLoop(asyncio.SelectorEventLoop):
    """A loop that records the delays of its timers."""

    def __init__(self) -> None:
        super().__init__()
        self.delays: list[float] = []

    def call_later(
        self, delay: float, callback: Callable[[*Arguments], object], *args: *Arguments, context: Context | None = None
    ) -> asyncio.TimerHandle:
        self.delays.append(delay)
        return super().call_later(delay, callback, *args, context=context)


@pytest.mark.usefixtures("_own_fault_handler")
@pytest.mark.parametrize(
    ("watchdog", "serving", "draining"),
    [(None, 10, 1), (60, 10, 1), (0.6, 0.2, 0.2)],
)
def test_intervals(manager: FakeManager, watchdog: float | None, serving: float, draining: float) -> None:
    """Check the time to the next message: while serving, after a message that was not sent, and during a drain."""
    loop = RecordingLoop()

    async def notify() -> None:
        notifier = Notifier(Manager(manager.address, watchdog), lambda: "no clients", structlog.get_logger)
        notifier.ready()
        assert loop.delays[-1] == pytest.approx(serving)
        manager.fill()
        notifier.reloading()
        assert loop.delays[-1] == pytest.approx(0.1)
        manager.rest()
        notifier.stopping()
        assert loop.delays[-1] == pytest.approx(draining)
        notifier.drained({})

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(notify())


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
    """Check that the variables are read, and then removed so that child processes do not use them."""
    for name, value in {"NOTIFY_SOCKET": "/run/notify", **variables}.items():
        monkeypatch.setenv(name, value)
    assert find_manager(unexpected) == Manager("/run/notify", watchdog)
    assert not os.environ.keys() & {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    assert find_manager(unexpected) is None
    assert "WATCHDOG_USEC" not in os.environ


@pytest.mark.parametrize("value", ["soon", "0", "-1", "٣", "9" * 400, "9" * 5000])
def test_invalid_watchdog_timeout(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Check that an invalid timeout is logged as a warning."""
    monkeypatch.setenv("NOTIFY_SOCKET", "@x")
    monkeypatch.setenv("WATCHDOG_USEC", value)
    warnings: list[object] = []
    found = find_manager(lambda event, **fields: warnings.append((event, fields)))
    assert found == Manager("@x", None)
    assert warnings == [("watchdog_unusable", {"WATCHDOG_USEC": value, "expected": "microseconds, more than 0"})]


def unexpected(*arguments: object, **fields: object) -> str:
    raise AssertionError((arguments, fields))


def test_no_manager() -> None:
    """Check that a notifier without a manager needs no event loop, and therefore has neither a socket nor a timer."""
    notifier = Notifier(None, unexpected, structlog.get_logger)
    notifier.ready()
    notifier.reloading()
    notifier.reloaded(["a problem"])
    notifier.stopping()
    notifier.drained({"clients": 0})


def test_messages() -> None:
    """Check that each value stays on one line, and each message within the 4096 bytes that systemd accepts."""
    assert message({"READY": 1, "STATUS": "two\nlines \udc80 ü"}) == "READY=1\nSTATUS=two\\nlines \\udc80 ü\n".encode()
    assert len(message({"RELOADING": 1, "MONOTONIC_USEC": 2**63, "STATUS": "\U0001f600" * 5000})) < 4096
    assert [count(number, "byte") for number in (0, 1, 1200)] == ["0 bytes", "1 byte", "1,200 bytes"]


def test_manager_goes_away(start: Start, tmp_path: Path) -> None:
    """Check that a lost socket causes one warning and no other harm, and is used again once it is back."""
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
    """Check that the warning goes to the log file that the reload has set."""
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
def test_unreachable_manager(start: Start, address: str) -> None:
    """Check that an unused or invalid address causes only a warning."""
    daemon = start(env={"NOTIFY_SOCKET": address})
    assert daemon.wait_for("notify_failed")["NOTIFY_SOCKET"] == address
    daemon.echo(b"hello")
    assert daemon.stop() == 0


def test_manager_that_does_not_read(start: Start, manager: FakeManager, tmp_path: Path) -> None:
    """Check that a full queue delays no client, and that the dropped phase is sent once there is room."""
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
    """Check that a reload applies to inherited listeners that no setting names."""
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
    """Check that each line in the journal starts with its level, as in sd-daemon(3)."""
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
