"""The daemon leaks no task, exception, warning or descriptor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crowd import Crowd, Stuck
from harness import receive, reset, until

if TYPE_CHECKING:
    from harness import Daemon, Start


def descriptors(daemon: Daemon) -> int:
    """Return the number of descriptors that the daemon has open."""
    return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))


@pytest.mark.parametrize("python", [(), ("-X", "dev")])
def test_all_ends(start: Start, python: tuple[str, ...]) -> None:
    """Clients end in every possible way, also in Python's development mode, which includes asyncio's debug mode.

    Each warning of these modes would be logged, such as a task exception never retrieved or a socket never closed.
    """
    daemon = start(
        *("--faults.boom.trigger", "boom", "--faults.boom.action", "raise"),
        *("--listeners.lab.address", "127.0.0.1:0", "--listeners.lab.fault", "boom"),
        *("--limits.idle-timeout", "3", "--limits.write-timeout", "3", "--log.connections", "all"),
        *("--shutdown.quiet-period", "0.2", "--shutdown.drain-timeout", "0.6", "--shutdown.linger-timeout", "2"),
        python=python,
        listen=None,
    )
    daemon.echo(b"eof")
    until(lambda: len(daemon.all("client_closed")) == 1)
    before = descriptors(daemon)
    with Crowd() as crowd:
        for seed in range(20):
            crowd.add(daemon.connect(), 20_000, seed)
        crowd.finish()
        resetting = [daemon.connect() for _ in range(5)]
        for client in resetting:
            client.sendall(b"reset")
            assert receive(client, 5) == b"reset"
            reset(client)
        failing = [daemon.connect() for _ in range(5)]
        for client in failing:
            client.sendall(b"boom")
            assert client.recv(1) == b""
            client.close()
        stalled = crowd.add(daemon.connect(receive_buffer=4096), None, 98)
        crowd.pause_reading(stalled)
        idle = daemon.connect()
        crowd.run(lambda: bool(stalled.end))
        assert idle.recv(1) == b""
        idle.close()
        daemon.wait_for("client_closed", reason="stalled")
        daemon.wait_for("client_closed", count=33)
        until(lambda: descriptors(daemon) == before)

        quiet = daemon.connect()
        endless = crowd.add(daemon.connect(receive_buffer=4096), None, 99)
        unread = crowd.add(daemon.connect(receive_buffer=4096), None, 100)
        crowd.pause_reading(unread)
        crowd.run(Stuck(unread, 0.3))
        daemon.send_signal()
        crowd.finish()
        assert quiet.recv(1) == b""
        quiet.close()
        assert endless.end == "eof"
    assert daemon.wait() == 0
    reasons = {line["reason"] for line in daemon.all("client_closed")}
    assert reasons == {"eof", "reset", "fault", "idle", "stalled", "quiet", "cut", "aborted"}
    assert {event["event"] for event in daemon.loud()} == {"client_failed"}
    assert len(daemon.raw) == len(daemon.events), "a line that is not a log event"
    assert daemon.receipt()["clients"] == 3
