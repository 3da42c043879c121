"""A server inside another program: `echod.Server.listen`, on both loops."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from structlog.testing import CapturingLogger

import echod
from echod.embed import Server
from echod.loops import loop_factory
from echod.net.listeners import ListenerSpec, open_listeners
from echod.server.ledger import Ledger
from echod.server.timeouts import Sweep
from harness import PATIENCE
from serving import run_in_loop, server_settings, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from certificates import Certificates
    from echod.options import FaultOptions, ShutdownOptions, TlsOptions

    Run = Callable[[Callable[[], Awaitable[None]]], None]

# Short timeouts for clients that a test leaves open.
SOON: ShutdownOptions = {"quiet_period": 0.05, "drain_timeout": 0.2, "linger_timeout": 0.1}


@pytest.fixture
def run_scene(loop_name: str) -> Run:
    """Return a function that runs a scene in the loop under test."""
    return partial(run_in_loop, loop_name)


async def connect(server: Server, index: int = 0, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect a client and return its streams."""
    address = server.addresses[index]
    assert isinstance(address, echod.TcpAddress)
    return await asyncio.open_connection(address.host, address.port, **options)


async def echo(server: Server, message: bytes, index: int = 0, **options: Any) -> bytes:
    """Send one message from a new client, half-close, and return the echo."""
    reader, writer = await connect(server, index, **options)
    writer.write(message)
    if not options:
        writer.write_eof()
        answer = await reader.read()
    else:
        answer = await reader.readexactly(len(message))
    writer.close()
    await writer.wait_closed()
    return answer


def test_served_observed_and_shut_down(run_scene: Run) -> None:
    """Serve clients at each address, pass entries to the observer, and return the same receipt twice."""

    async def scene() -> None:
        entries: asyncio.Queue[echod.Entry] = asyncio.Queue()
        async with Server.listen("localhost:0", shutdown=SOON, observe=entries.put_nowait) as server:
            for index in range(len(server.addresses)):
                assert await echo(server, b"hello", index) == b"hello"
                entry = await entries.get()
                assert (entry.received, entry.acked, entry.reason) == (5, 5, "eof")
            _, idle = await connect(server)
            await until(lambda: server.clients)
            assert server.begin_stop() == 1
            receipt = await server.shutdown()
            assert (receipt.clients, receipt.quiet, server.clients) == (1, 1, 0)
            assert (await entries.get()).reason == "quiet"
            idle.close()
        assert await server.shutdown() is receipt
        for index in range(len(server.addresses)):
            with pytest.raises(ConnectionRefusedError):
                await connect(server, index)

    run_scene(scene)


def test_options_have_their_effect(run_scene: Run) -> None:
    """Modes, limits and faults work as in the settings."""

    async def scene() -> None:
        entries: asyncio.Queue[echod.Entry] = asyncio.Queue()
        observe = entries.put_nowait
        async with Server.listen(mode="line", limits={"max_line": 4}, shutdown=SOON, observe=observe) as lines:
            assert await echo(lines, b"a\nlonger") == b"a\n"
            assert (await entries.get()).reason == "line_too_long"
        async with Server.listen(mode="info", shutdown=SOON) as info:
            reader, writer = await connect(info)
            assert b'"peer"' in await reader.read()
            writer.close()
        fault: FaultOptions = {"trigger": "boom", "action": "raise"}
        async with Server.listen(fault=fault, shutdown=SOON, observe=observe) as faulty:
            assert await echo(faulty, b"boom") == b""
            assert (await entries.get()).reason == "fault"
        trusted = ["192.0.2.0/24"]
        async with Server.listen(proxy_protocol="require", proxy_trusted=trusted, observe=observe) as behind:
            _, writer = await connect(behind)
            assert (await entries.get()).reason == "proxy_header"
            writer.close()

    run_scene(scene)


def test_default_timeout_of_sockets(run_scene: Run) -> None:
    """A program's default timeout of sockets does not stop the loop: sessions that send by themselves never wait."""

    async def scene() -> None:
        async with Server.listen(fault={"slice": 1000}, shutdown=SOON) as server:
            _, writer = await connect(server)
            await until(lambda: server.clients)
            assert [client.session.sock.gettimeout() for client in server.connected] == [0]
            writer.close()

    socket.setdefaulttimeout(PATIENCE)
    try:
        run_scene(scene)
    finally:
        socket.setdefaulttimeout(None)


def test_tls(run_scene: Run, certificates: Certificates) -> None:
    """TLS files may be path objects."""

    async def scene() -> None:
        entries: asyncio.Queue[echod.Entry] = asyncio.Queue()
        tls: TlsOptions = {"certificate": certificates.certificate, "private_key": certificates.key}
        async with Server.listen(tls=tls, shutdown=SOON, observe=entries.put_nowait) as server:
            assert await echo(server, b"secret", ssl=certificates.context(), server_hostname="localhost") == b"secret"
            entry = await entries.get()
            assert (entry.received, entry.tls) == (6, "TLSv1.3")

    run_scene(scene)


def test_unix_socket(run_scene: Run, tmp_path: Path) -> None:
    """The socket file has the given permissions and is removed at the end."""
    path = tmp_path / "echo.sock"

    async def scene() -> None:
        async with Server.listen(f"unix:{path}", socket_mode="0600", shutdown=SOON) as server:
            assert server.addresses == [echod.UnixAddress(str(path))]
            assert path.stat().st_mode & 0o777 == 0o600
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"x")
            assert await reader.read(1) == b"x"
            writer.close()
        assert not path.exists()

    run_scene(scene)


def test_port_and_repr(run_scene: Run, tmp_path: Path) -> None:
    """The port is that of all addresses. The text of a server names its addresses, its state and its clients."""
    path = tmp_path / "echo.sock"

    async def scene() -> None:
        server = Server.listen("localhost:0", shutdown=SOON)
        addresses = " ".join(map(str, server.addresses))
        assert {str(address).rpartition(":")[2] for address in server.addresses} == {str(server.port)}
        assert repr(server) == f"<Server {addresses} not started, clients=0>"
        async with server:
            _, writer = await connect(server)
            await until(lambda: server.clients)
            assert repr(server) == f"<Server {addresses} serving, clients=1>"
            stop = asyncio.create_task(server.shutdown())
            await until(lambda: repr(server) == f"<Server {addresses} stopping, clients=1>")
            await stop
            assert repr(server) == f"<Server {addresses} stopped, clients=0>"
            writer.close()
        async with Server.listen(f"unix:{path}") as local:
            with pytest.raises(RuntimeError, match=f"^<Server unix:{path} serving, clients=0> has no TCP port$"):
                local.port  # noqa: B018  (it raises)

    run_scene(scene)


def test_several_servers_in_one_loop(run_scene: Run) -> None:
    """Each server has its own clients and limits."""

    async def scene() -> None:
        async with (
            Server.listen(limits={"max_connections": 1}, shutdown=SOON) as one,
            Server.listen(shutdown=SOON) as other,
        ):
            streams = [await connect(server) for server in (one, other, other)]
            for reader, writer in streams:
                writer.write(b"x")
                assert await reader.read(1) == b"x"
            assert (one.clients, other.clients) == (1, 2)
            for _, writer in streams:
                writer.close()

    run_scene(scene)


def test_sockets_are_open_before_the_start(run_scene: Run) -> None:
    """A client that connects before the start is served, even if the server is only shut down."""
    server = Server.listen(shutdown=SOON)

    async def scene() -> None:
        reader, writer = await connect(server)
        writer.write(b"early")
        writer.write_eof()
        receipt = await server.shutdown()
        assert (receipt.clients, receipt.completed) == (1, 1)
        assert await reader.read() == b"early"
        writer.close()
        with pytest.raises(RuntimeError, match="only once"):
            server.start()

    run_scene(scene)


def test_shutdown_goes_on_without_its_caller(run_scene: Run) -> None:
    """A caller that stops waiting does not end the drain; `abort` does."""

    async def scene() -> None:
        async with Server.listen(shutdown={"quiet_period": PATIENCE, "drain_timeout": 2 * PATIENCE}) as server:
            reader, writer = await connect(server)
            writer.write(b"x")
            assert await reader.read(1) == b"x"
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(server.shutdown(), 0.05)
            writer.write(b"y")
            assert await reader.read(1) == b"y"
            server.abort()
            assert (await server.shutdown()).aborted == 1
            writer.close()

    run_scene(scene)


def test_cancelled_while_it_ends(run_scene: Run) -> None:
    """`async with` drains if its task is cancelled, and resets all clients if it is cancelled again."""

    async def scene() -> None:
        closed: asyncio.Queue[echod.Entry] = asyncio.Queue()
        server = Server.listen(
            shutdown={"quiet_period": PATIENCE, "drain_timeout": 2 * PATIENCE}, observe=closed.put_nowait
        )
        leaving = asyncio.Event()

        async def embed() -> None:
            async with server:
                leaving.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(embed())
        await leaving.wait()
        reader, writer = await connect(server)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        task.cancel()
        writer.write(b"y")
        assert await reader.read(1) == b"y"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await closed.get()).reason == "aborted"
        assert server.clients == 0
        writer.close()

    run_scene(scene)


def test_another_loop(run_scene: Run, loop_name: str) -> None:
    """In another loop, or without one, the methods fail at once. The server's own shutdown still works."""

    async def scene() -> None:
        server = Server.listen(shutdown=SOON)
        server.start()
        reader, writer = await connect(server)
        writer.write(b"x")
        assert await reader.read(1) == b"x"

        async def call(method: Callable[[], object]) -> None:
            method()

        def elsewhere() -> None:
            with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
                coroutines = [*map(call, methods), server.shutdown()]
                attempts: list[Callable[[], object]] = [partial(runner.run, coroutine) for coroutine in coroutines]
                for attempt in (*attempts, *methods):
                    with pytest.raises(RuntimeError, match="the server belongs to another event loop: "):
                        attempt()

        methods = server.start, server.begin_stop, server.abort
        await asyncio.to_thread(elsewhere)
        writer.write(b"y")
        assert await reader.read(1) == b"y"
        receipt = await server.shutdown()
        assert (receipt.clients, receipt.quiet) == (1, 1)
        writer.close()

    run_scene(scene)


async def cancel(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait for their end, with their done callbacks."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


@pytest.mark.parametrize("cancelled", ["all", "Sweep.run"])
def test_program_cancels_the_tasks(run_scene: Run, cancelled: str) -> None:
    """Outside of a shutdown, the sockets are closed, so that new clients are refused. It is logged."""

    async def scene() -> None:
        output = CapturingLogger()
        logger = structlog.wrap_logger(output, [], structlog.make_filtering_bound_logger("info"))
        server = Server.listen(shutdown=SOON, logger=logger)
        before = asyncio.all_tasks()
        server.start()
        reader, writer = await connect(server)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        own = asyncio.all_tasks() - before
        await cancel({task for task in own if cancelled in {"all", getattr(task.get_coro(), "__qualname__", "")}})
        await until(lambda: output.calls)
        with pytest.raises(ConnectionRefusedError):
            await connect(server)
        (logged,) = [call for call in output.calls if call.kwargs["event"] != "client_closed"]
        assert (logged.method_name, logged.kwargs["event"]) == ("error", "listener_cancelled")
        writer.close()
        receipt = await server.shutdown()
        assert (receipt.clients, server.clients) == (int(cancelled != "all"), 0)
        assert await server.shutdown() is receipt

    run_scene(scene)


@pytest.mark.parametrize("steps", [1, 2])
def test_program_cancels_the_stop(run_scene: Run, steps: int) -> None:
    """If a program cancels all tasks during a stop, the sockets are closed, and `shutdown` still returns the receipt."""

    async def scene() -> None:
        server = Server.listen(shutdown={"delay": PATIENCE})
        before = asyncio.all_tasks()
        server.start()
        reader, writer = await connect(server)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        stop = asyncio.create_task(server.shutdown())
        for _ in range(steps):  # the stop has a task of its own, which begins with the second one
            await asyncio.sleep(0)
        await cancel(asyncio.all_tasks() - before)
        await asyncio.sleep(0)
        assert stop.cancelled()
        with pytest.raises(ConnectionRefusedError):
            await connect(server)
        writer.close()
        server.abort()
        receipt = await server.shutdown()
        assert (receipt.clients, receipt.aborted) == (1, 1)

    run_scene(scene)


@pytest.mark.parametrize("stage", ["served", "leaving", "joining"])
def test_end_of_the_loop(loop_name: str, capfd: pytest.CaptureFixture[str], stage: str) -> None:
    """A loop that ends cancels all tasks at once, and none of them writes or logs anything."""
    entries: list[echod.Entry] = []
    (listener,) = open_listeners([ListenerSpec("x", echod.TcpAddress("127.0.0.1", 0))], 10)
    log = structlog.wrap_logger(structlog.ReturnLogger(), [])
    server = Server(listener.sockets, server_settings(), Ledger(log, "none", [entries.append]))

    async def embed() -> None:
        async with server:
            await asyncio.Event().wait()

    async def main() -> None:
        client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), PATIENCE))
        tasks.append(asyncio.create_task(embed()))
        if stage != "joining":
            client.setblocking(False)
            await asyncio.get_running_loop().sock_sendall(client, b"x")
            assert await asyncio.get_running_loop().sock_recv(client, 1) == b"x"
            if stage == "leaving":  # on asyncio, the end of the connection then comes before that of its task
                (leaving,) = server.connected
                leaving.session.abort("aborted")
            return
        await until(lambda: server.clients)

    tasks: list[asyncio.Task[None]] = []
    with contextlib.ExitStack() as stack:
        with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
            runner.run(main())
        assert tasks[0].cancelled()
    assert [entry.reason for entry in entries] == ["aborted"]
    assert capfd.readouterr() == ("", "")


def test_failing_observer(run_scene: Run) -> None:
    """The exception goes to the loop's handler. The server goes on, and its end does not wait for closed clients."""

    async def scene() -> None:
        told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.put_nowait(context))

        def observe(_: echod.Entry) -> None:
            msg = "the observer's"
            raise ValueError(msg)

        output = CapturingLogger()
        async with Server.listen(
            limits={"max_connections": 1},  # the second client waits until the server notices that the first has left
            shutdown={"drain_timeout": 2 * PATIENCE},
            observe=observe,
            logger=structlog.wrap_logger(output, [], structlog.make_filtering_bound_logger("info")),
        ) as server:
            reader, writer = await connect(server)
            writer.write(b"x")
            assert await reader.read(1) == b"x"
            waiting = asyncio.create_task(echo(server, b"second"))
            await until(lambda: output.calls)
            assert output.calls[0].kwargs["event"] == "accept_paused"
            writer.close()
            assert await waiting == b"second"
            for _ in range(2):
                assert str((await told.get())["exception"]) == "the observer's"

    run_scene(scene)


def test_logger(run_scene: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """A logger gets the daemon's lines. Without one nothing is written, not even about a failure."""
    output = CapturingLogger()
    logger = structlog.wrap_logger(output, [], structlog.make_filtering_bound_logger("info"))

    async def scene() -> None:
        for given in (logger, None):
            fault: FaultOptions = {"trigger": "boom", "action": "raise"}
            async with Server.listen(fault=fault, logger=given, shutdown=SOON) as server:
                await echo(server, b"boom")
                name = str(server.addresses[0])
            if given is not None:
                lines = {call.kwargs["event"]: call for call in output.calls}
                assert lines["client_failed"].kwargs["exc_info"]
                assert lines["client_closed"].kwargs["reason"] == "fault"
                assert lines["client_closed"].kwargs["listener"] == "127.0.0.1:0"
                assert name != "127.0.0.1:0"

    run_scene(scene)
    assert len(output.calls) == 2
    assert capfd.readouterr() == ("", "")


TLS = {"certificate": "/nowhere/c.pem", "private_key": "/nowhere/k.pem"}

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "address": ("nowhere", {}, "address: 'nowhere' has no port: write HOST:PORT, .*"),
    "UDP": ("udp:127.0.0.1:0", {}, "address: 'udp:127.0.0.1:0': a server in a program has no UDP: .*"),
    "option": ("127.0.0.1:0", {"mod": "line"}, "mod: unknown option; did you mean 'mode'\\?"),
    "not for one server": (
        "127.0.0.1:0",
        {"loop": "asyncio"},
        "loop: unknown option; use one of: allow, fault, limits, .*",
    ),
    "value": ("127.0.0.1:0", {"mode": "lines"}, 'mode: should be "stream", "line" or "info", not "lines"'),
    "key": (
        "127.0.0.1:0",
        {"limits": {"idle_timout": 1}, "shutdown": {"quiet_period": -1}},
        (
            "limits.idle_timout: unknown key; did you mean 'idle_timeout'\\?\n"
            "shutdown.quiet_period: should be at least 0, not -1"
        ),
    ),
    "no table": ("127.0.0.1:0", {"limits": 7}, "limits: should be a table"),
    "fault": ("127.0.0.1:0", {"fault": {"action": "rise"}}, 'fault.action: should be "raise", .*, not "rise"'),
    "together": (
        "127.0.0.1:0",
        {"proxy_trusted": ["::1"]},
        "proxy_trusted: has no effect without proxy_protocol = 'require'",
    ),
    "file": ("127.0.0.1:0", {"tls": TLS}, "tls.certificate: '/nowhere/c.pem' cannot be read: No such file.*"),
    "tls is no table": ("127.0.0.1:0", {"tls": "c.pem"}, "tls: should be a table"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(case: str) -> None:
    """The error has all problems, under the names that the caller used."""
    address, options, message = WRONG[case]
    with pytest.raises(echod.SettingsError, match=f"^{message}$"):
        Server.listen(address, **options)


def test_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch, run_scene: Run) -> None:
    """The daemon's environment variables do not change a server inside another program."""
    monkeypatch.setenv("ECHOD_LIMITS__MAX_LINE", "1")

    async def scene() -> None:
        async with Server.listen(mode="line", shutdown=SOON) as server:
            assert await echo(server, b"longer\n") == b"longer\n"

    run_scene(scene)


def test_taken_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host, port = taken.getsockname()
        with pytest.raises(echod.ListenError, match="Address already in use"):
            Server.listen(f"{host}:{port}")


def test_wrong_logger(tmp_path: Path) -> None:
    """A logger that is not one of structlog fails before anything listens."""
    path = tmp_path / "socket"
    logger: Any = object()
    with pytest.raises(AttributeError, match="has no attribute 'bind'"):
        Server.listen(f"unix:{path}", logger=logger)
    assert not path.exists()


def test_import_is_light() -> None:
    """Load no other module with `import echod`. Each public name loads its own, and other names are errors."""
    code = """
import sys
before = set(sys.modules)
import echod
assert set(sys.modules) - before == {"echod"}, set(sys.modules) - before
for name in echod.__all__:
    assert getattr(echod, name).__name__ == name
from echod import *
assert Server is echod.embed.Server
try:
    echod.Servant
except AttributeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (result.stdout, result.stderr) == ("module 'echod' has no attribute 'Servant'\n", "")


@pytest.mark.parametrize("module", ["echod.server.server", "echod.server.ledger", "echod.server.settings"])
def test_server_loads_no_settings(module: str) -> None:
    """The server and all modules below it load neither pydantic-settings nor argparse."""
    code = f"import sys, {module}\nprint(sorted(sys.modules.keys() & {{'pydantic_settings', 'argparse'}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_failure_of_a_server_task(run_scene: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a defect in a task of the server, `shutdown` drains the clients and then raises the exception."""
    failed = asyncio.Event()

    def fail(_: Sweep) -> None:
        failed.set()
        raise ArithmeticError

    monkeypatch.setattr(Sweep, "sweep", fail)

    async def scene() -> None:
        entries: list[echod.Entry] = []
        server = Server.listen(limits={"idle_timeout": 0.04}, shutdown=SOON, observe=entries.append)
        server.start()
        reader, writer = await connect(server)
        await failed.wait()
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        writer.close()
        with pytest.raises(ArithmeticError):
            await server.shutdown()
        assert (entries[0].reason, server.clients) == ("eof", 0)

    run_scene(scene)
