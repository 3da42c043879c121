"""Test that each step of examples/evolution has the flaws it describes, and that echod has none of them.

Bounds of CPU use are wide: the cases that a test tells apart differ by a multiple.
"""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE, UNHURRIED, receive, reset, until
from scenes import HERE, STEPS, Loss, Step, connect, converse, cost, idle, second_client, stop

if TYPE_CHECKING:
    from harness import Start
    from scenes import DaemonView

pytestmark = pytest.mark.once

ONE, TURN, BUSY, SELECTORS, TASKS, SHUTDOWN = STEPS
DOCS = HERE.parents[1] / "docs" / "explanation"
BOOM = b"boom\r\n"
# How long the first client is silent if the second must not get its echo meanwhile, in seconds.
SILENCE = 0.6
FAULT = (
    *("--faults.boom.trigger", "boom\r\n", "--faults.boom.action", "raise"),
    *("--listeners.lab.address", "127.0.0.1:0", "--listeners.lab.fault", "boom"),
)


def asleep(server: DaemonView) -> bool:
    """Return whether the server waits in a system call."""
    return Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def unread(client: socket.socket) -> int:
    """Return the number of bytes from the client that the server has not read."""
    ends = [f"0100007F:{port:04X}" for port in (client.getpeername()[1], client.getsockname()[1])]
    for line in Path("/proc/net/tcp").read_text().splitlines():
        fields = line.split()
        if fields[1:3] == ends:
            return int(fields[4].partition(":")[2], 16)
    message = "the server's end of the connection is gone"
    raise AssertionError(message)


# Steps 1 to 4: the waiting of one client for another.


def test_the_second_client_is_never_served() -> None:
    """The server for one client lets a second one connect, but never echoes its data."""
    with Step(ONE) as server:
        assert second_client(server, SILENCE) == (float("inf"), True)
        assert server.wait() == 0


def test_the_second_client_waits_for_the_first() -> None:
    """If clients are served in turn, a silent client blocks the next one until it leaves."""
    with Step(TURN) as server:
        wait = second_client(server, SILENCE)
        assert wait.outlasted
        assert wait.seconds < float("inf")


def test_a_served_client_waits_for_the_next() -> None:
    """If clients are served in turn, the second line of a client is read only after another client connects."""
    with Step(TURN) as server, connect(server) as client:
        assert converse(client) == b"hello\r\n"
        client.sendall(b"again\r\n")
        until(lambda: asleep(server))
        assert unread(client) == 7
        with connect(server):
            assert receive(client, 7) == b"again\r\n"


@pytest.mark.parametrize("step", [BUSY, SELECTORS, TASKS, SHUTDOWN])
def test_a_silent_client_blocks_no_other(step: str) -> None:
    """From step 3 on, the second client gets its echo while the first one is connected and silent."""
    with Step(step) as server:
        assert not second_client(server, PATIENCE).outlasted


def test_a_bare_accept_fails() -> None:
    """Without a pending connection, a non-blocking `accept` raises an error, which step 3 has to suppress."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_the_busy_loop_burns_a_core() -> None:
    """With one silent client, the busy loop uses more than half of the available CPU. In fact it uses all of it."""
    with Step(BUSY) as server:
        assert idle(server, 0.5) > 0.5


@pytest.mark.parametrize("step", [ONE, TURN, SELECTORS, TASKS, SHUTDOWN])
def test_the_other_steps_idle(step: str) -> None:
    """With one silent client, the other steps use almost no CPU."""
    with Step(step) as server:
        assert idle(server, 0.4) < 0.05


def test_echod_idles_and_serves_the_second_client(start: Start) -> None:
    """With one silent client, echod uses almost no CPU and serves a second client."""
    daemon = start()
    assert idle(daemon, 0.4) < 0.05
    assert not second_client(daemon, PATIENCE).outlasted


@pytest.mark.parametrize("step", [TURN, BUSY, SELECTORS])
def test_one_reset_ends_the_server(step: str) -> None:
    """If all clients share one loop, a reset by one of them ends the server."""
    with Step(step) as server, connect(server) as innocent, connect(server) as client:
        converse(innocent)
        reset(client)
        if step == TURN:  # visits its clients after the next accept, and reads from the first one
            innocent.sendall(b"hello\r\n" * 2)
        server.wait_for("ConnectionResetError")
        assert server.wait() == 1


# Steps 5 and 6: errors.


def test_boom_is_never_retrieved() -> None:
    """Without a reference to the task, asyncio reports its error without naming the client. Others are still served."""
    with Step(TASKS) as server, connect(server) as other, connect(server) as client:
        client.sendall(BOOM)
        server.wait_for("Task exception was never retrieved")
        server.wait_for("RuntimeError: boom")
        assert str(client.getsockname()[1]) not in server.output
        assert converse(other) == b"hello\r\n"


def test_boom_is_never_shown() -> None:
    """If a list keeps the task, its error is never reported, and the client hangs."""
    with Step(TASKS, "keep") as server, connect(server) as other, connect(server) as client:
        client.sendall(BOOM)
        assert converse(other) == b"hello\r\n"
        until(lambda: asleep(server))
        assert unread(client) == 0
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        assert server.output.count("\n") == 1, "only the address is printed"
        server.send_signal(signal.SIGTERM)
        assert server.wait() == -signal.SIGTERM
        assert "boom" not in server.output


def test_boom_is_logged() -> None:
    """Step 6 logs the error and closes the client."""
    with Step(SHUTDOWN) as server, connect(server) as other, connect(server) as client:
        assert converse(client, BOOM) == b""
        server.wait_for("a client failed")
        server.wait_for("RuntimeError: boom")
        assert converse(other) == b"hello\r\n"


def test_boom_in_echod(start: Start) -> None:
    """The daemon logs one event that names the client. That client gets EOF, and others are still served."""
    daemon = start(*FAULT, listen=None)
    with connect(daemon) as other, connect(daemon) as client:
        assert converse(client, BOOM) == b""
        failure = daemon.wait_for("client_failed")
        assert failure["peer"] == "{}:{}".format(*client.getsockname())
        assert "InjectedFault" in str(failure)
        assert converse(other) == b"hello\r\n"


# Steps 5 and 6: a stop.

# Half of the clients finish within the two seconds of step 6. All of them finish within the seven seconds of echod.
CLIENTS, SHORT, LONG = 6, 0.3, 2.5


@pytest.mark.parametrize("step", STEPS[:-1])
def test_a_stop_cuts_off_all_clients(step: str) -> None:
    """Up to step 5, a signal cuts off all clients at once."""
    with Step(step) as server:
        loss = stop(server, CLIENTS, SHORT, LONG)
        assert (loss.clients, server.wait()) == (CLIENTS, -signal.SIGTERM)
        assert loss.size > 0


def test_a_stop_gives_two_seconds() -> None:
    """Step 6 cuts off the clients that do not finish within two seconds."""
    with Step(SHUTDOWN) as server:
        assert stop(server, CLIENTS, SHORT, LONG).clients == CLIENTS / 2
        assert server.wait() == 0


def test_a_stop_of_echod_loses_nothing(start: Start) -> None:
    """In echod, all clients finish."""
    daemon = start()
    assert stop(daemon, CLIENTS, SHORT, LONG) == Loss(0, 0)
    assert daemon.wait() == 0
    assert daemon.receipt()["completed"] == CLIENTS


def test_the_drain_accepts() -> None:
    """Step 6 serves a client that connects during the drain, but gives it no two seconds of its own."""
    with Step(SHUTDOWN) as server, connect(server) as silent:
        assert converse(silent) == b"hello\r\n"
        server.send_signal(signal.SIGTERM)
        server.wait_for("draining 1 tasks")
        with connect(server) as late:
            assert converse(late) == b"hello\r\n"
            # The two seconds of the silent client end the connection of this one, in the middle of its data.
            while echo := converse(late):
                assert echo == b"hello\r\n"
        assert server.wait() == 0


def test_the_drain_of_echod_refuses(start: Start) -> None:
    """In echod, the listening socket is closed when the drain begins, so a late client is refused."""
    daemon = start(*UNHURRIED)
    with connect(daemon) as talking:
        assert converse(talking) == b"hello\r\n"
        daemon.send_signal(signal.SIGTERM)
        until(lambda: not daemon.listens())
        with pytest.raises(ConnectionRefusedError):
            connect(daemon)
        assert converse(talking) == b"hello\r\n"
        talking.shutdown(socket.SHUT_WR)
        assert talking.recv(1) == b""
    assert daemon.wait() == 0


def test_an_error_ends_the_drain_for_all() -> None:
    """In step 6, the first error ends the drain for all clients, even with an hour left. Later errors are lost."""
    with Step(SHUTDOWN, "3600") as server:
        for client in [connect(server) for _ in range(2)]:
            assert converse(client) == b"hello\r\n"
            reset(client)
        server.wait_for("ConnectionResetError", count=2)
        with connect(server) as innocent:
            assert converse(innocent) == b"hello\r\n"
            assert "Errno 107" not in server.output, "both tasks have failed, but without a report"
            server.send_signal(signal.SIGTERM)
            assert innocent.recv(1) == b""
        assert server.wait() == 1
        assert server.output.count(", in drain\n") == 1, "only one of the two errors is reported"


def test_an_error_in_echod_hides_none(start: Start) -> None:
    """In echod, every error during the drain is logged, and the other clients keep their time."""
    daemon = start(*FAULT, *UNHURRIED, listen=None)
    clients = [connect(daemon) for _ in range(4)]
    innocent, resetting, *failing = clients
    for client in clients:
        assert converse(client) == b"hello\r\n"
    daemon.send_signal(signal.SIGTERM)
    daemon.wait_for("draining")
    reset(resetting)
    for client in failing:
        assert converse(client, BOOM) == b""
    daemon.wait_for("client_failed", count=2)
    assert converse(innocent) == b"hello\r\n"
    for client in (innocent, *failing):
        client.close()
    assert daemon.wait() == 0
    receipt = daemon.receipt()
    assert (receipt["clients"], receipt["failed"]) == (4, 2)


# The page.


def test_the_cost_of_two_bytes_a_call() -> None:
    """Reading two bytes at a time costs a multiple of reading a message at once."""
    with Step(ONE) as blocking, Step(SELECTORS) as selecting:
        assert cost(blocking, 1, 500) > 3 * cost(selecting, 1, 500)


def test_table_and_picture_are_of_one_measurement() -> None:
    """The picture shows every figure of the table in docs/explanation/evolution.md."""
    rows = re.findall(r"^\| (?:[1-6] |echod).*$", (DOCS / "evolution.md").read_text(), re.MULTILINE)
    assert len(rows) == 7
    picture = re.findall(r">([^<]+)</text>", (DOCS / "evolution.svg").read_text())
    assert picture[4:] == [cell.strip() for row in rows for cell in row.strip("|").split("|")]
