"""Test pauses of the process. The time in which the process did not run does not count against a client."""

from __future__ import annotations

import asyncio
import contextlib
import select
import signal
import socket
import ssl
from typing import TYPE_CHECKING

import pytest

from echod.clock import Clock
from echod.connection.echo import EchoSession
from echod.connection.linger import Linger
from echod.connection.state import Phase
from echod.loops import loop_factory
from echod.server.client import Client
from echod.server.drain import Drain
from echod.settings.model import LimitsSettings, ShutdownSettings
from harness import PATIENCE, UNHURRIED

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from certificates import Certificates
    from harness import Daemon, Start

V1 = b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 2000\r\n"
LIMITS = LimitsSettings(idle_timeout=10, write_timeout=10, handshake_timeout=10)


class Source:
    """A time source that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_passes_up_to_the_announced_look() -> None:
    """Count all time up to a quarter of a second after the announced look, and nothing beyond that."""
    source = Source()
    clock = Clock(source)
    source.now += 7
    assert (clock.time(), clock.late) == (107, False)
    clock.announce(1)
    source.now += 1.125
    assert (clock.time(), clock.late) == (108.125, False)
    clock.announce(1)
    source.now += 3600
    assert (clock.time(), clock.late) == (109.375, True)
    clock.announce(1)
    assert (clock.time(), clock.late) == (109.375, False)
    source.now += 1
    assert clock.time() == 110.375


class Ends:
    """A server's client, and the peer socket of its connection."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.peer = socket.create_connection(listening.getsockname(), PATIENCE)
            sock, address = listening.accept()
        session = EchoSession(
            sock, LimitsSettings(), ShutdownSettings(linger_timeout=1.0), asyncio.get_running_loop().create_future()
        )
        self.client = Client(sock, address, 0, lambda _, __: session)
        self.session = session

    async def connect(self) -> None:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: self.session, self.session.sock)


@contextlib.contextmanager
def ends() -> Iterator[Ends]:
    both = Ends()
    try:
        yield both
    finally:
        both.peer.close()
        both.session.sock.close()


def run(loop_name: str, scene: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(scene(), PATIENCE)

    with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
        runner.run(main())


@pytest.mark.parametrize("sent", [V1, b""])
@pytest.mark.parametrize("phase", [Phase.PROXY_HEADER, Phase.HANDSHAKE])
def test_unread_input_in_a_stage(loop_name: str, phase: Phase, sent: bytes) -> None:
    """Do not close a client in a handshake while the kernel holds unread bytes or a FIN."""

    async def scene() -> None:
        with ends() as both:
            both.session.expect(phase)
            reason = phase.name.lower()
            assert both.client.overdue(0, LIMITS) is None
            assert both.client.overdue(9.9, LIMITS) is None
            assert both.client.overdue(10, LIMITS) == reason
            both.peer.sendall(sent)
            if not sent:
                both.peer.shutdown(socket.SHUT_WR)
            assert both.client.overdue(10, LIMITS) is None
            both.session.sock.recv(len(sent))
            if sent:
                assert both.client.overdue(10, LIMITS) == reason

    run(loop_name, scene)


def test_an_unread_fin_is_not_silence(loop_name: str) -> None:
    """Treat a client with an unread FIN as neither idle nor quiet."""

    async def scene() -> None:
        with ends() as both:
            drain = Drain([both.client], lambda: True)
            drain.close_quiet(0, quiet_period=1)
            assert both.client.overdue(0, LIMITS) is None
            both.peer.shutdown(socket.SHUT_WR)
            assert both.client.overdue(11, LIMITS) is None
            drain.close_quiet(11, quiet_period=1)
            assert both.session.reason is None

    run(loop_name, scene)


def test_pause_in_a_linger(loop_name: str) -> None:
    """Read the bytes and the FIN that a client sent during a pause before the linger ends."""

    async def scene() -> None:
        with ends() as both:
            await both.connect()
            both.session.close("idle")
            assert await asyncio.to_thread(both.peer.recv, 1) == b""
            assert both.session.transport is not None
            linger = both.session.transport.get_protocol()
            assert isinstance(linger, Linger)
            source = Source()
            linger._clock = Clock(source)
            linger._expiry = source.now + 1
            linger._schedule(PATIENCE)
            source.now += 3600
            both.peer.sendall(b"late")
            linger._poll()
            assert not both.session.transport.is_closing()
            both.peer.shutdown(socket.SHUT_WR)
            await both.session.ended
            assert (both.session.eof, both.session.discarded) == (True, 4)

    run(loop_name, scene)


def test_pause_in_a_linger_of_a_silent_client(loop_name: str) -> None:
    """Close a client that sent nothing during the pause."""

    async def scene() -> None:
        with ends() as both:
            await both.connect()
            both.session.close("idle")
            assert both.session.transport is not None
            linger = both.session.transport.get_protocol()
            assert isinstance(linger, Linger)
            source = Source()
            linger._clock = Clock(source)
            linger._expiry = source.now
            linger._schedule(PATIENCE)
            source.now += 3600
            linger._poll()
            await both.session.ended
            assert not both.session.eof

    run(loop_name, scene)


class PausedDrain(Drain):
    """A drain on the test's time source. Its first wait is a pause of one hour."""

    waits = 0

    def __init__(self, clients: list[Client], source: Source) -> None:
        super().__init__(clients, lambda: True, source)
        self.source = source

    async def _wait_until(self, when: float) -> None:
        self._clock.announce(when - self._clock.time())
        self.waits += 1
        self.source.now += 3600 if self.waits == 1 else when - self._clock.time()


def test_pause_in_a_drain(loop_name: str) -> None:
    """Leave a client most of `drain_timeout` and `linger_timeout` after a pause of one hour."""

    async def scene() -> None:
        with ends() as both:
            drain = PausedDrain([both.client], Source())
            await drain.run(ShutdownSettings(quiet_period=PATIENCE, drain_timeout=10, linger_timeout=5))
            assert both.session.reason == "cut"
            # The drain takes 9.5 seconds and the linger 5, in steps of a quarter of a second.
            assert drain.waits == pytest.approx((9.5 + 5) / 0.25, abs=2)

    run(loop_name, scene)


class SendsWhilePaused(Drain):
    """A drain with a pause of one hour as its first wait. The client sends data during that pause."""

    def __init__(self, clients: list[Client], source: Source, peer: socket.socket) -> None:
        super().__init__(clients, lambda: True, source)
        self.source, self.peer = source, peer

    async def _wait_until(self, when: float) -> None:
        if self.source.now == Source().now:
            self._clock.announce(when - self._clock.time())
            self.peer.sendall(b"last words")
            self.source.now += 3600
        else:
            await super()._wait_until(when)
            self.source.now += max(0.0, when - self._clock.time())


def test_client_speaks_in_a_pause_that_outlasts_the_drain(loop_name: str) -> None:
    """Echo the bytes that a client sent during a pause, even if the pause outlasts `drain_timeout`."""

    async def scene() -> None:
        with ends() as both:
            await both.connect()
            drain = SendsWhilePaused([both.client], Source(), both.peer)
            await drain.run(ShutdownSettings(quiet_period=PATIENCE, drain_timeout=0.1, linger_timeout=0.1))
            assert both.peer.recv(100) == b"last words"
            assert both.peer.recv(1) == b""
            await both.session.ended
            assert both.session.reason == "cut"

    run(loop_name, scene)


# The real daemon, stopped by SIGSTOP for longer than its timeouts


def pause(daemon: Daemon, client: socket.socket, seconds: float) -> None:
    """Keep the daemon paused for some seconds, check that the client gets nothing, and resume the daemon."""
    assert select.select([client], [], [], seconds)[0] == []
    daemon.send_signal(signal.SIGCONT)


def test_paused_before_the_proxy_header(start: Start) -> None:
    """Serve clients with headers that arrived during a pause longer than `handshake_timeout`."""
    options = ("--listeners.p.address", "127.0.0.1:0", "--listeners.p.proxy-protocol", "require")
    daemon = start(*options, "--limits.handshake-timeout", "0.5", *UNHURRIED, listen=None)
    with daemon.connect() as client, daemon.connect() as header_only:
        daemon.settle()
        daemon.freeze()
        client.sendall(V1 + b"data")
        header_only.sendall(V1)
        pause(daemon, client, 2)
        assert client.recv(4) == b"data"
        header_only.sendall(b"x")
        assert header_only.recv(1) == b"x"
    daemon.wait_for("client_closed", count=2, reason="eof")
    assert daemon.stop() == 0


def received(sock: socket.socket) -> bytes:
    """Receive some bytes, and assert that they are not EOF."""
    data = sock.recv(65536)
    assert data
    return data


def test_paused_in_the_tls_handshake(start: Start, certificates: Certificates) -> None:
    """Serve a client with a ClientHello that arrived during a pause longer than `handshake_timeout`."""
    daemon = start(*certificates.options(), "--limits.handshake-timeout", "3", *UNHURRIED, listen=None)
    with daemon.connect() as sock:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        first = certificates.context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        with pytest.raises(ssl.SSLWantReadError):
            first.do_handshake()
        daemon.settle()
        daemon.freeze()
        sock.sendall(outgoing.read())
        pause(daemon, sock, 3.5)
        while True:
            try:
                first.do_handshake()
                break
            except ssl.SSLWantReadError:
                incoming.write(received(sock))
        first.write(b"data")
        sock.sendall(outgoing.read())
        echo = b""
        while not echo:
            incoming.write(received(sock))
            with contextlib.suppress(ssl.SSLWantReadError):
                echo = first.read(10)
        assert echo == b"data"
    assert daemon.stop() == 0
