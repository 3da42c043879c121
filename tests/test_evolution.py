"""The steps of examples/evolution do what they say, flaws included; and echod in the same scenes.

Where a test compares times or CPU, its bounds are wide: what it tells apart differs by a multiple.
"""

from __future__ import annotations

import re
import signal
import socket
import time
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE, UNHURRIED, receive, reset, until
from scenes import HERE, STEPS, Loss, Step, connect, converse, cost, idle, second_client, stop

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Start

pytestmark = pytest.mark.once

ONE, TURN, BUSY, SELECTORS, TASKS, SHUTDOWN = STEPS
DOCS = HERE.parents[1] / "docs"
BOOM = b"boom\r\n"
# How long the first client of a scene is silent, seconds: long beside any delay of a busy machine.
SILENCE = 0.6
FAULT = (
    *("--faults.boom.trigger", "boom\r\n", "--faults.boom.action", "raise"),
    *("--listeners.lab.address", "127.0.0.1:0", "--listeners.lab.fault", "boom"),
)


# Step 1 to 4: who waits, and for what.


def test_the_second_client_is_never_served() -> None:
    """The server for one client lets a second one connect, and leaves it without an answer to its end."""
    with Step(ONE) as server:
        assert second_client(server, SILENCE) is None
        assert server.wait() == 0


def test_the_second_client_waits_for_the_first() -> None:
    """Clients in turn: a silent one holds up the other, until it leaves."""
    with Step(TURN) as server:
        waited = second_client(server, SILENCE)
        assert waited is not None
        assert waited > 0.9 * SILENCE


def test_a_served_client_waits_for_the_next() -> None:
    """Clients in turn: the second line of one is read when another connects, and not before."""
    with Step(TURN) as server, connect(server) as client:
        assert converse(client) == b"hello\r\n"
        client.sendall(b"again\r\n")
        client.settimeout(SILENCE / 2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(PATIENCE)
        with connect(server):
            assert receive(client, 7) == b"again\r\n"


@pytest.mark.parametrize("step", [BUSY, SELECTORS, TASKS, SHUTDOWN])
def test_nobody_waits(step: str) -> None:
    """From step 3 on, a silent client holds up nobody."""
    with Step(step) as server:
        waited = second_client(server, SILENCE)
        assert waited is not None
        assert waited < 0.8 * SILENCE


def test_a_bare_accept_fails(tmp_path: Path) -> None:
    """Without the `suppress` around it, the first non-blocking `accept` ends the server."""
    text = (HERE / f"{BUSY}.py").read_text()
    bare = tmp_path / "bare.py"
    bare.write_text(text.replace("with suppress(BlockingIOError):", "if True:", 1))
    with Step(bare) as server:
        server.wait_for("BlockingIOError: [Errno 11]")
        assert server.wait() == 1


def test_the_busy_loop_burns_a_core() -> None:
    """With one silent client it takes more than half of what CPU it can get: in truth all of it."""
    with Step(BUSY) as server:
        assert idle(server, 0.5) > 0.5


@pytest.mark.parametrize("step", [ONE, TURN, SELECTORS, TASKS, SHUTDOWN])
def test_the_others_idle(step: str) -> None:
    """With one silent client they take next to nothing."""
    with Step(step) as server:
        assert idle(server, 0.4) < 0.05


def test_echod_idles_and_lets_nobody_wait(start: Start) -> None:
    """The same two scenes with echod."""
    daemon = start()
    assert idle(daemon, 0.4) < 0.05
    waited = second_client(daemon, SILENCE)
    assert waited is not None
    assert waited < 0.8 * SILENCE


@pytest.mark.parametrize("step", [TURN, BUSY, SELECTORS])
def test_one_reset_ends_it_for_all(step: str) -> None:
    """Where all clients live in one loop, the error of one is everybody's."""
    with Step(step) as server, connect(server) as innocent, connect(server) as client:
        converse(innocent)
        reset(client)
        if step == TURN:  # goes round again at the next accept, and waits for the first
            innocent.sendall(b"hello\r\n" * 2)
        server.wait_for("ConnectionResetError")
        assert server.wait() == 1


# Steps 5 and 6: errors.


def test_boom_is_never_retrieved() -> None:
    """A task that nobody keeps takes its error along; asyncio's words name no client, and the others go on."""
    with Step(TASKS) as server, connect(server) as other, connect(server) as client:
        client.sendall(BOOM)
        server.wait_for("Task exception was never retrieved")
        server.wait_for("RuntimeError: boom")
        assert str(client.getsockname()[1]) not in server.output
        assert converse(other) == b"hello\r\n"


def test_boom_is_never_shown() -> None:
    """A list that keeps the task keeps its error too: no word of it, and the client hangs."""
    with Step(TASKS, "keep") as server, connect(server) as other, connect(server) as client:
        client.sendall(BOOM)
        assert converse(other) == b"hello\r\n"
        client.settimeout(SILENCE)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert server.output.count("\n") == 1, "the line that says where it listens"
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
    """In echod a failure is one event that names its client; that one gets EOF, and the others go on."""
    daemon = start(*FAULT, listen=None)
    with connect(daemon) as other, connect(daemon) as client:
        assert converse(client, BOOM) == b""
        failure = daemon.wait_for("client_failed")
        assert failure["peer"] == "{}:{}".format(*client.getsockname())
        assert "InjectedFault" in str(failure)
        assert converse(other) == b"hello\r\n"


# Steps 5 and 6: a stop.

# Half of the clients are done within step 6's two seconds, half are not; all are within echod's seven.
CLIENTS, SHORT, LONG = 6, 0.3, 2.5


@pytest.mark.parametrize("step", STEPS[:-1])
def test_a_stop_cuts_off_everybody(step: str) -> None:
    """Until step 5, a signal ends everything where it stands."""
    with Step(step) as server:
        loss = stop(server, CLIENTS, SHORT, LONG)
        assert (loss.clients, server.wait()) == (CLIENTS, -signal.SIGTERM)
        assert loss.size > 0


def test_a_stop_gives_two_seconds() -> None:
    """Step 6 lets those finish who do within two seconds, and cuts off the others."""
    with Step(SHUTDOWN) as server:
        assert stop(server, CLIENTS, SHORT, LONG).clients == CLIENTS / 2
        assert server.wait() == 0


def test_a_stop_of_echod_loses_nothing(start: Start) -> None:
    """Echod lets them all finish."""
    daemon = start()
    assert stop(daemon, CLIENTS, SHORT, LONG) == Loss(0, 0)
    assert daemon.wait() == 0
    assert daemon.receipt()["completed"] == CLIENTS


def test_the_drain_accepts() -> None:
    """Step 6's first flaw: who connects during the drain is served, and then cut off in its sentence, without grace."""
    with Step(SHUTDOWN) as server, connect(server) as silent:
        assert converse(silent) == b"hello\r\n"
        server.send_signal(signal.SIGTERM)
        server.wait_for("draining 1 tasks")
        with connect(server) as late:
            assert converse(late) == b"hello\r\n"
            # The end of the silent one's two seconds is the end of this one, whatever it has just sent.
            while echo := converse(late):
                assert echo == b"hello\r\n"
        assert server.wait() == 0


def test_the_drain_of_echod_refuses(start: Start) -> None:
    """Echod has closed its listening socket when the drain begins; there is nobody to be surprised."""
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


def test_an_error_takes_the_time_of_all() -> None:
    """Step 6's second flaw: the first error ends the drain, at once for everybody; no other is looked at."""
    with Step(SHUTDOWN) as server:
        for client in [connect(server) for _ in range(2)]:
            assert converse(client) == b"hello\r\n"
            reset(client)
        server.wait_for("ConnectionResetError", count=2)
        with connect(server) as innocent:
            assert converse(innocent) == b"hello\r\n"
            assert "Errno 107" not in server.output, "both tasks have failed by now, and nobody knows"
            server.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert innocent.recv(1) == b""
            assert time.monotonic() - began < 2
        assert server.wait() == 1
        assert server.output.count(", in drain\n") == 1, "the drain has seen one of the two"


def test_an_error_in_echod_hides_none(start: Start) -> None:
    """Of clients that fail while echod drains, each is logged, and the others have their time."""
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
    """Reading two bytes at a time costs a multiple of what one call for all costs."""
    with Step(ONE) as blocking, Step(SELECTORS) as selecting:
        assert cost(blocking, 1, 500) > 3 * cost(selecting, 1, 500)


def test_table_and_picture_are_of_one_measurement() -> None:
    """Each figure of the table in docs/evolution.md stands in the picture too."""
    rows = re.findall(r"^\| (?:[1-6] |echod).*$", (DOCS / "evolution.md").read_text(), re.MULTILINE)
    assert len(rows) == 7
    picture = re.findall(r">([^<]+)</text>", (DOCS / "evolution.svg").read_text())
    assert picture[4:] == [cell.strip() for row in rows for cell in row.strip("|").split("|")]
