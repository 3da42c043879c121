"""Test that each step of examples/evolution has the flaws it describes, and that echod has none of them.

Bounds of CPU use are wide: the cases that a test tells apart differ by a multiple.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import signal
import socket
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest

from harness import PATIENCE, UNHURRIED, receive, reset, until
from measure import NAMES
from scenes import HERE, MESSAGE, STEPS, Loss, Step, connect, converse, cost, idle, second_client, stop
from step7_protocol import Client, main

if TYPE_CHECKING:
    from harness import Start
    from scenes import DaemonView

pytestmark = pytest.mark.once

ONE, TURN, BUSY, SELECTORS, TASKS, SHUTDOWN, PROTOCOL = STEPS
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


@pytest.mark.parametrize("step", [BUSY, SELECTORS, TASKS, SHUTDOWN, PROTOCOL])
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


@pytest.mark.parametrize("step", [ONE, TURN, SELECTORS, TASKS, SHUTDOWN, PROTOCOL])
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


@pytest.mark.parametrize("step", [ONE, TURN, BUSY, SELECTORS, TASKS])
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


# Step 7.


def test_boom_in_step_7() -> None:
    """The log names the client. It gets EOF after its earlier echo, and others are still served."""
    with Step(PROTOCOL) as server, connect(server) as other, connect(server) as client:
        assert converse(client) == b"hello\r\n"
        assert converse(client, BOOM) == b""
        server.wait_for("client {}:{} failed".format(*client.getsockname()))
        server.wait_for("RuntimeError")
        assert converse(other) == b"hello\r\n"
        assert server.output.count("Traceback") == 1


def test_a_reset_in_step_7() -> None:
    """A client that resets affects no other, and the log names it."""
    with Step(PROTOCOL) as server, connect(server) as innocent, connect(server) as client:
        assert converse(client) == b"hello\r\n"
        name = "client {}:{} failed".format(*client.getsockname())
        reset(client)
        server.wait_for(name)
        server.wait_for("ConnectionResetError")
        assert converse(innocent) == b"hello\r\n"


def test_a_client_of_step_7_that_does_not_read() -> None:
    """Step 7 stops reading from a client that does not read, and serves the others. The client gets all its echo."""
    with Step(PROTOCOL) as server, connect(server) as greedy, connect(server) as other:
        greedy.setblocking(False)
        block, sent = MESSAGE * 128, b""
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += block[: greedy.send(block)]
        assert converse(other) == b"hello\r\n"
        greedy.settimeout(PATIENCE)
        assert receive(greedy, len(sent)) == sent


def test_a_stop_of_step_7_loses_nothing() -> None:
    """If all clients finish within the seconds of step 7, none of them loses a byte."""
    with Step(PROTOCOL, "60") as server:
        assert stop(server, CLIENTS, SHORT, LONG) == Loss(0, 0)
        assert server.wait() == 0
        assert "Traceback" not in server.output


def test_the_deadline_of_step_7() -> None:
    """At the deadline, the server sends FIN to each client. It does not wait long for theirs."""
    with Step(PROTOCOL, "0") as server, connect(server) as silent, connect(server) as leaving:
        for client in (silent, leaving):
            assert converse(client) == b"hello\r\n"
        server.send_signal(signal.SIGTERM)
        assert leaving.recv(1) == b""
        leaving.close()
        assert silent.recv(1) == b""
        assert server.wait() == 0
        assert "Traceback" not in server.output


def test_late_data_in_step_7() -> None:
    """After FIN, step 7 discards data, also while the write buffer is full. Unread data would reset the connection."""
    transport = Mock(spec=asyncio.Transport)

    async def finish() -> None:
        client = Client()
        client.connection_made(transport)
        client.pause_writing()
        client.finish()
        client.data_received(b"late")

    asyncio.run(finish())
    assert [name for name, *_ in transport.method_calls] == ["pause_reading", "resume_reading", "write_eof"]


def test_the_drain_of_step_7_refuses() -> None:
    """Clients in the backlog are served. A later client is refused."""
    with Step(PROTOCOL, "60") as server:
        server.address  # noqa: B018  (it waits until the server listens)
        server.send_signal(signal.SIGSTOP)
        waiting = [connect(server) for _ in range(CLIENTS)]
        server.send_signal(signal.SIGTERM)
        server.send_signal(signal.SIGCONT)
        server.wait_for(f"draining {CLIENTS} clients")
        with pytest.raises(ConnectionRefusedError):
            connect(server)
        for client in waiting:
            assert converse(client) == b"hello\r\n"
            client.close()
        assert server.wait() == 0


def test_step_7_serves_the_backlog(capsys: pytest.CaptureFixture[str]) -> None:
    """A client that connects right before the listening socket is closed is served."""

    async def scene() -> None:
        server = asyncio.create_task(main(0, 60))
        await asyncio.sleep(0)
        address = "127.0.0.1", int(capsys.readouterr().out.rpartition(":")[2])
        signal.raise_signal(signal.SIGTERM)
        clients = []
        with contextlib.suppress(ConnectionRefusedError):
            while True:  # one per iteration of the loop
                clients.append(socket.create_connection(address, PATIENCE))
                await asyncio.sleep(0)
        assert clients
        for client in clients:
            assert await asyncio.to_thread(converse, client) == b"hello\r\n"
            client.close()
        await server

    asyncio.run(scene())


def test_step_7_does_not_pause() -> None:
    """Without a free descriptor, the accept of step 7 fails in every turn of the loop."""
    with Step(PROTOCOL) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(2)]
        for client in clients:
            assert converse(client) == b"hello\r\n"
        used = len(list(Path(f"/proc/{server.pid}/fd").iterdir()))
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (used, used))
        stack.enter_context(connect(server))
        server.wait_for("Too many open files", count=10)
        assert converse(clients[0]) == b"hello\r\n"


def test_an_error_in_step_7_hides_none() -> None:
    """Every error during the drain is logged with its client, and the other clients keep their time."""
    with Step(PROTOCOL, "60") as server:
        clients = [connect(server) for _ in range(4)]
        innocent, resetting, *failing = clients
        for client in clients:
            assert converse(client) == b"hello\r\n"
        names = ["client {}:{} failed".format(*client.getsockname()) for client in (resetting, *failing)]
        server.send_signal(signal.SIGTERM)
        server.wait_for("draining 4 clients")
        reset(resetting)
        for client in failing:
            assert converse(client, BOOM) == b""
            client.close()
        for name in names:
            server.wait_for(name)
        assert converse(innocent) == b"hello\r\n"
        innocent.close()
        assert server.wait() == 0
        assert server.output.count("Traceback") == 3


# The page.


def test_the_cost_of_two_bytes_a_call() -> None:
    """Reading two bytes at a time costs a multiple of reading a message at once."""
    with Step(ONE) as blocking, Step(SELECTORS) as selecting:
        assert cost(blocking, 1, 500) > 3 * cost(selecting, 1, 500)


def test_table_and_picture_are_of_one_measurement() -> None:
    """The picture shows every figure of the table. The page says so if a step has not been measured."""
    page = (DOCS / "evolution.md").read_text()
    rows = [line.strip("|").split("|") for line in re.findall(r"^\| (?:[1-7] |echod).*$", page, re.MULTILINE)]
    names = [name.strip() for name, *_ in rows]
    if "Step 7 has not been measured yet." in page:
        names.insert(6, NAMES[6])
    assert names == list(NAMES)
    picture = re.findall(r">([^<]+)</text>", (DOCS / "evolution.svg").read_text())
    assert picture[4:] == [cell.strip() for row in rows for cell in row]


def test_excerpts() -> None:
    """Each excerpt on the page is a part of its step, and the last step has fewer than 100 lines."""
    sections = re.split(r"^## ([1-7])\. ", (DOCS / "evolution.md").read_text(), flags=re.MULTILINE)[1:]
    sources = [(HERE / f"{step}.py").read_text() for step in STEPS]
    wrong = []
    for number, section in zip(sections[::2], sections[1::2], strict=True):
        excerpts = re.findall(r"^```python\n(.*?)^```", section.partition("\n## ")[0], re.DOTALL | re.MULTILINE)
        assert excerpts, f"step {number} has no excerpt"
        source = sources[int(number) - 1]
        wrong += [
            text for text in excerpts if not any(indent(text, " " * depth) in source for depth in range(0, 17, 4))
        ]
    assert wrong == []
    assert len(sections) == 2 * len(STEPS)
    assert sources[-1].count("\n") < 100
