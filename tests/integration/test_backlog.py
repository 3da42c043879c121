"""Failures of accept(2), in a running server and in a stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from echod.net.listeners import ListeningSocket
from echod.server.ledger import Ledger
from echod.server.server import Server
from echod.server.timeouts import Sweep
from harness import PATIENCE
from serving import run_in_loop, server_settings, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Unsteady(ListeningSocket):
    """A listening socket that fails to accept. The connection is gone, or no descriptor is left."""

    gone = 0
    full = 0
    broken = False

    def accept(self) -> tuple[socket.socket, Any]:
        if self.broken:
            defect()
        if self.full:
            self.full -= 1
            raise OSError(errno.EMFILE, "full")
        if self.gone:
            self.gone -= 1
            raise ConnectionAbortedError(errno.ECONNABORTED, "gone")
        return super().accept()


def serving(loop_name: str, scene: Callable[[Server, Unsteady], Awaitable[None]], **limits: Any) -> None:
    """Run a scene with a server in the loop under test, and shut the server down."""

    async def main() -> None:
        listening = Unsteady(socket.create_server(("127.0.0.1", 0)))
        listening.sock.setblocking(False)
        settings = server_settings(limits=limits, shutdown={"quiet_period": 0.1, "drain_timeout": 1})
        server = Server([listening], settings, Ledger(structlog.wrap_logger(structlog.ReturnLogger()), "none"))
        server.start()
        await asyncio.sleep(0)
        await scene(server, listening)
        receipt = await server.shutdown()
        assert receipt.unacked_bytes == 0

    run_in_loop(loop_name, main)


async def echo(listening: Unsteady) -> None:
    """Connect a client and check its echo."""
    reader, writer = await asyncio.open_connection(*listening.sock.getsockname())
    writer.write(b"x")
    assert await asyncio.wait_for(reader.read(1), PATIENCE) == b"x"
    writer.close()
    await writer.wait_closed()


def test_connections_that_are_gone(loop_name: str) -> None:
    """If accept(2) fails because its connection is gone, the next one is served, also in a stop."""

    async def scene(_: Server, listening: Unsteady) -> None:
        listening.gone = 2
        await echo(listening)
        assert listening.gone == 0
        listening.gone = 2

    serving(loop_name, scene)


def test_connections_that_are_always_gone(loop_name: str) -> None:
    """If accept(2) never succeeds, a stop abandons the backlog at the end of the drain."""

    async def scene(server: Server, listening: Unsteady) -> None:
        listening.gone = sys.maxsize
        with socket.create_connection(listening.sock.getsockname()):
            assert (await server.shutdown()).clients == 0
        assert listening.sock.fileno() == -1

    serving(loop_name, scene)


def test_more_than_one_wake_up_takes(loop_name: str) -> None:
    """Clients beyond one batch are accepted in the next."""

    async def scene(server: Server, listening: Unsteady) -> None:
        clients = [socket.create_connection(listening.sock.getsockname()) for _ in range(100)]
        await until(lambda: server.clients == len(clients))
        for client in clients:
            client.close()

    serving(loop_name, scene, max_connections=1000)


def test_cap_in_the_middle_of_a_wake_up(loop_name: str) -> None:
    """If max_connections is reached in a batch, the next wake-up shows whether a client waits."""

    async def scene(server: Server, listening: Unsteady) -> None:
        clients = [socket.create_connection(listening.sock.getsockname()) for _ in range(3)]
        await until(lambda: server.accept_paused)
        assert server.clients == 2
        for client in clients:
            client.close()
        await until(lambda: not server.accept_paused)
        assert server.ledger.counters.accept_pauses == 1

    serving(loop_name, scene, max_connections=2)


def test_no_descriptors_for_a_while(loop_name: str) -> None:
    """However often accept(2) fails for lack of descriptors, it is one pause, and the client is served after it."""

    async def scene(server: Server, listening: Unsteady) -> None:
        listening.full = 2
        await echo(listening)
        assert (listening.full, server.ledger.counters.accept_pauses) == (0, 1)

    serving(loop_name, scene)


@pytest.mark.parametrize("waiting", [False, True])
def test_no_descriptors_in_a_stop(loop_name: str, waiting: bool) -> None:
    """The listening socket is closed if no client waits. Otherwise the drain tries again when a client has left."""

    async def scene(server: Server, listening: Unsteady) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as clients:
            staying = clients.enter_context(socket.create_connection(listening.sock.getsockname()))
            await until(lambda: server.clients)
            listening.full = sys.maxsize
            if waiting:
                clients.enter_context(socket.create_connection(listening.sock.getsockname()))
            stop = loop.create_task(server.shutdown())
            await until(lambda: listening.full < sys.maxsize)
            for _ in range(5):
                await asyncio.sleep(0)
            assert (listening.sock.fileno() != -1, server.clients) == (waiting, 1)
            listening.full = 0
            staying.close()
            await until(lambda: server.ledger.counters.accepted > waiting and listening.sock.fileno() == -1)
        assert (await stop).clients == 1 + waiting

    serving(loop_name, scene)


def test_aborted_before_it_stops(loop_name: str) -> None:
    """After `abort`, a stop resets the clients at once and closes the listening socket."""

    async def scene(server: Server, listening: Unsteady) -> None:
        with socket.create_connection(listening.sock.getsockname()) as client:
            await until(lambda: server.clients)
            server.abort()
            assert (await server.shutdown()).aborted == 1
            assert listening.sock.fileno() == -1
            with pytest.raises(ConnectionResetError):
                client.recv(1)

    serving(loop_name, scene)


@pytest.mark.parametrize("broken", ["listener task", "sweep"])
def test_defect_in_a_task_of_the_server(loop_name: str, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """`wait_failed` returns the exception of the listener task or the sweep. The clients are drained all the same."""

    async def scene(server: Server, listening: Unsteady) -> None:
        with socket.create_connection(listening.sock.getsockname()) as client:
            await until(lambda: server.clients)
            if broken == "sweep":
                monkeypatch.setattr(Sweep, "sweep", defect)
                failure = await server.wait_failed()
            else:
                listening.broken = True
                with socket.create_connection(listening.sock.getsockname()):
                    failure = await server.wait_failed()
                    listening.broken = False
                    await server.shutdown()
            assert isinstance(failure, ArithmeticError)
            assert server.failure is failure
            client.sendall(b"x")
            receipt = await server.shutdown()
            assert (receipt.clients, receipt.quiet) == ((1, 1) if broken == "sweep" else (2, 2))

    serving(loop_name, scene, idle_timeout=0.04)


def test_first_defect_is_kept(loop_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the first exception if the other task of the server fails too."""

    async def scene(server: Server, listening: Unsteady) -> None:
        monkeypatch.setattr(Sweep, "sweep", defect)
        failure = await server.wait_failed()
        listening.broken = True
        with socket.create_connection(listening.sock.getsockname()):
            await until(server._tasks[0].done)
            listening.broken = False
            await server.shutdown()
        assert server.failure is failure

    serving(loop_name, scene, idle_timeout=0.04)


def defect(*_: object) -> None:
    """Fail as a defect would."""
    raise ArithmeticError
