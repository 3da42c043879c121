"""Test a session by itself, at moments that a client cannot cause at will."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from echod.admin.status import Count, _look
from echod.connection.info import InfoSession
from echod.connection.state import Phase
from echod.net import kernel
from echod.net.listeners import ListeningSocket
from echod.server.client import AdmissionPolicy, Client, Quota, Timeouts
from echod.server.drain import Drain, DrainSettings
from echod.server.ledger import Counters, Ledger
from echod.server.server import Server, ServerSettings, _cancel
from echod.settings.model import LimitsSettings, ShutdownSettings
from echod.settings.resources import loop_factory
from harness import PATIENCE, reset
from pairs import LIMITS, SHUTDOWN

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from pairs import InLoop, Pair


def test_close_while_connecting(in_loop: InLoop) -> None:
    """Send FIN to a client that was closed while connecting."""

    async def scene(pair: Pair) -> None:
        phases = [pair.session.phase]
        pair.session.close("cut")
        assert [*phases, pair.session.phase] == [Phase.CONNECTING, Phase.FLUSHING]
        assert pair.session.undelivered() == pair.session.unsent() == 0
        pair.session.stop_lingering()
        await pair.connect()
        assert await asyncio.to_thread(pair.client.recv, 1) == b""
        await pair.session.ended
        assert (pair.session.reason, pair.session.phase) == ("cut", Phase.CLOSED)

    in_loop(scene)


def test_abort_while_connecting(in_loop: InLoop) -> None:
    """Reset a client that was aborted while connecting."""

    async def scene(pair: Pair) -> None:
        pair.session.abort("aborted")
        await pair.connect()
        await pair.session.ended
        with pytest.raises(ConnectionResetError):
            pair.client.recv(1)
        assert pair.session.reason == "aborted"

    in_loop(scene)


def test_close_after_an_unread_reset(in_loop: InLoop) -> None:
    """Report a reset that the kernel has, but the loop has not read yet when the session closes."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        reset(pair.client)
        pair.session.close("idle")
        await pair.session.ended
        assert pair.session.reason == "reset"

    in_loop(scene)


def test_closed_session_does_not_change(in_loop: InLoop) -> None:
    """Ignore a second close between the end of a session and its removal from the registry."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.client.shutdown(socket.SHUT_WR)
        await pair.session.ended
        pair.session.abort("stalled")
        pair.session.close("idle")
        pair.session.stop_lingering()
        assert pair.session.reason == "eof"
        assert pair.session.undelivered() == 0
        count = Count(Counters(), 0, 0)
        _look(count, [pair.life()])
        assert (count.sent, count.states) == (0, {})

    in_loop(scene)


def test_refused_transport(in_loop: InLoop) -> None:
    """Report a reset and close the socket if the loop cannot make a transport."""

    async def scene(pair: Pair) -> None:
        loop = asyncio.get_running_loop()

        async def refuse(*_: object) -> None:
            raise ConnectionResetError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(loop), "connect_accepted_socket", refuse)
            await pair.life().run(AdmissionPolicy(), Quota(0))
        assert pair.session.reason == "reset"
        assert pair.sock.fileno() == -1

    in_loop(scene)


def test_a_large_read_counts_whole(in_loop: InLoop) -> None:
    """Pause reading while a read larger than the write buffer is unsent, because all of it is in memory."""

    async def scene(pair: Pair) -> None:
        pair.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        await pair.connect()
        pair.session.data_received(bytes(300_000))
        assert 0 < pair.session.unsent() < 290_000
        assert pair.session.paused
        while not pair.session.ended.done() and pair.session.paused:
            assert await asyncio.to_thread(pair.client.recv, 4096)
        pair.client.close()
        await pair.session.ended

    in_loop(scene, 4096)


def test_abort_meets_the_last_write(in_loop: InLoop) -> None:
    """Send RST instead of FIN even if the buffer empties between an abort and its report."""

    async def scene(pair: Pair) -> None:
        pair.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        await pair.connect()
        while not pair.session.unsent():
            pair.session.data_received(bytes(100_000))
        pair.session.close("cut")
        # This read makes room for all unsent bytes before the loop polls the socket again.
        total = 0
        while kernel.readable(pair.client):
            total += len(pair.client.recv(1 << 20))
        pair.session.abort("aborted")
        await pair.session.ended
        with pytest.raises(ConnectionResetError):
            total += len(read_to_the_end(pair.client))
        assert pair.session.reason == "aborted"
        assert pair.session.delivery is not None
        assert pair.session.delivery.acked >= total

    in_loop(scene)


def read_to_the_end(client: socket.socket) -> bytes:
    """Read until EOF."""
    data = b""
    while more := client.recv(1 << 20):
        data += more
    return data


def test_unread_input_is_no_silence(in_loop: InLoop) -> None:
    """Neither the sweep nor a drain takes a client for silent whose message is there to be read."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        client = pair.life()
        drain = Drain([client], lambda: True, DrainSettings(0, quiet_period=1, drain_timeout=9, linger_timeout=1))
        drain._dismiss_quiet(0)
        pair.client.sendall(b"x")
        timeouts = Timeouts(idle=1, write=30, handshake=10)
        assert client.overdue(5, timeouts) is None
        drain._dismiss_quiet(5)
        before = pair.session.reason
        assert await asyncio.to_thread(pair.client.recv, 1) == b"x"
        assert client.overdue(6, timeouts) is None
        assert client.overdue(8, timeouts) == "idle"
        for now in (6, 6.5, 8):
            drain._dismiss_quiet(now)
        assert (before, pair.session.reason) == (None, "quiet")
        pair.client.shutdown(socket.SHUT_WR)
        await pair.session.ended

    in_loop(scene)


def test_reset_after_our_fin(in_loop: InLoop) -> None:
    """Keep the reason `quiet` if the client resets after our FIN."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.session.close("quiet")
        assert await asyncio.to_thread(pair.client.recv, 1) == b""
        reset(pair.client)
        await pair.session.ended
        assert pair.session.reason == "quiet"

    in_loop(scene)


def test_reset_while_the_loop_ends(in_loop: InLoop) -> None:
    """Record a reset after `ended` was cancelled together with the client's task."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.session.ended.cancel()
        reset(pair.client)
        while pair.session.delivery is None:  # noqa: ASYNC110  (the event for it is cancelled)
            await asyncio.sleep(0)
        assert pair.session.reason == "reset"

    in_loop(scene)


def test_fin_after_an_abort(in_loop: InLoop) -> None:
    """Send no FIN if the session is aborted or lost between its last write and its FIN, one iteration later."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.session.close("quiet")
        pair.session.resume_writing()
        pair.session.abort("aborted")
        pair.session._send_fin()  # the transport is still closing
        await pair.session.ended
        pair.session._send_fin()
        assert pair.session.reason == "aborted"

    in_loop(scene)


def test_large_reads_that_do_not_pause_reading(in_loop: InLoop) -> None:
    """Do not pause reading after a large read if the kernel took all of it, or if reading is already paused."""

    async def scene(pair: Pair) -> None:
        pair.session.reconfigure(LimitsSettings(write_buffer=1000), SHUTDOWN)
        await pair.connect()
        pair.session.data_received(bytes(1001))
        paused = [pair.session.paused]
        while not pair.session.paused:
            pair.session.data_received(bytes(100_000))
        pair.session.data_received(bytes(1001))
        pair.session.reconfigure(LIMITS, SHUTDOWN)  # applied later, when reading is not paused
        assert [*paused, pair.session.paused] == [False, True]
        pair.session.stop_lingering()
        await pair.session.ended
        assert pair.session.reason == "aborted"

    in_loop(scene, 4096)


def test_figures_of_a_closed_socket() -> None:
    """Return None for a unix socket, and raise for a closed socket, which is a defect."""
    with socket.socket() as sock, socket.socket(socket.AF_UNIX) as unix:
        assert kernel.tcp_info(sock) is not None
        assert kernel.tcp_info(unix) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        kernel.tcp_info(sock)


def test_defect_that_a_transport_reports(in_loop: InLoop) -> None:
    """Raise an exception that a transport reports, unless the network caused it."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        transport = pair.session.transport
        assert transport is not None
        pair.session.connection_lost(KeyError("a bug"))
        with pytest.raises(KeyError):
            await pair.session.ended
        assert pair.session.reason == "failed"
        transport.abort()  # reports the end again
        while pair.sock.fileno() != -1:  # noqa: ASYNC110  (no event tells)
            await asyncio.sleep(0)
        assert pair.session.reason == "failed"

    in_loop(scene)


class Scripted(Drain):
    """A drain of one client, which waits for nothing but what a test does at each of its waits."""

    def __init__(
        self, pair: Pair, settings: DrainSettings, emptied: Sequence[bool], *steps: Callable[[], object]
    ) -> None:
        answers = iter(emptied)
        self.clients = [pair.life()]
        super().__init__(self.clients, lambda: next(answers), settings)
        self._steps = list(steps)

    async def _wait_until(self, when: float) -> None:
        if self._steps:
            self._steps.pop(0)()
            self.woken = self._woken.is_set()
            self._woken.clear()
        else:
            await super()._wait_until(when)


PATIENT = DrainSettings(0, quiet_period=PATIENCE, drain_timeout=PATIENCE, linger_timeout=PATIENCE)
HASTY = PATIENT._replace(drain_timeout=0)


def test_drain_of_who_leaves(in_loop: InLoop) -> None:
    """A departure wakes it where it may be the last, or gives a descriptor to who waits in the backlog."""

    async def scene(pair: Pair) -> None:
        await pair.connect()

        def stay() -> None:
            drain.client_left()
            assert drain._woken.is_set()

        def stay_on() -> None:
            drain.client_left()
            assert not drain._woken.is_set()

        def leave() -> None:
            drain.clients.clear()
            drain.client_left()

        drain = Scripted(pair, PATIENT, [False, False, True], stay, stay_on, leave)
        assert await drain.run()
        assert drain.woken
        drain = Scripted(pair, HASTY, [False], leave)
        assert not await drain.run()
        assert pair.session.reason == "cut"
        pair.client.shutdown(socket.SHUT_WR)
        await pair.session.ended

    in_loop(scene)


@pytest.mark.parametrize("when", ["before", "while it waits", "after the cut"])
def test_drain_is_hurried(in_loop: InLoop, when: str) -> None:
    """A second signal may come at any moment of it."""

    async def scene(pair: Pair) -> None:
        await pair.connect()

        def hurry() -> None:
            drain.hurry()

        drain = Scripted(pair, HASTY if when == "after the cut" else PATIENT, [True], hurry)
        if when == "before":
            drain.hurry()
        assert await drain.run() == (when != "before")
        assert pair.session.reason == "aborted"
        await pair.session.ended

    in_loop(scene)


def test_drain_comes_to_its_end(in_loop: InLoop) -> None:
    """Who has not closed by then is closed, having been looked at as often as its silence needed."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        drain = Scripted(pair, DrainSettings(0, 0.01, 0.3, 0.05), [True])
        await drain.run()
        await pair.session.ended
        assert pair.session.reason == "quiet"

    in_loop(scene)


def test_info_of_a_session_that_has_ended() -> None:
    """Send no description if the session was closed before."""
    with socket.socket() as sock:
        session = InfoSession(sock, LIMITS, SHUTDOWN, None, dict)  # type: ignore[arg-type]
        session.close("cut")
        session.begin()
        assert session.written == 0


def test_peer_of_another_family() -> None:
    """A peer that is neither an IP address nor a unix socket's is shown as the kernel gives it."""
    with socket.socket() as sock:
        assert Client(sock, (3, 5000), 0, 0, lambda _, __: None).peer == "(3, 5000)"  # type: ignore[arg-type,return-value]


class Unsteady(socket.socket):
    """A listening socket some of whose connections are gone when they are to be accepted, or find no descriptor."""

    gone = 0
    full = 0

    def accept(self) -> tuple[socket.socket, Any]:
        if self.full:
            self.full -= 1
            raise OSError(errno.EMFILE, "full")
        if self.gone:
            self.gone -= 1
            raise ConnectionAbortedError(errno.ECONNABORTED, "gone")
        return super().accept()


def serving(loop_name: str, scene: Callable[[Server, Unsteady], Awaitable[None]], max_connections: int = 10) -> None:
    """Run a scene with a server in the loop under test, and shut that down."""

    async def main() -> None:
        listening = Unsteady()
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)
        settings = ServerSettings(
            max_connections=max_connections,
            timeouts=Timeouts(idle=0, write=30, handshake=10),
            limits=LimitsSettings(),
            shutdown=ShutdownSettings(),
            drain=DrainSettings(0, 0.1, 1, 1.0),
        )
        server = Server(
            [ListeningSocket(listening)], settings, Ledger(structlog.wrap_logger(structlog.ReturnLogger()), "none")
        )
        server.start()
        await asyncio.sleep(0)
        await scene(server, listening)
        receipt = await server.shutdown()
        assert receipt.unacked_bytes == 0

    with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
        runner.run(main())


async def echo(listening: socket.socket) -> None:
    """Be a client that is served."""
    reader, writer = await asyncio.open_connection(*listening.getsockname())
    writer.write(b"x")
    assert await asyncio.wait_for(reader.read(1), PATIENCE) == b"x"
    writer.close()
    await writer.wait_closed()


def test_client_leaves_while_accepting_is_held(loop_name: str) -> None:
    """A departure between the moment accepting stops and the one in which the listener task waits is not missed."""

    async def scene(server: Server, listening: Unsteady) -> None:
        server._hold("a test", None)
        server._hold("a test, of another socket in the same iteration", None)
        server._room.set()
        for _ in range(3):
            await asyncio.sleep(0)
        await echo(listening)
        assert server.ledger.counters.accept_pauses == 1

    serving(loop_name, scene)


def test_connections_that_are_gone(loop_name: str) -> None:
    """accept(2) may fail for the one connection alone: the next is served, in a stop as well."""

    async def scene(_: Server, listening: Unsteady) -> None:
        listening.gone = 2
        await echo(listening)
        assert listening.gone == 0
        listening.gone = 2

    serving(loop_name, scene)


def test_connections_that_are_always_gone(loop_name: str) -> None:
    """If accept(2) never succeeds, a stop gives up the backlog at the end of the drain."""

    async def scene(server: Server, listening: Unsteady) -> None:
        listening.gone = sys.maxsize
        with socket.create_connection(listening.getsockname()):
            assert (await server.shutdown()).clients == 0
        assert listening.fileno() == -1

    serving(loop_name, scene)


def test_more_than_one_wake_up_takes(loop_name: str) -> None:
    """Who is left over when a wake-up has accepted its measure is for the next one."""

    async def scene(server: Server, listening: Unsteady) -> None:
        clients = [socket.create_connection(listening.getsockname()) for _ in range(100)]
        while server.clients < len(clients):  # noqa: ASYNC110  (no event tells)
            await asyncio.sleep(0)
        for client in clients:
            client.close()

    serving(loop_name, scene, max_connections=1000)


def holds(server: Server) -> bool:
    """Tell whether somebody has to wait in the backlog."""
    return server.accept_paused


def test_cap_in_the_middle_of_a_wake_up(loop_name: str) -> None:
    """Whether somebody is left to wait shows at the next one."""

    async def scene(server: Server, listening: Unsteady) -> None:
        clients = [socket.create_connection(listening.getsockname()) for _ in range(3)]
        while not holds(server):  # noqa: ASYNC110  (no event tells)
            await asyncio.sleep(0)
        assert server.clients == 2
        for client in clients:
            client.close()
        while holds(server):  # noqa: ASYNC110  (nor here)
            await asyncio.sleep(0)
        assert server.ledger.counters.accept_pauses == 1

    serving(loop_name, scene, max_connections=2)


def test_no_descriptors_for_a_while(loop_name: str) -> None:
    """However often accept(2) fails for want of them, it is one pause, to the end of which the client waits."""

    async def scene(server: Server, listening: Unsteady) -> None:
        listening.full = 2
        await echo(listening)
        assert (listening.full, server.ledger.counters.accept_pauses) == (0, 1)

    serving(loop_name, scene)


@pytest.mark.parametrize("waiting", [False, True])
def test_no_descriptors_in_a_stop(loop_name: str, waiting: bool) -> None:
    """The listening socket is closed if nobody waits; if somebody does, it is tried again when a client has left."""

    async def scene(server: Server, listening: Unsteady) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as clients:
            staying = clients.enter_context(socket.create_connection(listening.getsockname()))
            while not server.clients:  # noqa: ASYNC110  (no event tells)
                await asyncio.sleep(0)
            listening.full = sys.maxsize
            if waiting:
                clients.enter_context(socket.create_connection(listening.getsockname()))
            stop = loop.create_task(server.shutdown())
            while server._drain is None or not server._drain._silence:  # noqa: ASYNC110  (nor here)
                await asyncio.sleep(0)
            assert (listening.fileno() != -1, server.clients) == (waiting, 1)
            listening.full = 0
            staying.close()
            while server.ledger.counters.accepted <= waiting or listening.fileno() != -1:  # noqa: ASYNC110  (nor here)
                await asyncio.sleep(0)
        assert (await stop).clients == 1 + waiting

    serving(loop_name, scene)


def test_aborted_before_it_stops(loop_name: str) -> None:
    """A stop that is to be at once leaves nobody waiting, and says nothing of those who do not wait."""

    async def scene(server: Server, listening: Unsteady) -> None:
        with socket.create_connection(listening.getsockname()) as client:
            while not server.clients:  # noqa: ASYNC110  (no event tells)
                await asyncio.sleep(0)
            server.abort()
            assert (await server.shutdown()).aborted == 1
            assert listening.fileno() == -1
            with pytest.raises(ConnectionResetError):
                client.recv(1)

    serving(loop_name, scene)


def test_cancel_lets_failures_out() -> None:
    """A task of the server's own that has failed is not taken for one that was cancelled."""

    async def main() -> None:
        async def fail() -> None:
            raise KeyError

        task = asyncio.get_running_loop().create_task(fail())
        await asyncio.wait([task])
        with pytest.raises(KeyError):
            await _cancel(task)

    asyncio.run(main())
