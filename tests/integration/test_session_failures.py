"""Test failures of one session: bad TLS records, failed writes and counters, and exceptions in its steps."""

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
from unittest.mock import MagicMock

import pytest
from pydantic import ByteSize

from echod.connection.faults.profile import FaultProfile
from echod.connection.faults.session import FaultSession
from echod.connection.line import LineSession
from echod.net import kernel
from echod.server.client import Client
from echod.server.drain import Drain
from echod.settings.model import FaultSettings, ShutdownSettings
from harness import PATIENCE, UNHURRIED, receive, reset
from pairs import LIMITS, SHUTDOWN, Pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from certificates import Certificates
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


@pytest.mark.parametrize(
    ("end", "failing"),
    [
        ("half-close", "unacknowledged"),
        ("half-close", "tcp_info"),
        ("half-close with echo on its way", "unacknowledged"),
        ("cut", "unacknowledged"),
    ],
)
def test_client_is_served_without_counters(
    in_loop: InLoop, monkeypatch: pytest.MonkeyPatch, end: str, failing: str
) -> None:
    """Send all echo and FIN even if the kernel refuses a counter."""
    size = 100_000 if "way" in end else 3

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.client.sendall(bytes(size))
        if size == 3:
            assert await asyncio.to_thread(pair.client.recv, 3) == bytes(3)
        FailingKernel(monkeypatch, failing, error=no_buffers())
        pair.session.reconfigure(LIMITS, ShutdownSettings(linger_timeout=0.1))
        lingering = asyncio.Event()
        pair.session.report_to(lambda state: lingering.set() if state == "lingering" else None)
        if end == "cut":
            pair.session.close("cut")
        else:
            pair.client.shutdown(socket.SHUT_WR)
        if size > 3:
            await lingering.wait()
        rest = size if size > 3 else 0
        assert len(await asyncio.to_thread(receive, pair.client, rest)) == rest
        assert await asyncio.to_thread(pair.client.recv, 1) == b""
        pair.client.close()
        await pair.session.ended
        assert pair.session.reason == ("cut" if end == "cut" else "eof")
        assert pair.session.delivery == (size, size, size, 0)
        # At the half-close of a client that has everything, TCP_INFO alone gives exact figures.
        exact = (end, failing) == ("half-close", "unacknowledged")
        assert pair.session.detail == ("" if exact else f"sent and acked are estimates: {no_buffers()}")

    in_loop(scene, receive_buffer=4096)


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
        assert Client(sock, "", 0, MagicMock()).peer == ""
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


def test_failure_at_the_opening(in_loop: InLoop) -> None:
    """Reset the client if its session cannot be opened. asyncio and uvloop would keep the connection unread."""

    async def scene(pair: Pair) -> None:
        def report(_: str) -> None:
            raise a_bug()

        pair.session.report_to(report)
        await pair.connect()
        with pytest.raises(ArithmeticError):
            await pair.session.ended
        assert pair.session.reason == "failed"
        with pytest.raises(ConnectionResetError):
            pair.client.recv(1)

    in_loop(scene)


def fail_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Make the next question to the kernel about a connection raise an error. Return the counter of the questions."""
    calls = itertools.count()

    def failing(ask: Callable[[socket.socket], Any]) -> Callable[[socket.socket], Any]:
        def call(sock: socket.socket) -> Any:
            if next(calls) == 0:
                raise a_bug()
            return ask(sock)

        return call

    for ask in (kernel.unacknowledged, kernel.tcp_info):
        monkeypatch.setattr(kernel, ask.__name__, failing(ask))
    return calls


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
        calls = fail_once(monkeypatch)
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
