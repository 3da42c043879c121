"""One client's failure is that client's alone: in timers, in each loop over clients, and in a stop."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import select
import signal
import socket
import ssl
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from pydantic import ByteSize

import echod
from echod.connection.echo import EchoSession
from echod.connection.faults.profile import FaultProfile
from echod.connection.faults.session import FaultSession
from echod.connection.line import LineSession
from echod.loops import loop_factory
from echod.net import kernel
from echod.net.listeners import ListenerSpec, ListeningSocket, open_listeners
from echod.server import client as client_module
from echod.server import server as server_module
from echod.server.drain import Drain
from echod.server.ledger import Ledger
from echod.server.quota import Quota
from echod.server.server import Server
from echod.settings.model import FaultSettings, ShutdownSettings
from harness import PATIENCE, UNHURRIED, receive, reset
from pairs import LIMITS, SHUTDOWN, Pair
from serving import run_in_loop, server_settings, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from certificates import Certificates
    from echod.server.client import Client
    from echod.server.ledger import Entry
    from harness import Start
    from pairs import InLoop

# A record that no key decrypts.
BAD_RECORD = b"\x17\x03\x03\x00\x20" + bytes(32)


# TLS records that cannot be decrypted


@pytest.mark.parametrize("shape", [{"delay": "60"}, {"rate": "1"}, {"delay": "60", "slice": "1"}])
@pytest.mark.parametrize("mode", ["stream", "line"])
def test_bad_record_while_echo_is_held_back(
    start: Start, certificates: Certificates, shape: dict[str, str], mode: str
) -> None:
    """Close a connection at once after a bad TLS record. A later stop drains other listeners as usual."""
    daemon = start(
        *(text for name, value in shape.items() for text in (f"--faults.shape.{name}", value)),
        *(*certificates.options(), "--listeners.tls.fault", "shape", "--listeners.tls.mode", mode),
        *("--listeners.plain.address", "127.0.0.1:0", *UNHURRIED),
        listen=None,
    )
    daemon.wait_for("listening", count=2)
    host, _, port = daemon.wait_for("listening", listener="plain")["address"].rpartition(":")
    secure = daemon.wait_for("listening", listener="tls")["address"].rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE) as other:
        with certificates.over(socket.create_connection((secure[0], int(secure[2])), PATIENCE)) as client:
            message = b"line\n" * 100 + b"half"
            client.send(message)
            daemon.settle()
            client.sock.sendall(BAD_RECORD)
            line = daemon.wait_for("client_closed")
            assert (line["reason"], line["received"]) == ("tls", len(message))
            assert line["acked"] <= line["sent"] < len(message)
        daemon.send_signal(signal.SIGTERM)
        daemon.wait_for("draining")
        other.sendall(b"still served")
        assert receive(other, 12) == b"still served"
    assert daemon.wait() == 0
    receipt = daemon.receipt()
    assert (receipt["clients"], receipt["completed"]) == (1, 1)
    assert "error" not in {event["level"] for event in daemon.events}


def test_bad_record_after_half_a_line(start: Start, certificates: Certificates) -> None:
    """Drop the unfinished line without a traceback, as it can no longer be encrypted."""
    daemon = start(*certificates.options(), "--listeners.tls.mode", "line", listen=None)
    with certificates.join(daemon) as client:
        client.send(b"whole\nhalf")
        assert client.recv(100) == b"whole\n"
        client.sock.sendall(BAD_RECORD)
        with pytest.raises(ssl.SSLError, match="ALERT"):
            client.recv(1)
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"], line["sent"], line["acked"]) == ("tls", 10, 6, 6)
    assert daemon.loud() == []


# Writes after a failed write


@pytest.mark.parametrize("kind", ["line", "fault stream", "fault line"])
def test_writes_after_a_reset_are_not_logged(in_loop: InLoop, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Write nothing to the transport after a failed write. asyncio logs each one from the fifth on."""

    async def scene(pair: Pair) -> None:
        future = asyncio.get_running_loop().create_future()
        if kind == "line":
            pair.session = LineSession(pair.sock, LIMITS, SHUTDOWN, future)
        elif kind == "fault line":
            profile = FaultProfile("none", FaultSettings())
            pair.session = FaultSession(pair.sock, LIMITS, SHUTDOWN, future, profile, "line", 1)
        else:
            profile = FaultProfile("shape", FaultSettings(rate=ByteSize(10_000_000)))
            pair.session = FaultSession(pair.sock, LIMITS, SHUTDOWN, future, profile, "stream", 1)
        await pair.connect()
        reset(pair.client)
        pair.session.data_received(b"x\n" * 1000)
        await pair.session.ended
        assert pair.session.reason == "reset"
        assert pair.session.delivery is not None
        assert (pair.session.delivery.received, pair.session.delivery.acked) == (2000, 0)

    with caplog.at_level(logging.WARNING, "asyncio"):
        in_loop(scene)
    assert caplog.records == []


# Counters that fail


class FailingKernel:
    """Make functions of `echod.net.kernel` raise an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str, error: Exception) -> None:
        for name in names:
            monkeypatch.setattr(kernel, name, self._fail)
        self._error = error

    def _fail(self, _: socket.socket) -> int:
        raise self._error


def no_buffers() -> OSError:
    return OSError(errno.ENOBUFS, "No buffer space available")


def a_bug() -> ArithmeticError:
    return ArithmeticError("a bug")


@pytest.mark.parametrize(
    ("failing", "acked"), [(["tcp_info"], 3), (["tcp_info", "unacknowledged"], 0), (["unacknowledged"], 3)]
)
def test_end_without_counters(in_loop: InLoop, monkeypatch: pytest.MonkeyPatch, failing: list[str], acked: int) -> None:
    """Report the end even if the kernel's counters fail. The figures are estimates."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.client.sendall(b"abc")
        assert await asyncio.to_thread(pair.client.recv, 3) == b"abc"
        with monkeypatch.context() as patch:
            FailingKernel(patch, *failing, error=no_buffers())
            pair.session.abort("aborted")
            await pair.session.ended
        delivery = pair.session.delivery
        assert delivery is not None
        assert (delivery.received, delivery.sent, delivery.acked) == (3, 3, acked)
        assert pair.session.reason == "aborted"
        assert pair.session.detail == f"sent and acked are estimates: {no_buffers()}"

    in_loop(scene)


@pytest.mark.parametrize("end", ["half-close", "half-close with echo on its way", "cut"])
def test_client_is_served_without_counters(in_loop: InLoop, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Send all echo and FIN even if the kernel refuses the number of unacknowledged bytes."""
    size = 100_000 if "way" in end else 3

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.client.sendall(bytes(size))
        if size == 3:
            assert await asyncio.to_thread(pair.client.recv, 3) == bytes(3)
        FailingKernel(monkeypatch, "unacknowledged", error=no_buffers())
        pair.session.reconfigure(LIMITS, ShutdownSettings(linger_timeout=0.1))
        if end == "cut":
            pair.session.close("cut")
        else:
            pair.client.shutdown(socket.SHUT_WR)
        rest = size if size > 3 else 0
        assert len(await asyncio.to_thread(receive, pair.client, rest)) == rest
        assert await asyncio.to_thread(pair.client.recv, 1) == b""
        pair.client.close()
        await pair.session.ended
        assert pair.session.reason == ("cut" if end == "cut" else "eof")
        assert pair.session.delivery == (size, size, size, 0)
        assert pair.session.detail == f"sent and acked are estimates: {no_buffers()}"

    in_loop(scene)


def test_client_is_drained_without_counters(in_loop: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve a client with an unknown backlog of echo until `drain_timeout`, then send FIN."""

    async def scene(pair: Pair) -> None:
        client = pair.life()
        await pair.connect()
        FailingKernel(monkeypatch, "unacknowledged", error=no_buffers())
        shutdown = ShutdownSettings(quiet_period=0, drain_timeout=0.1, linger_timeout=0)
        await Drain([client], lambda: True).run(shutdown)
        assert await asyncio.to_thread(pair.client.recv, 1) == b""
        await pair.session.ended
        assert pair.session.reason == "cut"

    in_loop(scene)


def test_acknowledgement_between_two_counters(in_loop: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count bytes once if they are acknowledged while the counters are read. `sent` never exceeds `received`."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.client.sendall(b"abc")
        assert await asyncio.to_thread(pair.client.recv, 3) == b"abc"
        looks = iter([3, 0])
        monkeypatch.setattr(kernel, "unacknowledged", lambda _: next(looks))
        monkeypatch.setattr(kernel, "tcp_info", lambda _: kernel.TcpInfo(0.1, 0, 3))
        pair.session.abort("aborted")
        await pair.session.ended
        assert pair.session.delivery == (3, 3, 3, 0)

    in_loop(scene)


class Refusing(socket.socket):
    """A socket that fails each getsockopt(2)."""

    def getsockopt(self, *_: int) -> Any:
        raise no_buffers()


def test_socket_without_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Return defaults if the kernel refuses credentials, addresses or the state of a socket."""
    ours, theirs = socket.socketpair()
    with theirs, Refusing(fileno=ours.detach()) as sock, Refusing() as tcp:
        assert kernel.peer_credentials(sock) is None
        assert kernel.tcp_members(tcp) is None
        assert not kernel.is_reset(tcp)

        class Poll:
            def register(self, *_: object) -> None: ...

            def poll(self, _: int) -> list[tuple[int, int]]:
                raise no_buffers()

        monkeypatch.setattr(select, "poll", Poll)
        assert kernel.readable(sock)


@pytest.mark.parametrize(
    ("error", "detail"),
    [(OSError(errno.ENOSPC, "No space left on device"), "system call: ENOSPC"), (MemoryError(), "out of memory")],
)
def test_system_call_of_a_step_fails(in_loop: InLoop, error: Exception, detail: str) -> None:
    """Reset the client as `io_error`, without a traceback, after a failed system call or a lack of memory."""

    async def scene(pair: Pair) -> None:
        await pair.connect()

        def step() -> None:
            raise error

        pair.session.attempt(step)
        await pair.session.ended
        assert (pair.session.reason, pair.session.detail) == ("io_error", detail)
        with pytest.raises(ConnectionResetError):
            pair.client.recv(1)

    in_loop(scene)


def test_end_with_a_defect(in_loop: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set any other exception that occurs while the end is reported as the exception of `ended`."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        with monkeypatch.context() as patch:
            FailingKernel(patch, "tcp_info", error=KeyError("a bug"))
            pair.session.abort("aborted")
            with pytest.raises(KeyError):
                await pair.session.ended
        assert pair.session.reason == "failed"
        assert pair.session.delivery == (0, 0, 0, 0)

    in_loop(scene)


def test_linger_option_fails(in_loop: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close a client even if SO_LINGER cannot be set for RST."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        FailingKernel(monkeypatch, "reset_on_close", error=no_buffers())
        pair.session.abort("stalled")
        await pair.session.ended
        assert pair.session.reason == "stalled"
        assert await asyncio.to_thread(pair.client.recv, 1) == b""

    in_loop(scene)


# Steps that are not called by a transport


@pytest.mark.parametrize("step", ["connection_made", "resume_writing", "eof", "poll", "eof while it lingers"])
def test_failure_in_a_step_of_its_own(in_loop: InLoop, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Reset the client after an exception outside a transport's call. `ended` raises the exception."""

    async def scene(pair: Pair) -> None:
        if step == "connection_made":
            pair.session.close("cut")
        else:
            await pair.connect()
        if step == "poll":
            pair.session.data_received(bytes(200_000))
        if step.startswith(("poll", "eof while")):
            pair.session.close("cut")
        calls = itertools.count()
        unacknowledged = kernel.unacknowledged

        def fail_once(sock: socket.socket) -> int:
            if next(calls) == 0:
                raise a_bug()
            return unacknowledged(sock)

        monkeypatch.setattr(kernel, "unacknowledged", fail_once)
        if step == "connection_made":
            await pair.connect()
        elif step == "resume_writing":
            pair.session.close("cut")
            pair.session.resume_writing()
        elif step != "poll":
            pair.client.shutdown(socket.SHUT_WR)
        with pytest.raises(ArithmeticError, match="a bug"):
            await pair.session.ended
        assert pair.session.reason == "failed"
        assert next(calls) > 1

    in_loop(scene, 4096)


def test_failure_in_a_pump(in_loop: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the client also after an exception in the timer that sends held echo."""

    async def scene(pair: Pair) -> None:
        future = asyncio.get_running_loop().create_future()
        profile = FaultProfile("slow", FaultSettings(slice=ByteSize(1)))
        pair.session = FaultSession(pair.sock, LIMITS, SHUTDOWN, future, profile, "stream", 1)
        await pair.connect()
        FailingKernel(monkeypatch, "has_tcp_info", error=a_bug())
        pair.client.sendall(b"x")
        with pytest.raises(ArithmeticError, match="a bug"):
            await pair.session.ended
        with pytest.raises(ConnectionResetError):
            pair.client.recv(1)

    in_loop(scene)


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
