"""Accepting while the kernel or this program fails, and figures that are true whatever fails."""

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

from echod.connection.faults.profile import FaultProfile
from echod.connection.faults.session import FaultSession
from echod.net import kernel
from echod.net.listeners import ListeningSocket
from echod.server import server
from echod.server.client import AdmissionPolicy, Timeouts
from echod.server.drain import DrainSettings
from echod.server.ledger import Ledger
from echod.server.server import Server, ServerSettings
from echod.settings.model import FaultSettings, LimitsSettings, ShutdownSettings
from echod.settings.resources import loop_factory
from harness import PATIENCE, UNHURRIED

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from harness import Start

    Scene = Callable[["Serving"], Awaitable[None]]


class Serving:
    """A server in the loop under test, its log, and epoll_ctl(2) that can be made to fail."""

    def __init__(self, patch: pytest.MonkeyPatch, **settings: Any) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        self.address = listening.getsockname()
        self.log = CapturingLogger()
        self.server = Server(
            [ListeningSocket(listening)],
            ServerSettings(
                max_connections=settings.pop("max_connections", 10),
                timeouts=Timeouts(idle=0, write=30, handshake=10),
                limits=LimitsSettings(),
                shutdown=ShutdownSettings(),
                drain=settings.pop("drain", DrainSettings(0, PATIENCE, PATIENCE, PATIENCE)),
                **settings,
            ),
            Ledger(structlog.wrap_logger(self.log, []), "all"),
        )
        self.failures: list[OSError] = []
        loop: Any = asyncio.get_running_loop()
        # asyncio's transports and add_reader() both come by the selector. In uvloop only add_reader() can fail: of a
        # client's own socket, libuv aborts the process instead.
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
        """Return the log's lines of that name so far."""
        return [call.kwargs for call in self.log.calls if call.kwargs["event"] == event]

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():  # noqa: ASYNC110  (no event tells)
            await asyncio.sleep(0)


@pytest.fixture
def serve(loop_name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs a scene with a server, which it has to stop."""

    def serve(scene: Scene, **settings: Any) -> None:
        async def main() -> None:
            await asyncio.wait_for(scene(Serving(monkeypatch, **settings)), PATIENCE)

        with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
            runner.run(main())

    return serve


def echo(client: socket.socket) -> bytes:
    client.sendall(b"x")
    return client.recv(1)


def test_listening_sockets_cannot_be_watched_at_the_start(serve: Callable[..., None]) -> None:
    """epoll_ctl(2) fails for the listening socket: it is tried again, after a pause that is logged and counted."""

    async def scene(serving: Serving) -> None:
        serving.fail(2)
        serving.server.start()
        with socket.create_connection(serving.address, PATIENCE) as client:
            assert await asyncio.to_thread(echo, client) == b"x"
            await serving.until(lambda: serving.lines("accept_resumed"))
            assert [line["cause"] for line in serving.lines("accept_paused")] == ["ENOSPC"]
            assert serving.server.ledger.counters.accept_pauses == 1
            assert serving.failures == []
        assert (await serving.server.shutdown()).clients == 1

    serve(scene)


def test_listening_sockets_cannot_be_watched_after_the_cap(serve: Callable[..., None]) -> None:
    """At the cap a client leaves, and epoll_ctl(2) fails: it is tried again, and the second cause is logged too."""

    async def scene(serving: Serving) -> None:
        serving.server.start()
        with socket.create_connection(serving.address, PATIENCE) as first:
            assert await asyncio.to_thread(echo, first) == b"x"
            with socket.create_connection(serving.address, PATIENCE) as second:
                await serving.until(lambda: serving.server.accept_paused)
                serving.fail(1)
                first.close()
                assert await asyncio.to_thread(echo, second) == b"x"
                await serving.until(lambda: serving.lines("accept_resumed"))
        assert [line["cause"] for line in serving.lines("accept_paused")] == ["max_connections", "ENOSPC"]
        assert serving.server.ledger.counters.accept_pauses == 2
        assert len(serving.lines("accept_resumed")) == 1
        assert (await serving.server.shutdown()).failed == 0

    serve(scene, max_connections=1)


def test_pauses_double(serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pause after a failure is twice as long as the one before, up to a second; after a success it is short again."""
    pauses: list[float | None] = []

    async def scene(serving: Serving) -> None:
        hold = Server._hold

        def note(self: Server, cause: str, seconds: float | None) -> None:
            pauses.append(seconds)
            hold(self, cause, 0)

        monkeypatch.setattr(Server, "_hold", note)
        serving.fail(10)
        serving.server.start()
        await serving.until(lambda: serving.lines("accept_resumed"))
        assert serving.server._pause == pauses[0]
        await serving.server.shutdown()

    serve(scene)
    assert pauses == [0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0]


def test_descriptors_run_out_in_the_middle_of_a_wake_up(
    serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """accept(2) fails for the second of two clients: whether one has to wait shows at the next wake-up, and none has."""
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
    """Return whether the running loop registers clients where a failure can be met."""
    return isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop)


def test_client_cannot_be_watched(serve: Callable[..., None]) -> None:
    """epoll_ctl(2) fails for an accepted client on asyncio: it is served after a pause that is logged and counted."""

    async def scene(serving: Serving) -> None:
        serving.server.start()
        await asyncio.sleep(0)
        serving.fail(3 if watches_clients() else 0)
        with socket.create_connection(serving.address, PATIENCE) as client:
            assert await asyncio.to_thread(echo, client) == b"x"
        await serving.until(lambda: not serving.server.clients)
        causes = [line["cause"] for line in serving.lines("accept_paused")]
        assert causes == (["ENOSPC"] if watches_clients() else [])
        account = serving.server.ledger.counters
        assert (account.accepted, account.accept_pauses) == (1, len(causes))
        assert not serving.server.accept_paused
        await serving.server.shutdown()

    serve(scene)


@pytest.mark.parametrize("refusal", ["client_limit", "proxy_header"])
def test_refused_client_is_not_watched(serve: Callable[..., None], refusal: str) -> None:
    """The descriptor of a client that was refused is given to the next one, which is served."""

    async def scene(serving: Serving) -> None:
        serving.server.start()
        await asyncio.sleep(0)
        settings = serving.server.settings
        if refusal == "proxy_header":
            serving.server.reconfigure(settings._replace(admission=AdmissionPolicy([])))
        with socket.create_connection(serving.address, PATIENCE) as first:
            if refusal == "client_limit":
                assert await asyncio.to_thread(echo, first) == b"x"
            with socket.create_connection(serving.address, PATIENCE) as refused:
                assert await asyncio.to_thread(refused.recv, 1) == b""
            serving.server.reconfigure(settings._replace(admission=AdmissionPolicy(), max_connections_per_client=0))
            with socket.create_connection(serving.address, PATIENCE) as second:
                assert await asyncio.to_thread(echo, second) == b"x"
        await serving.server.shutdown()
        assert refusal in serving.server.ledger.counters.reasons

    serve(scene, max_connections_per_client=1)


def test_client_that_cannot_be_watched_meets_a_stop(serve: Callable[..., None]) -> None:
    """In a stop, it is served as soon as the kernel has memory for it."""

    async def scene(serving: Serving) -> None:
        serving.server.start()
        await asyncio.sleep(0)
        with socket.create_connection(serving.address, PATIENCE) as other:
            assert await asyncio.to_thread(echo, other) == b"x"
            serving.fail(1000 if watches_clients() else 0)
            with socket.create_connection(serving.address, PATIENCE) as client:
                client.sendall(b"y")
                await serving.until(lambda: serving.server.accept_paused or not watches_clients())
                stop = asyncio.create_task(serving.server.shutdown())
                await serving.until(lambda: serving.server._drain)
                serving.failures.clear()
                other.close()
                assert await asyncio.to_thread(client.recv, 1) == b"y"
                client.close()
                receipt = await stop
                assert (receipt.clients, receipt.completed) == (2, 2)

    serve(scene)


def test_client_that_can_never_be_watched(serve: Callable[..., None]) -> None:
    """At the deadline of a stop it is reset, and logged as one of those who wait in the backlog."""

    async def scene(serving: Serving) -> None:
        serving.server.start()
        await asyncio.sleep(0)
        serving.fail(1000 if watches_clients() else 0)
        with socket.create_connection(serving.address, PATIENCE) as client:
            client.sendall(b"y")
            await serving.until(lambda: serving.server.accept_paused or serving.server.clients)
            receipt = await serving.server.shutdown()
            assert receipt.clients == (not watches_clients())
            abandoned = [{"event": "backlog_abandoned", "clients": 1}] if watches_clients() else []
            assert serving.lines("backlog_abandoned") == abandoned
            if watches_clients():
                with pytest.raises(ConnectionResetError):
                    client.recv(1)

    serve(scene, drain=DrainSettings(0, 0, 0, 0))


@pytest.mark.parametrize("broken", ["Client", "_begin"])
def test_connection_that_cannot_become_a_client(
    serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """It is closed, logged and counted by itself; the totals count clients only, and the next connection is served."""

    async def scene(serving: Serving) -> None:
        serving.server.start()
        await asyncio.sleep(0)
        with monkeypatch.context() as patch:

            def fail(_: object, life: Any, *__: object) -> None:
                if broken == "_begin":
                    life.close()
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


def test_number_of_a_faulty_connection(loop_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first connection of a listener has the number 1, with which the seed of a fault begins."""
    numbers = []

    def note(*arguments: Any) -> Any:
        numbers.append(arguments[-1])
        return FaultSession(*arguments)

    monkeypatch.setattr(server, "FaultSession", note)

    async def scene(serving: Serving) -> None:
        serving.server.start()
        for _ in range(2):
            with socket.create_connection(serving.address, PATIENCE) as client:
                assert await asyncio.to_thread(echo, client) == b"x"
        await serving.server.shutdown()

    async def main() -> None:
        await scene(Serving(monkeypatch, fault=FaultProfile("none", FaultSettings())))

    with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
        runner.run(main())
    assert numbers == [1, 2]


def test_backlog_of_unknown_length() -> None:
    """If getsockopt(TCP_INFO) fails for want of memory, poll(2) still says whether any connection waits."""

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


def test_receipt_is_of_one_moment(serve: Callable[..., None]) -> None:
    """Clients that leave between the beginning of a stop and its first step are in the receipt."""

    async def scene(serving: Serving) -> None:
        serving.server.start()
        clients = [socket.create_connection(serving.address, PATIENCE) for _ in range(5)]
        await serving.until(lambda: serving.server.clients == 5)
        before = len(serving.lines("client_closed"))
        assert serving.server.begin_stop() == 5
        for client in clients:
            client.close()
        await serving.until(lambda: not serving.server.clients)
        assert serving.server.begin_stop() == 5
        receipt = await serving.server.shutdown()
        assert (receipt.clients, receipt.completed) == (5, 5)
        assert len(serving.lines("client_closed")) - before == 5

    serve(scene)


def test_receipt_of_a_paused_daemon(start: Start) -> None:
    """Clients close while SIGTERM waits for a paused daemon: receipt and lines after `draining` agree all the same."""
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
    """EPERM for each connection leaves all of them in the queue: accepting pauses, and goes on when it is allowed."""
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
            await serving.until(lambda: serving.server.accept_paused)
            allowed.set()
            assert await asyncio.to_thread(echo, client) == b"x"
            await serving.until(lambda: serving.lines("accept_resumed"))
        assert [line["cause"] for line in serving.lines("accept_paused")] == ["EPERM"]
        assert (await serving.server.shutdown()).failed == 0

    serve(scene)
    assert tries


def test_listening_socket_fails_to_close(serve: Callable[..., None]) -> None:
    """The clients are drained all the same."""

    class Failing(socket.socket):
        def close(self) -> None:
            super().close()
            raise OSError(errno.EIO, "Input/output error")

    async def scene(serving: Serving) -> None:
        serving.server.start()
        with socket.create_connection(serving.address, PATIENCE) as client:
            assert await asyncio.to_thread(echo, client) == b"x"
            (listening,) = serving.server._sockets
            plain = listening.sock
            listening.sock = Failing(fileno=plain.detach())
            stop = asyncio.ensure_future(serving.server.shutdown())
            assert await asyncio.to_thread(echo, client) == b"x"
            client.close()
            assert (await stop).completed == 1

    serve(scene)
