"""Defects of the daemon itself: a server task that fails."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from harness import UNHURRIED, receive

if TYPE_CHECKING:
    from harness import Start

# The sweep fails once after SIGUSR1.
FAILING_SWEEP = """
import signal, sys
from echod import cli, clock
announce, defects = clock.Clock.announce, []
def fail(self, *arguments):
    if defects:
        raise defects.pop()
    return announce(self, *arguments)
clock.Clock.announce = fail
signal.signal(signal.SIGUSR1, lambda *_: defects.append(ArithmeticError("a defect")))
sys.exit(cli.main())
"""


def test_failed_server_task_ends_the_daemon(start: Start) -> None:
    """The daemon logs `crashed`, drains all listeners, and exits with code 1."""
    daemon = start("--limits.idle-timeout", "60", *UNHURRIED, module=("-c", FAILING_SWEEP))
    with daemon.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        daemon.send_signal(signal.SIGUSR1)
        crashed = daemon.wait_for("crashed")
        assert (crashed["level"], "ArithmeticError: a defect" in crashed["exception"]) == ("error", True)
        assert daemon.wait_for("draining")["signal"] is None
        client.sendall(b"still served")
        assert receive(client, 12) == b"still served"
    assert daemon.wait() == 1
    assert daemon.receipt()["completed"] == 1
    assert daemon.all("stop_failed") == []


def test_signals_after_a_failed_server_task(start: Start) -> None:
    """The first signal leaves the drain graceful. The second one resets the clients, and the exit code is still 1."""
    daemon = start("--limits.idle-timeout", "60", *UNHURRIED, module=("-c", FAILING_SWEEP))
    with daemon.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        daemon.send_signal(signal.SIGUSR1)
        daemon.wait_for("draining")
        daemon.send_signal(signal.SIGTERM)
        for _ in range(2):  # the loop may read the first message before it handles the signal
            client.sendall(b"still served")
            assert receive(client, 12) == b"still served"
        daemon.send_signal(signal.SIGINT)
        assert daemon.wait() == 1
    assert daemon.receipt()["aborted"] == 1
