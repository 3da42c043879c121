"""Test a session by itself, at moments that a client cannot cause at will."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from echod.admin.snapshot import Count
from echod.connection.info import InfoSession
from echod.connection.state import Phase
from echod.net import kernel
from echod.server.client import Client
from echod.server.ledger import Counters
from echod.server.quota import Quota
from echod.settings.model import LimitsSettings
from harness import reset
from pairs import LIMITS, SHUTDOWN
from serving import server_settings

if TYPE_CHECKING:
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
        count.add([pair.life()])
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
            await pair.life().run(server_settings(), Quota(0))
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
    """Do not pause reading after a large read if the kernel took all of it or reading is already paused."""

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


def test_info_of_a_session_that_has_ended() -> None:
    """Send no description if the session was closed before."""
    with socket.socket() as sock:
        session = InfoSession(sock, LIMITS, SHUTDOWN, None, dict)  # type: ignore[arg-type]
        session.close("cut")
        session.begin()
        assert session.written == 0


def test_info_discards_input() -> None:
    """Data that a client sends in mode info is counted, and not echoed."""
    with socket.socket() as sock:
        session = InfoSession(sock, LIMITS, SHUTDOWN, None, dict)  # type: ignore[arg-type]
        session.data_received(b"12345")
        assert (session.discarded, session.received) == (5, 0)


def test_peer_of_another_family() -> None:
    """Show a peer address of another family as the kernel reports it."""
    with socket.socket() as sock:
        assert Client(sock, (3, 5000), 0, lambda _, __: None).peer == "(3, 5000)"  # type: ignore[arg-type,return-value]
