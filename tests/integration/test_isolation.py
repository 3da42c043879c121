"""Test that the failure of one client affects no other client in the sweep, a reload, a drain or a stop."""

from __future__ import annotations

import asyncio
import itertools
import socket
from typing import TYPE_CHECKING, Any

import pytest
import structlog

import echod
from echod.connection.echo import EchoSession
from echod.loops import loop_factory
from echod.net.listeners import ListenerSpec, ListeningSocket, open_listeners
from echod.server import client as client_module
from echod.server import server as server_module
from echod.server.drain import Drain
from echod.server.ledger import Ledger
from echod.server.quota import Quota
from echod.server.server import Server
from echod.settings.model import ShutdownSettings
from harness import PATIENCE, UNHURRIED, receive
from pairs import LIMITS, SHUTDOWN, Pair
from serving import run_in_loop, server_settings, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from echod.server.client import Client
    from echod.server.ledger import Entry
    from harness import Start
    from pairs import InLoop


# Loops over clients


class Broken(EchoSession):
    """A session that fails in each step, except in its own reset as `failed`."""

    def _fail(self, *_: object) -> Any:
        msg = "broken"
        raise ArithmeticError(msg)

    close: Any = _fail
    stop_lingering: Any = _fail
    undelivered: Any = _fail
    reconfigure: Any = _fail

    def abort(self, reason: Any) -> None:
        if reason != "failed":
            self._fail()
        super().abort(reason)


def broken(pair: Pair) -> Client:
    """Give the pair a broken session, and return its client."""
    pair.session = Broken(pair.sock, LIMITS, SHUTDOWN, asyncio.get_running_loop().create_future())
    return pair.life()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (ShutdownSettings(quiet_period=0.01, drain_timeout=PATIENCE, linger_timeout=0), "quiet"),
        (ShutdownSettings(quiet_period=PATIENCE, drain_timeout=0, linger_timeout=0), "cut"),
        (None, "aborted"),
    ],
)
def test_drain_isolates_clients(in_loop: InLoop, settings: ShutdownSettings | None, reason: str) -> None:
    """Reset a client that fails in a drain, and drain the other clients."""

    async def scene(pair: Pair) -> None:
        other = Pair(None)
        clients = [broken(other), pair.life()]
        await other.connect()
        await pair.connect()
        drain = Drain(clients, lambda: True)
        if settings is None:
            drain.abort()
        task = asyncio.create_task(drain.run(settings or ShutdownSettings()))
        with pytest.raises(ArithmeticError):
            await other.session.ended
        if reason == "quiet":
            assert await asyncio.to_thread(pair.client.recv, 1) == b""
            pair.client.close()
            await pair.session.ended
            drain.abort()
        assert await task == (settings is not None)
        await pair.session.ended
        assert (other.session.reason, pair.session.reason) == ("failed", reason)
        other.client.close()

    in_loop(scene)


def serve(
    loop_name: str, scene: Callable[[Server, list[Entry]], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> list[MutableMapping[str, Any]]:
    """Run a scene with a server, and return the logged events. The first client's session is broken."""
    made = itertools.count()

    def new_session(sock: socket.socket, *_: object) -> EchoSession:
        kind = EchoSession if next(made) else Broken
        return kind(sock, LIMITS, SHUTDOWN, asyncio.get_running_loop().create_future())

    monkeypatch.setattr(server_module, "new_session", new_session)
    entries: list[Entry] = []
    logged: list[MutableMapping[str, Any]] = []

    def note(_: object, __: str, event: MutableMapping[str, Any]) -> str:
        logged.append(event)
        return ""

    async def main() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        settings = server_settings(
            limits={"idle_timeout": 0.05, "write_timeout": 0.05},
            shutdown={"quiet_period": 0.01, "drain_timeout": 0, "linger_timeout": 0},
        )
        log = structlog.wrap_logger(structlog.PrintLogger(), [note])
        server = Server([ListeningSocket(listening)], settings, Ledger(log, "none", [entries.append]))
        server.start()
        await scene(server, entries)
        await server.shutdown()

    run_in_loop(loop_name, main)
    return logged


async def connected(server: Server) -> list[socket.socket]:
    """Connect two clients, and wait until both are accepted."""
    address = server.addresses[0]
    clients = [socket.create_connection((address.host, address.port)) for _ in range(2)]  # type: ignore[union-attr]
    await until(lambda: server.ledger.counters.accepted == 2)
    return clients


@pytest.mark.parametrize("loop_over", ["sweep", "reload"])
def test_server_isolates_clients(
    loop_name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loop_over: str
) -> None:
    """Log and reset a client that fails in the sweep or in a reload. The other clients are handled."""

    async def scene(server: Server, entries: list[Entry]) -> None:
        clients = await connected(server)
        if loop_over == "reload":
            for one in server.connected:
                while one.session.transport is None:  # noqa: ASYNC110  (no event tells)
                    await asyncio.sleep(0)
            server.reconfigure(server_settings(limits={"write_buffer": 1000}))
            whole = list(server.connected)[1].session
            assert whole.limits.write_buffer == 1000
        else:
            assert await asyncio.to_thread(clients[1].recv, 1) == b""  # idle
            clients[1].close()
        await until(lambda: entries)
        assert entries[0].reason == "failed"
        for client in clients:
            client.close()

    logged = serve(loop_name, scene, monkeypatch)
    capsys.readouterr()
    failed = [event for event in logged if event["event"] == "client_failed"]
    assert [type(event["exc_info"]) for event in failed] == [ArithmeticError]


# Stops that meet a failure


class HangingTransport(asyncio.Transport):
    """A transport that never calls `connection_lost`."""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None: ...


@pytest.mark.parametrize("hangs", [True, False])
def test_end_that_no_transport_reports(in_loop: InLoop, monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    """End a client when its task is cancelled, even if its transport hangs or was never made."""
    monkeypatch.setattr(client_module, "LAST_STEPS", 0.01)

    async def scene(pair: Pair) -> None:
        async def join(_: object, factory: Callable[[], asyncio.Protocol], __: object) -> None:
            if hangs:
                factory().connection_made(HangingTransport())
            else:
                await asyncio.Event().wait()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(asyncio.get_running_loop()), "connect_accepted_socket", join)
            task = asyncio.create_task(pair.life().run(server_settings(), Quota(0)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            if hangs:
                with pytest.raises(RuntimeError, match="did not report the end"):
                    await task
            else:
                await task
        assert pair.session.reason == ("failed" if hangs else "aborted")
        assert pair.session.delivery is not None
        pair.sock.close()

    in_loop(scene)


def test_stop_with_a_client_that_never_ends(loop_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finish the stop and count a client in the receipt even if its transport is never made."""

    async def main() -> None:
        server = echod.Server.listen(
            "127.0.0.1:0", shutdown={"quiet_period": 0.01, "drain_timeout": 0, "linger_timeout": 0}
        )
        server.start()
        address = server.addresses[0]
        with socket.create_connection((address.host, address.port)):  # type: ignore[union-attr]
            await until(lambda: server.clients)
            receipt = await asyncio.wait_for(server.shutdown(), PATIENCE)
        assert (receipt.clients, receipt.aborted) == (1, 1)

    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("echod.server.server.LAST_STEPS", 0.01)
    with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
        monkeypatch.setattr(type(runner.get_loop()), "connect_accepted_socket", hang)
        runner.run(main())


def test_failure_before_the_connection_is_joined(in_loop: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the client if its transport cannot be made. Its task raises the exception."""

    async def scene(pair: Pair) -> None:
        async def refuse(*_: object) -> None:
            raise ArithmeticError

        monkeypatch.setattr(type(asyncio.get_running_loop()), "connect_accepted_socket", refuse)
        with pytest.raises(ArithmeticError):
            await pair.life().run(server_settings(), Quota(0))
        assert pair.session.reason == "failed"
        with pytest.raises(ConnectionResetError):
            pair.client.recv(1)

    in_loop(scene)


def patched(patch: str) -> tuple[str, ...]:
    """Return the interpreter's arguments that run the command after a patch."""
    return (
        "-c",
        f"import asyncio, sys\nfrom echod import cli\nfrom echod.daemon import daemon\nfrom echod.server import drain\n{patch}\nsys.exit(cli.main())",
    )


ONE_DRAIN_FAILS = """
run = drain.Drain.run
drains = []
async def fail_once(self, shutdown):
    drains.append(self)
    if len(drains) == 1:
        raise ArithmeticError
    return await run(self, shutdown)
drain.Drain.run = fail_once
"""

ADMIN_HANGS = """
from echod.admin import http
async def hang(self):
    await asyncio.Event().wait()
http.Admin.close = hang
daemon._ADMIN_CLOSE = 0.01
"""


def test_stop_isolates_listeners(start: Start) -> None:
    """Drain the other listeners as usual if the stop of one fails. The exit code is 1."""
    listeners = ("--listeners.one.address", "127.0.0.1:0", "--listeners.two.address", "127.0.0.1:0")
    daemon = start(*listeners, *UNHURRIED, listen=None, module=patched(ONE_DRAIN_FAILS))
    host, _, port = daemon.wait_for("listening", listener="two")["address"].rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE) as client:
        daemon.send_signal()
        daemon.wait_for("draining")
        client.sendall(b"still served")
        assert receive(client, 12) == b"still served"
    assert daemon.wait() == 1
    assert "ArithmeticError" in daemon.wait_for("stop_failed", listener="one")["exception"]
    assert (daemon.receipt()["completed"], daemon.events[-1]["event"]) == (1, "stopped")


def test_stop_outlasts_the_admin_listener(start: Start) -> None:
    """Finish the stop even if the admin listener does not close."""
    daemon = start("--admin.address", "127.0.0.1:0", module=patched(ADMIN_HANGS))
    assert daemon.stop() == 1
    assert "TimeoutError" in daemon.wait_for("stop_failed", listener="admin")["exception"]
    assert daemon.events[-1]["event"] == "stopped"


def test_failure_after_the_end(start: Start) -> None:
    """Log an exception as `loop_error` if the loop reports it after the client's end."""
    patch = """
from echod.connection import echo
lost = echo.EchoSession.connection_lost
def fail(self, exc):
    lost(self, exc)
    context = {"message": "late", "exception": ArithmeticError(), "protocol": self}
    asyncio.get_running_loop().call_exception_handler(context)
echo.EchoSession.connection_lost = fail
"""
    daemon = start(module=patched(patch))
    daemon.echo(b"x")
    assert "ArithmeticError" in daemon.wait_for("loop_error", message="late")["exception"]
    assert daemon.wait_for("client_closed")["reason"] == "eof"
    assert daemon.stop() == 0


def test_cancelled_twice(loop_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """End a client's task at once if it is cancelled again during the wait for its transport. Report no error."""

    async def join(_: object, factory: Callable[[], asyncio.Protocol], __: object) -> None:
        factory().connection_made(HangingTransport())

    async def main() -> None:
        errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        (listener,) = open_listeners([ListenerSpec("x", echod.TcpAddress("127.0.0.1", 0))], 10)
        log = structlog.wrap_logger(structlog.ReturnLogger(), [])
        server = Server(listener.sockets, server_settings(), Ledger(log, "none"))
        server.start()
        address = server.addresses[0]
        with socket.create_connection((address.host, address.port)):  # type: ignore[union-attr]
            await until(lambda: server.clients)
            (client,) = server.connected
            (task,) = (task for task in asyncio.all_tasks() if "Client.run" in repr(task))
            while server.clients:
                task.cancel()
                await asyncio.sleep(0)
            client.session.sock.close()
        assert (await server.shutdown()).clients == 0
        assert (task.cancelled(), errors) == (True, [])

    with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
        monkeypatch.setattr(type(runner.get_loop()), "connect_accepted_socket", join)
        runner.run(main())
