"""Test signals that are blocked, arrive in bursts, or force a stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from echod.daemon.signals import HANDLED
from harness import PATIENCE, UNHURRIED, clean_environment, until

if TYPE_CHECKING:
    from harness import Start

MAIN = "import sys; from echod.cli import main; sys.exit(main())"


def block() -> None:
    """Block every signal, like a parent that forgets to restore its mask."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def test_a_blocked_mask_is_cleared(start: Start) -> None:
    """Reload and stop even if the parent process has blocked all signals."""
    daemon = start(prepare=block)
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("reloaded")
    assert daemon.stop() == 0
    assert daemon.wait_for("draining")["signal"] == "SIGTERM"


@pytest.mark.parametrize(
    ("command", "module"),
    [("check", "echod.settings"), ("completion", "echod.completion"), ("probe", "echod.probe")],
)
def test_a_blocked_mask_is_cleared_for_other_commands(command: str, module: str) -> None:
    """Ctrl-C ends other commands without a traceback, even if the parent has blocked SIGINT."""
    script = f"""
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            signal.raise_signal(signal.SIGINT)
import signal, sys
sys.meta_path.insert(0, Interrupt())
sys.argv = ["echod", "{command}"]
{MAIN}
"""
    process = subprocess.run(
        [sys.executable, "-c", script],
        preexec_fn=block,
        capture_output=True,
        timeout=PATIENCE,
        env=clean_environment(),
        check=False,
    )
    assert (process.returncode, process.stdout, process.stderr) == (130, b"", b"")


BURST = """
import asyncio, signal, sys
from echod.daemon.signals import Signals
from echod.loops import loop_factory

async def main(signals):
    loop = asyncio.get_running_loop()
    stopped = loop.create_future()
    burst = [signal.SIGTERM] + 100_000 * [signal.SIGHUP]
    def reload():
        while burst:
            signal.raise_signal(burst.pop())
    signals.attach(loop, stopped.set_result, reload)
    signal.raise_signal(signal.SIGHUP)
    print(await stopped)
    signals.detach(loop)

with asyncio.Runner(loop_factory=loop_factory(sys.argv[1])) as runner:
    runner.run(main(Signals()))
"""


def test_a_burst_does_not_hide_the_stop(loop_name: str) -> None:
    """Pass on SIGTERM after 100,000 SIGHUPs in one iteration of the loop."""
    command = [sys.executable, "-c", BURST, loop_name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
    assert (result.stdout, result.stderr) == (f"{signal.SIGTERM:d}\n", "")


def test_quit(start: Start) -> None:
    """Reset every client at once on SIGQUIT, even clients with delayed echo, and write the receipt."""
    daemon = start("--shutdown.delay", "60", *UNHURRIED)
    with daemon.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        daemon.send_signal(signal.SIGQUIT)
        assert daemon.wait() == 131
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert daemon.wait_for("draining")["signal"] == "SIGQUIT"
    receipt = daemon.receipt()
    assert (receipt["clients"], receipt["aborted"]) == (1, 1)
    assert daemon.events[-1]["event"] == "stopped"


def test_exit_code_of_the_first_forcing_signal(start: Start) -> None:
    """Ignore further signals after SIGQUIT. Neither the stop nor the exit code changes."""
    daemon = start()
    daemon.freeze()
    daemon.send_signal(signal.SIGQUIT)
    daemon.send_signal(signal.SIGTERM)
    daemon.send_signal(signal.SIGCONT)
    # The kernel delivers the lower number first: SIGQUIT is 3, SIGTERM 15.
    assert daemon.wait() == 131
    assert [event["signal"] for event in daemon.all("draining")] == ["SIGQUIT"]


def test_handlers_remain_until_the_end(start: Start) -> None:
    """Keep the handlers installed, and the signals unblocked, until the process ends."""
    daemon = start()

    def masks() -> dict[str, int]:
        status = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
        lines = [line.split() for line in status if line.startswith("Sig")]
        return {name: int(mask, 16) for name, mask in lines if "/" not in mask}

    handled = sum(1 << (number - 1) for number in HANDLED)
    until(lambda: masks()["SigCgt:"] & handled == handled)
    assert masks()["SigBlk:"] & handled == 0
    assert daemon.stop() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGQUIT, 131)])
def test_stop_while_the_settings_are_read(start: Start, tmp_path: Path, number: int, code: int) -> None:
    """Stop without waiting for settings that have no end of file."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    daemon = start("--config", str(fifo), read_log=False)
    until(lambda: not handled_by_default(daemon.pid, signal.SIGHUP))
    daemon.settle()
    daemon.send_signal(number)
    assert daemon.process.wait(PATIENCE) == code
    assert daemon.log_pipe.read() == b""


def handled_by_default(process: int, number: int) -> bool:
    """Tell whether a process has the default action for a signal."""
    (caught,) = re.findall(r"^SigCgt:\s(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return not int(caught, 16) >> (number - 1) & 1
