"""Test reasons of ends. `eof` means that all echo was acknowledged, `io_error` that a call failed on this host."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from typing import TYPE_CHECKING

import pytest

from echod.connection.faults.profile import FaultProfile
from echod.connection.faults.session import FaultSession
from echod.settings.model import FaultSettings
from harness import PATIENCE, UNHURRIED, receive, reset, run
from injection import injected
from pairs import LIMITS, SHUTDOWN

if TYPE_CHECKING:
    from certificates import Certificates
    from harness import Daemon, Start
    from pairs import InLoop, Pair


# A TLS client that closes without waiting for our close_notify (RFC 8446, section 6.1)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("last", ["FIN", "RST"])
def test_close_after_close_notify(start: Start, certificates: Certificates, version: str, last: str) -> None:
    """Record `eof` for a client that gets its echo, sends close_notify and closes. RST may follow."""
    daemon = start(*certificates.options(), "--log.connections", "all", listen=None)
    context = certificates.context(version=version)
    for number in range(1, 21):
        client = certificates.join(daemon, context)
        client.send(b"hello")
        assert client.recv(5) == b"hello"
        client.shutdown(socket.SHUT_WR)
        if last == "RST":
            reset(client.sock)
        client.close()
        line = daemon.wait_for("client_closed", count=number)
        assert (line["reason"], line["received"], line["acked"]) == ("eof", 5, 5)
    assert daemon.stop() == 0


def test_close_without_a_byte(start: Start, certificates: Certificates) -> None:
    """Record `eof` for a client that closes after its handshake without reading our session tickets."""
    daemon = start(*certificates.options(), "--log.connections", "all", listen=None)
    client = certificates.join(daemon)
    with contextlib.closing(client):
        client.shutdown(socket.SHUT_WR)
    assert daemon.wait_for("client_closed")["reason"] == "eof"


def test_probe_ends_well(start: Start, certificates: Certificates) -> None:
    """Record `eof` for each health check by the probe."""
    daemon = start(*certificates.options(), listen=None)
    host, port = daemon.address
    for number in range(1, 4):
        done = run("probe", f"{host}:{port}", "--tls", "--ca", str(certificates.ca), "--server-name", "localhost")
        assert done.returncode == 0, done.stderr
        assert daemon.wait_for("client_closed", count=number)["reason"] == "eof"


def test_close_before_the_echo(start: Start, certificates: Certificates) -> None:
    """Record `reset` for a client that closes before its echo arrives."""
    daemon = start(*certificates.options(), listen=None)
    client = certificates.join(daemon)
    client.send(b"hello")
    assert client.recv(5) == b"hello"
    daemon.freeze()
    client.send(b"never echoed in time")
    client.shutdown(socket.SHUT_WR)
    client.close()
    daemon.send_signal(signal.SIGCONT)
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"], line["acked"]) == ("reset", 25, 5)


def test_close_while_echo_is_held_back(start: Start, certificates: Certificates) -> None:
    """Record `reset` for a client that closes while a fault holds back its echo."""
    daemon = start(
        *certificates.options(),
        *("--listeners.tls.fault", "late", "--faults.late.trigger", "late", "--faults.late.delay", "1"),
        listen=None,
    )
    client = certificates.join(daemon)
    client.send(b"soon")
    assert client.recv(4) == b"soon"
    client.send(b"late")
    daemon.settle()
    client.shutdown(socket.SHUT_WR)
    client.close()
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"], line["acked"]) == ("reset", 8, 4)


def test_end_with_echo_held_back(in_loop: InLoop) -> None:
    """Record `undelivered` if the connection is lost after EOF while a fault still holds back echo."""

    async def scene(pair: Pair) -> None:
        pair.session = FaultSession(
            pair.sock,
            LIMITS,
            SHUTDOWN,
            asyncio.get_running_loop().create_future(),
            FaultProfile("late", FaultSettings(delay=60)),
            "stream",
            1,
        )
        await pair.connect()
        pair.session.data_received(b"x")
        pair.client.shutdown(socket.SHUT_WR)
        while not pair.session.eof:  # noqa: ASYNC110  (the session has no event for it)
            await asyncio.sleep(0)
        assert pair.session.transport is not None
        pair.session.transport.abort()
        await pair.session.ended
        assert pair.session.reason == "undelivered"

    in_loop(scene)


def test_reset_after_all_echo(in_loop: InLoop) -> None:
    """Record `eof` for a client without TLS that acknowledged all echo and resets during the linger."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.client.sendall(b"hello")
        assert await asyncio.to_thread(pair.client.recv, 5) == b"hello"
        pair.session.close("eof")
        assert await asyncio.to_thread(pair.client.recv, 1) == b""
        reset(pair.client)
        await pair.session.ended
        assert pair.session.reason == "eof"

    in_loop(scene)


# A client that does not take its echo


def closing_unread(daemon: Daemon) -> socket.socket:
    """Return a client that has closed its direction and does not read its echo."""
    client = daemon.connect(receive_buffer=4096)
    client.sendall(bytes(100_000))
    client.shutdown(socket.SHUT_WR)
    return client


@pytest.mark.parametrize("choice", ["nonempty", "failed"])
def test_client_does_not_read(start: Start, choice: str) -> None:
    """Record `undelivered` for a client that closes its direction and does not read its echo within `linger_timeout`."""
    daemon = start("--shutdown.linger-timeout", "0.3", "--log.connections", choice, *UNHURRIED)
    with closing_unread(daemon):
        line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"]) == ("undelivered", 100_000)
    assert line["acked"] < 100_000


def test_client_does_not_read_in_a_stop(start: Start) -> None:
    """Record `undelivered` also if the drain ends first. The receipt counts the client as aborted, not completed."""
    daemon = start("--shutdown.drain-timeout", "0.1", "--shutdown.linger-timeout", "0.5")
    with closing_unread(daemon):
        daemon.settle()
        assert daemon.stop() == 0
    line = daemon.wait_for("client_closed")
    assert line["reason"] == "undelivered"
    receipt = daemon.receipt()
    assert (receipt["aborted"], receipt["unacked_bytes"]) == (1, line["sent"] - line["acked"])


def test_client_reads_in_the_end(start: Start) -> None:
    """Record `eof` for a client that reads all of its echo late, but within `linger_timeout`."""
    daemon = start("--shutdown.linger-timeout", str(PATIENCE), *UNHURRIED)
    with closing_unread(daemon) as client:
        daemon.settle()
        assert len(receive(client, 200_000)) == 100_000
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["acked"]) == ("eof", 100_000)


def test_client_resets_instead_of_taking_the_object(start: Start) -> None:
    """Record `reset` instead of `info` if the client resets before it has the JSON object."""
    daemon = start(
        *("--listeners.look.address", "127.0.0.1:0", "--listeners.look.mode", "info", "--log.connections", "failed"),
        listen=None,
    )
    daemon.freeze()
    reset(daemon.connect())
    daemon.send_signal(signal.SIGCONT)
    daemon.settle()
    assert daemon.stop() == 0
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"], line["acked"]) == ("reset", 0, 0)


# System calls that fail


def test_write_fails(start: Start) -> None:
    """Reset the client if its echo cannot be sent. FIN would make a part look complete. The detail names the call."""
    daemon = start(*UNHURRIED)
    with daemon.connect() as client, daemon.connect() as other:
        client.sendall(b"hello")
        assert receive(client, 5) == b"hello"
        with injected(daemon, "write,writev,sendto,sendmsg:error=ENOBUFS:when=1"):
            client.sendall(b"lost")
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        line = daemon.wait_for("client_closed")
        assert (line["reason"], line["detail"]) == ("io_error", "write: ENOBUFS")
        assert (line["received"], line["sent"], line["acked"]) == (9, 5, 5)
        other.sendall(b"served")
        assert receive(other, 6) == b"served"
        daemon.send_signal()
    assert daemon.wait() == 0
    assert daemon.loud() == []


@pytest.mark.parametrize("reason", ["cut", "line_too_long"])
@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_write_fails_after_close(in_loop: InLoop, reason: str, family: str) -> None:
    """Replace `cut` by `io_error` if the last write fails, but keep the reason of a client's own error."""

    async def scene(pair: Pair) -> None:
        if family == "unix":
            pair.client.close()
            pair.sock.close()
            pair.sock, pair.client = socket.socketpair()
            pair.sock.setblocking(False)
            pair.client.settimeout(PATIENCE)
            pair.renew()
        pair.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await pair.connect()
        pair.session.data_received(bytes(1_000_000))
        pair.session.close(reason)  # type: ignore[arg-type]
        pair.break_off(OSError(errno.ENOBUFS, "No buffer space available"))
        await pair.session.ended
        assert pair.session.reason == ("io_error" if reason == "cut" else reason)
        assert pair.session.delivery is not None
        assert pair.session.delivery.acked == 0 or family == "tcp"
        if reason == "cut":
            call = "write" if family == "tcp" else "read or write"
            assert pair.session.detail == f"{call}: ENOBUFS"
        if family == "tcp":
            with pytest.raises(ConnectionResetError):
                await asyncio.to_thread(receive, pair.client, 2_000_000)

    in_loop(scene, 4096)


@pytest.mark.parametrize(
    ("error", "reason", "detail"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "io_error", "read: ENOMEM"),
        (OSError("odd"), "io_error", "read: odd"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "reset", ""),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "reset", ""),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "reset", ""),
    ],
)
def test_errors_of_the_host_and_of_the_network(in_loop: InLoop, error: OSError, reason: str, detail: str) -> None:
    """Record an error of the network as `reset`, and an error of this host as `io_error`."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.client.sendall(b"hello")
        assert await asyncio.to_thread(pair.client.recv, 5) == b"hello"
        pair.break_off(error)
        await pair.session.ended
        assert (pair.session.reason, pair.session.detail) == (reason, detail)
        if reason == "io_error":
            with pytest.raises(ConnectionResetError):
                pair.client.recv(1)

    in_loop(scene)


class NoShutdown(socket.socket):
    """A socket that fails to shut down."""

    error = OSError(errno.ENOBUFS, "No buffer space available")

    def shutdown(self, _: int) -> None:
        raise self.error


@pytest.mark.parametrize("action", ["finish", "half_close"])
def test_shutdown_fails(in_loop: InLoop, action: str) -> None:
    """Send RST if FIN cannot be sent."""

    async def scene(pair: Pair) -> None:
        pair.sock = NoShutdown(fileno=pair.sock.detach())
        pair.sock.setblocking(False)
        if action == "finish":
            pair.renew()
        else:
            profile = FaultProfile("half", FaultSettings(trigger="x", action="half_close"))
            future = asyncio.get_running_loop().create_future()
            pair.session = FaultSession(pair.sock, LIMITS, SHUTDOWN, future, profile, "stream", 1)
        await pair.connect()
        if action == "finish":
            pair.session.close("quiet")
        else:
            pair.client.sendall(b"x")
        await pair.session.ended
        assert (pair.session.reason, pair.session.detail) == ("io_error", "shutdown: ENOBUFS")
        with pytest.raises(ConnectionResetError):
            pair.client.recv(1)

    in_loop(scene)


def test_setup_fails(in_loop: InLoop) -> None:
    """Name neither read nor write if the loop could not make the transport."""

    async def scene(pair: Pair) -> None:
        pair.session.connection_lost(OSError(errno.ENOBUFS, "No buffer space available"))
        await pair.session.ended
        assert (pair.session.reason, pair.session.detail) == ("io_error", "system call: ENOBUFS")
        pair.sock.close()

    in_loop(scene)


def test_stop_without_counters(start: Start) -> None:
    """Finish the stop and log each client's end even if the kernel refuses its counters."""
    daemon = start("--shutdown.quiet-period", "0.1", "--log.connections", "all")
    with daemon.connect() as client:
        client.sendall(b"hello")
        assert receive(client, 5) == b"hello"
        with injected(daemon, "getsockopt:error=ENOBUFS"):
            daemon.send_signal()
            assert client.recv(1) == b""
            client.close()
            assert daemon.wait() == 0
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"], line["sent"]) == ("quiet", 5, 5)
    assert line["detail"] == "sent and acked are estimates: [Errno 105] No buffer space available"
    assert daemon.receipt()["quiet"] == 1
