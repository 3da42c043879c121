"""Test accepting while system calls or this program fail. The counters stay correct."""

from __future__ import annotations

import asyncio
import errno
import select
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from structlog.testing import CapturingLogger

from echod.net import kernel
from echod.net.listeners import ListeningSocket
from echod.server import server
from echod.server.ledger import Ledger
from echod.server.server import Server
from echod.server.sessions import new_session
from harness import PATIENCE, UNHURRIED
from serving import run_in_loop, server_settings, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from echod.connection.echo import EchoSession
    from harness import Start

    Scene = Callable[["Serving"], Awaitable[None]]


class Serving:
    """A server in the loop under test, its log, and a switch that makes epoll_ctl(2) fail."""

    def __init__(self, patch: pytest.MonkeyPatch, **sections: Any) -> None:
        patient = {"quiet_period": PATIENCE, "drain_timeout": PATIENCE, "linger_timeout": PATIENCE}
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        self.address = listening.getsockname()
        self.log = CapturingLogger()
        self.server = Server(
            [ListeningSocket(listening)],
            server_settings(**{"shutdown": patient, **sections}),
            Ledger(structlog.wrap_logger(self.log, []), "all"),
        )
        self.failures: list[OSError] = []
        loop: Any = asyncio.get_running_loop()
        # In asyncio, transports and add_reader() both use the selector. In uvloop only add_reader() can fail. For the
        # socket of a transport, libuv aborts the process instead.
        owner, name = (loop._selector, "register") if hasattr(loop, "_selector") else (type(loop), "add_reader")
        register = getattr(owner, name)

        def registering(*arguments: Any) -> Any:
            if self.failures:
                raise self.failures.pop()
            return register(*arguments)

        patch.setattr(owner, name, registering)

    def fail(self, times: int) -> None:
        self.failures.extend(OSError(errno.ENOSPC, "no space") for _ in range(times))

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Return the logged events with that name."""
        return [call.kwargs for call in self.log.calls if call.kwargs["event"] == event]


@pytest.fixture
def serve(loop_name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs a scene with a server. The scene stops the server."""

    def serve(scene: Scene, **sections: Any) -> None:
        async def main() -> None:
            await scene(Serving(monkeypatch, **sections))

        run_in_loop(loop_name, main)

    return serve


def echo(client: socket.socket) -> bytes:
    client.sendall(b"x")
    return client.recv(1)


def test_listening_sockets_cannot_be_watched_at_the_start(serve: Callable[..., None]) -> None:
    """Pause and try again if epoll_ctl(2) fails for the listening socket. The pause is logged and counted."""

    async def scene(serving: Serving) -> None:
        serving.fail(2)
        serving.server.start()
        with socket.create_connection(serving.address, PATIENCE) as client:
            assert await asyncio.to_thread(echo, client) == b"x"
            await until(lambda: serving.lines("accept_resumed"))
            assert [line["cause"] for line in serving.lines("accept_paused")] == ["ENOSPC"]
            assert serving.server.ledger.counters.accept_pauses == 1
            assert serving.failures == []
        assert (await serving.server.shutdown()).clients == 1

    serve(scene)


def test_listening_sockets_cannot_be_watched_after_the_cap(serve: Callable[..., None]) -> None:
    """Log a second cause and try again if epoll_ctl(2) fails after a pause at max_connections."""

    async def scene(serving: Serving) -> None:
        serving.server.start()
        with socket.create_connection(serving.address, PATIENCE) as first:
            assert await asyncio.to_thread(echo, first) == b"x"
            with socket.create_connection(serving.address, PATIENCE) as second:
                await until(lambda: serving.server.accept_paused)
                serving.fail(1)
                first.close()
                assert await asyncio.to_thread(echo, second) == b"x"
                await until(lambda: serving.lines("accept_resumed"))
        assert [line["cause"] for line in serving.lines("accept_paused")] == ["max_connections", "ENOSPC"]
        assert serving.server.ledger.counters.accept_pauses == 2
        assert len(serving.lines("accept_resumed")) == 1
        assert (await serving.server.shutdown()).failed == 0

    serve(scene, limits={"max_connections": 1})


def test_descriptors_run_out_during_a_wake_up(serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not pause if accept(2) fails after another client was accepted and no further client waits."""
    accept = ListeningSocket.accept
    calls = []

    def second_fails(self: ListeningSocket) -> tuple[socket.socket, Any]:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EMFILE, "full")
        return accept(self)

    monkeypatch.setattr(ListeningSocket, "accept", second_fails)

    async def scene(serving: Serving) -> None:
        clients = [socket.create_connection(serving.address, PATIENCE) for _ in range(2)]
        serving.server.start()
        for client in clients:
            assert await asyncio.to_thread(echo, client) == b"x"
            client.close()
        assert serving.server.ledger.counters.accept_pauses == 0
        await serving.server.shutdown()

    serve(scene)
    assert len(calls) > 3


def watches_clients() -> bool:
    """Return whether the running loop registers clients where the server can handle a failure."""
    return isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop)


def test_client_cannot_be_watched(serve: Callable[..., None]) -> None:
    """Serve a client after a pause if epoll_ctl(2) fails for it on asyncio. The pause is logged and counted."""

    async def scene(serving: Serving) -> None:
        serving.server.start()
        await asyncio.sleep(0)
        serving.fail(3 if watches_clients() else 0)
        with socket.create_connection(serving.address, PATIENCE) as client:
            assert await asyncio.to_thread(echo, client) == b"x"
        await until(lambda: not serving.server.clients)
        causes = [line["cause"] for line in serving.lines("accept_paused")]
        assert causes == (["ENOSPC"] if watches_clients() else [])
        account = serving.server.ledger.counters
        assert (account.accepted, account.accept_pauses) == (1, len(causes))
        assert not serving.server.accept_paused
        await serving.server.shutdown()

    serve(scene)


@pytest.mark.parametrize("refusal", ["client_limit", "proxy_header"])
def test_refused_client_is_not_watched(serve: Callable[..., None], refusal: str) -> None:
    """Serve a client that gets the descriptor of a refused client."""

    async def scene(serving: Serving) -> None:
        serving.server.start()
        await asyncio.sleep(0)
        settings = serving.server.settings
        if refusal == "proxy_header":
            strict = server_settings(proxy_protocol="require", proxy_trusted=["192.0.2.0/24"])
            serving.server.reconfigure(settings._replace(listener=strict.listener))
        with socket.create_connection(serving.address, PATIENCE) as first:
            if refusal == "client_limit":
                assert await asyncio.to_thread(echo, first) == b"x"
            with socket.create_connection(serving.address, PATIENCE) as refused:
                assert await asyncio.to_thread(refused.recv, 1) == b""
            serving.server.reconfigure(server_settings())
            with socket.create_connection(serving.address, PATIENCE) as second:
                assert await asyncio.to_thread(echo, second) == b"x"
        await serving.server.shutdown()
        assert refusal in serving.server.ledger.counters.reasons

    serve(scene, limits={"max_connections_per_client": 1})


def test_client_that_cannot_be_watched_meets_a_stop(serve: Callable[..., None]) -> None:
    """Serve an unwatched client during a stop as soon as the kernel has memory to watch it."""

    async def scene(serving: Serving) -> None:
        serving.server.start()
        await asyncio.sleep(0)
        with socket.create_connection(serving.address, PATIENCE) as other:
            assert await asyncio.to_thread(echo, other) == b"x"
            serving.fail(1000 if watches_clients() else 0)
            with socket.create_connection(serving.address, PATIENCE) as client:
                client.sendall(b"y")
                await until(lambda: serving.server.accept_paused or not watches_clients())
                stop = asyncio.create_task(serving.server.shutdown())
                for _ in range(5):  # by then, the drain has tried to accept it
                    await asyncio.sleep(0)
                serving.failures.clear()
                other.close()
                assert await asyncio.to_thread(client.recv, 1) == b"y"
                client.close()
                receipt = await stop
                assert (receipt.clients, receipt.completed) == (2, 2)

    serve(scene)


def test_client_that_can_never_be_watched(serve: Callable[..., None]) -> None:
    """Reset an unwatched client at the deadline of a stop, and count it as abandoned backlog."""

    async def scene(serving: Serving) -> None:
        serving.server.start()
        await asyncio.sleep(0)
        serving.fail(1000 if watches_clients() else 0)
        with socket.create_connection(serving.address, PATIENCE) as client:
            client.sendall(b"y")
            await until(lambda: serving.server.accept_paused or serving.server.clients)
            receipt = await serving.server.shutdown()
            assert receipt.clients == (not watches_clients())
            abandoned = [{"event": "backlog_abandoned", "clients": 1}] if watches_clients() else []
            assert serving.lines("backlog_abandoned") == abandoned
            if watches_clients():
                with pytest.raises(ConnectionResetError):
                    client.recv(1)

    serve(scene, shutdown={"quiet_period": 0, "drain_timeout": 0, "linger_timeout": 0})


@pytest.mark.parametrize("broken", ["Client", "_begin"])
def test_connection_that_cannot_become_a_client(
    serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Close and log the connection, and count it as `accept_failures` only. The next connection is served."""

    async def scene(serving: Serving) -> None:
        serving.server.start()
        await asyncio.sleep(0)
        with monkeypatch.context() as patch:

            def fail(first: Any, *_: object) -> None:
                if broken == "_begin":
                    first.close()
                raise MemoryError

            patch.setattr(server, broken, fail)
            with socket.create_connection(serving.address, PATIENCE) as client:
                assert await asyncio.to_thread(client.recv, 1) == b""
                peer = str(client.getsockname())
        with socket.create_connection(serving.address, PATIENCE) as client:
            assert await asyncio.to_thread(echo, client) == b"x"
        receipt = await serving.server.shutdown()
        account = serving.server.ledger.counters
        assert (account.accepted, account.accept_failures, account.reasons) == (1, 1, {"eof": 1})
        assert (receipt.clients, len(serving.lines("client_closed"))) == (receipt.completed, 1)
        (line,) = serving.lines("accept_failed")
        assert (line["peer"], type(line["exc_info"])) == (peer, MemoryError)

    serve(scene)


def test_number_of_a_faulty_connection(serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Number the connections of a listener from 1, so that a fault with a seed is repeatable."""
    numbers = []

    def note(sock: socket.socket, settings: Any, number: int, describe: Any) -> EchoSession:
        numbers.append(number)
        return new_session(sock, settings, number, describe)

    monkeypatch.setattr(server, "new_session", note)

    async def scene(serving: Serving) -> None:
        serving.server.start()
        for _ in range(2):
            with socket.create_connection(serving.address, PATIENCE) as client:
                assert await asyncio.to_thread(echo, client) == b"x"
        await serving.server.shutdown()

    serve(scene)
    assert numbers == [1, 2]


def test_backlog_of_unknown_length() -> None:
    """Ask poll(2) whether a connection waits if getsockopt(TCP_INFO) fails for lack of memory."""

    def fail(*_: object) -> bytes:
        raise OSError(errno.ENOBUFS, "no buffers")

    class Failing(socket.socket):
        getsockopt = fail  # type: ignore[assignment]

    with Failing() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        assert kernel.waiting_connections(listening) == 0
        with socket.create_connection(listening.getsockname()):
            assert select.select([listening], [], [], PATIENCE)[0]
            assert kernel.waiting_connections(listening) == 1


# The receipt


def test_receipt_covers_the_whole_stop(serve: Callable[..., None]) -> None:
    """Include clients in the receipt that leave between the signal and the first step of the stop."""

    async def scene(serving: Serving) -> None:
        serving.server.start()
        clients = [socket.create_connection(serving.address, PATIENCE) for _ in range(5)]
        await until(lambda: serving.server.clients == 5)
        before = len(serving.lines("client_closed"))
        assert serving.server.stop_deadlines is None
        assert serving.server.begin_stop() == 5
        for client in clients:
            client.close()
        await until(lambda: not serving.server.clients)
        assert serving.server.begin_stop() == 5
        receipt = await serving.server.shutdown()
        assert (receipt.clients, receipt.completed) == (5, 5)
        assert len(serving.lines("client_closed")) - before == 5

    serve(scene)


def test_receipt_of_a_paused_daemon(start: Start) -> None:
    """Keep receipt and events consistent if clients close while SIGTERM is pending for a paused daemon."""
    listeners = ("--listeners.a.address", "127.0.0.1:0", "--listeners.b.address", "127.0.0.1:0")
    daemon = start(*listeners, "--log.connections", "all", *UNHURRIED, listen=None)
    daemon.wait_for("listening", count=2)
    ports = [int(line["address"].rpartition(":")[2]) for line in daemon.all("listening")]
    clients = [socket.create_connection(("127.0.0.1", port), PATIENCE) for port in ports for _ in range(50)]
    assert [echo(client) for client in clients] == [b"x"] * 100
    daemon.freeze()
    daemon.send_signal(signal.SIGTERM)
    for client in clients:
        client.close()
    daemon.send_signal(signal.SIGCONT)
    assert daemon.wait() == 0
    receipt = daemon.receipt()
    names = [event["event"] for event in daemon.events]
    assert names[names.index("draining") :].count("client_closed") == receipt["clients"]
    assert daemon.wait_for("draining")["clients"] == receipt["clients"]
    assert daemon.wait_for("stopped")["connections"] == names.count("client_closed") == 100


def test_every_accept_is_forbidden(serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pause accepting while each accept(2) fails with EPERM. The connections stay in the backlog and are served later."""
    tries: list[int] = []

    async def scene(serving: Serving) -> None:
        allowed = asyncio.Event()
        accept = ListeningSocket.accept

        def forbid(listening: ListeningSocket) -> tuple[socket.socket, Any]:
            if allowed.is_set():
                return accept(listening)
            tries.append(0)
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(ListeningSocket, "accept", forbid)
        serving.server.start()
        with socket.create_connection(serving.address, PATIENCE) as client:
            await until(lambda: serving.server.accept_paused)
            allowed.set()
            assert await asyncio.to_thread(echo, client) == b"x"
            await until(lambda: serving.lines("accept_resumed"))
        assert [line["cause"] for line in serving.lines("accept_paused")] == ["EPERM"]
        assert (await serving.server.shutdown()).failed == 0

    serve(scene)
    assert tries


def test_listening_socket_fails_to_close(serve: Callable[..., None]) -> None:
    """Drain the clients even if a listening socket fails to close."""

    class Failing(socket.socket):
        def close(self) -> None:
            super().close()
            raise OSError(errno.EIO, "Input/output error")

    async def scene(serving: Serving) -> None:
        serving.server.start()
        with socket.create_connection(serving.address, PATIENCE) as client:
            assert await asyncio.to_thread(echo, client) == b"x"
            (listening,) = serving.server._listener._sockets
            plain = listening.sock
            listening.sock = Failing(fileno=plain.detach())
            stop = asyncio.ensure_future(serving.server.shutdown())
            assert await asyncio.to_thread(echo, client) == b"x"
            client.close()
            assert (await stop).completed == 1

    serve(scene)
