"""The order of a stop, and the signals that request it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crowd import Crowd, Stuck
from echod.daemon.signals import Signals
from echod.loops import loop_factory
from harness import PATIENCE, UNHURRIED, clean_environment, receive, until

if TYPE_CHECKING:
    from harness import Start


def names(events: list[dict[str, object]]) -> list[object]:
    """Return the names of the events, except those of single connections."""
    return [event["event"] for event in events if event["event"] != "client_closed"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_order(start: Start, number: signal.Signals) -> None:
    """One signal stops the daemon gracefully; the events have a fixed order."""
    daemon = start()
    daemon.send_signal(number)
    assert daemon.wait() == 0
    assert names(daemon.events) == ["started", "listening", "draining", "drained", "stopped"]
    assert daemon.wait_for("draining")["signal"] == number.name


def test_delay(start: Start) -> None:
    """New clients are accepted for `delay` seconds after the signal, then refused."""
    daemon = start("--shutdown.delay", "1", *UNHURRIED)
    daemon.send_signal(signal.SIGTERM)
    daemon.wait_for("draining")
    daemon.echo(b"still there")
    with daemon.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        until(lambda: not daemon.listens())
        client.sendall(b"y")
        assert client.recv(1) == b"y"
    assert daemon.wait() == 0
    receipt = daemon.receipt()
    assert (receipt["clients"], receipt["completed"]) == (2, 2)
    assert receipt["seconds"] >= 1


def test_quiet_clients_are_closed(start: Start) -> None:
    """In a drain, a client that is silent for `quiet_period` is closed. An active one is still served."""
    daemon = start("--shutdown.quiet-period", "0.5", "--shutdown.drain-timeout", "20")
    with daemon.connect() as silent, daemon.connect() as talking:
        silent.sendall(b"x")
        assert silent.recv(1) == b"x"
        daemon.send_signal(signal.SIGTERM)
        daemon.wait_for("draining")
        while not select.select([silent], [], [], 0.05)[0]:
            talking.sendall(b"y")
            assert talking.recv(1) == b"y"
        assert silent.recv(1) == b""
        silent.close()
        talking.sendall(b"z")
        assert talking.recv(1) == b"z"
    assert daemon.wait() == 0
    receipt = daemon.receipt()
    assert (receipt["quiet"], receipt["completed"]) == (1, 1)
    assert {line["reason"] for line in daemon.all("client_closed")} == {"quiet", "eof"}


def test_bytes_after_our_fin_are_counted(start: Start) -> None:
    """Bytes that a client sends after our FIN are discarded, and the receipt counts them."""
    daemon = start("--shutdown.quiet-period", "0.2", "--shutdown.linger-timeout", "5")
    with daemon.connect() as client:
        daemon.send_signal(signal.SIGTERM)
        assert client.recv(1) == b""
        client.sendall(b"too late")
    assert daemon.wait() == 0
    receipt = daemon.receipt()
    assert (receipt["quiet"], receipt["discarded_bytes"]) == (1, 8)


def test_client_that_takes_nothing_is_aborted(start: Start) -> None:
    """A client that takes none of its echo after the cut is reset, and the receipt counts the lost bytes."""
    daemon = start("--shutdown.drain-timeout", "0.3", "--shutdown.linger-timeout", "0.3")
    with Crowd() as crowd:
        peer = crowd.add(daemon.connect(receive_buffer=4096), None, 1)
        crowd.pause_reading(peer)
        crowd.run(Stuck(peer))
        assert daemon.stop() == 0
        crowd.finish()
        assert peer.end == "ConnectionResetError"
    receipt = daemon.receipt()
    line = daemon.ledger()[peer.port]
    assert (receipt["clients"], receipt["aborted"], line["reason"]) == (1, 1, "aborted")
    assert receipt["unsent_bytes"] == line["received"] - line["sent"] > 0
    assert receipt["unacked_bytes"] == line["sent"] - line["acked"] > 0


def test_lingering_client_is_not_aborted(start: Start) -> None:
    """A client that has all its echo and does not close is closed at the end of the drain, as `cut`."""
    daemon = start("--shutdown.drain-timeout", "0.3", "--shutdown.linger-timeout", "0.3")
    with daemon.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        assert daemon.stop() == 0
        assert client.recv(1) == b""
    receipt = daemon.receipt()
    assert (receipt["cut"], receipt["unacked_bytes"]) == (1, 0)


@pytest.mark.parametrize("phase", ["delay", "drain", "linger"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGQUIT, 131)])
def test_second_signal(start: Start, phase: str, number: signal.Signals, code: int) -> None:
    """A second signal resets all clients at once, in any phase. Its number gives the exit code."""
    times = {"delay": "0", "drain-timeout": "0.05", "quiet-period": "30", "linger-timeout": "0.05"}
    times |= {"delay": {"delay": "30"}, "drain": {"drain-timeout": "30"}, "linger": {"linger-timeout": "30"}}[phase]
    daemon = start(*(text for name, value in times.items() for text in (f"--shutdown.{name}", value)))
    with daemon.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        daemon.send_signal(signal.SIGTERM)
        daemon.wait_for("draining")
        if phase == "drain":
            until(lambda: not daemon.listens())
        elif phase == "linger":
            assert client.recv(1) == b""
        daemon.send_signal(number)
        assert daemon.wait() == code
        if phase == "linger":  # after a FIN, a reset only shows in the next write
            with pytest.raises(BrokenPipeError):
                client.sendall(b"y")
        else:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    assert daemon.receipt()["aborted"] == 1
    assert names(daemon.events)[-1] == "stopped"


def test_failures_during_the_drain_are_all_logged(start: Start) -> None:
    """Each client that fails in a drain has its own event with a traceback."""
    daemon = start(
        *("--faults.boom.trigger", "boom\r\n", "--faults.boom.action", "raise"),
        *("--listeners.lab.address", "127.0.0.1:0", "--listeners.lab.fault", "boom"),
        *UNHURRIED,
        listen=None,
    )
    clients = [daemon.connect() for _ in range(5)]
    for client in clients:
        client.sendall(b"hello")
        assert receive(client, 5) == b"hello"
    daemon.send_signal(signal.SIGTERM)
    daemon.wait_for("draining")
    for client in clients[:4]:
        client.sendall(b"boom\r\n")
        assert client.recv(1) == b""
        client.close()
    clients[4].sendall(b"fine")
    assert receive(clients[4], 4) == b"fine"
    clients[4].close()
    assert daemon.wait() == 0
    failed = daemon.all("client_failed")
    assert {event["peer"] for event in failed} == {
        line["peer"] for line in daemon.all("client_closed") if line["reason"] == "fault"
    }
    assert len(failed) == 4
    assert all("InjectedFault" in event["exception"] for event in failed)
    receipt = daemon.receipt()
    assert (receipt["failed"], receipt["completed"]) == (4, 1)


@pytest.mark.parametrize("count", [1, 2])
def test_signal_during_start_up(loop_name: str, count: int) -> None:
    """A signal during the imports stops echod gracefully once it runs. A second signal stops it at once."""
    read, write = os.pipe()
    # The command, blocked in the middle of its imports until the test has sent its signals.
    script = f"""
import os, signal, sys
class Hold:
    def find_spec(self, name, path=None, target=None):
        if name == "echod.settings":
            sys.stdout.write("importing\\n"); sys.stdout.flush()
            os.read({read}, 1)
sys.meta_path.insert(0, Hold())
sys.argv = ["echod", "--loop", "{loop_name}", "--listen", "127.0.0.1:0"]
from echod.cli import main
sys.exit(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[read],
        env=clean_environment(),
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        for _ in range(count):
            process.send_signal(signal.SIGTERM)
            # The kernel would deliver two pending signals of one number as one.
            until(lambda: not pending(process.pid, signal.SIGTERM))
        os.write(write, b"x")
        try:
            _, log = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    os.close(read)
    os.close(write)
    if count == 1:
        assert process.returncode == 0
        events = [json.loads(line)["event"] for line in log.splitlines()]
        assert events == ["started", "listening", "draining", "drained", "stopped"]
    else:
        assert (process.returncode, log) == (143, "")


def pending(pid: int, number: int) -> bool:
    """Tell whether a signal is pending."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in status if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130), (signal.SIGHUP, -signal.SIGHUP)]
)
def test_commands_that_do_not_serve_end_at_signals(number: signal.Signals, code: int) -> None:
    """A signal ends `check` at once, even during the imports. Ctrl-C leaves no traceback."""
    script = f"""
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "echod.settings":
            signal.raise_signal({int(number)})
sys.meta_path.insert(0, Interrupt())
sys.argv = ["echod", "check"]
from echod.cli import main
sys.exit(main())
"""
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=PATIENCE, env=clean_environment(), check=False
    )
    assert (process.returncode, process.stderr) == (code, b"")
    assert process.stdout == b""


def test_commands_that_do_not_serve_under_nohup() -> None:
    """A signal that was ignored before the command began is ignored again if the command does not serve."""
    script = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "echod.settings":
            signal.raise_signal(signal.SIGHUP)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["echod", "check"]
from echod.daemon.signals import Signals
release = Signals.release
def late(self):
    signal.raise_signal(signal.SIGHUP)
    release(self)
Signals.release = late
from echod.cli import main
sys.exit(main())
"""
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=PATIENCE, env=clean_environment(), check=False
    )
    assert (process.returncode, process.stdout.partition(b": ")[0]) == (0, b"configuration OK")


@pytest.mark.parametrize("failing", ["read", "write"])
def test_wake_up_pipe_fails(loop_name: str, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """A stop is not lost if the byte that wakes the loop cannot be read, or could not be written."""
    signals = Signals()

    async def main() -> int:
        loop = asyncio.get_running_loop()
        stop: asyncio.Future[int] = loop.create_future()
        signals.attach(loop, stop.set_result, lambda: None)
        await asyncio.sleep(0)  # the signals that were recorded earlier are acted on
        with monkeypatch.context() as patch:
            if failing == "write":
                signal.set_wakeup_fd(-1)
            else:
                patch.setattr("echod.daemon.signals.os.read", fail)
            signal.raise_signal(signal.SIGTERM)
            number = await asyncio.wait_for(stop, PATIENCE)
        signals.detach(loop)
        return number

    def fail(*_: int) -> bytes:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    try:
        with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
            assert runner.run(main()) == signal.SIGTERM
    finally:
        signals.release()
