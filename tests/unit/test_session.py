"""A session by itself, at moments that a client cannot bring about at will."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from echod.admin.snapshot import Count
from echod.connection.echo import Linger, SessionSettings
from echod.connection.modes import InfoSession
from echod.net import kernel
from echod.server.client import Client
from echod.server.ledger import Counters
from echod.server.quota import Quota
from harness import reset
from servers import server_settings

if TYPE_CHECKING:
    from pairs import InLoop, Pair


def test_finished_before_it_is_connected(in_loop: InLoop) -> None:
    """A drain may reach a client that is accepted and has no transport yet: it gets FIN as soon as it has one."""

    async def scene(pair: Pair) -> None:
        pair.session.close("cut")
        assert pair.session.undelivered() == pair.session.unsent() == 0
        pair.session.end()
        await pair.connect()
        assert await asyncio.to_thread(pair.client.recv, 1) == b""
        await pair.session.ended
        assert pair.session.reason == "cut"

    in_loop(scene)


def test_aborted_before_it_is_connected(in_loop: InLoop) -> None:
    """So may a second signal: the client is reset."""

    async def scene(pair: Pair) -> None:
        pair.session.abort("aborted")
        await pair.connect()
        await pair.session.ended
        with pytest.raises(ConnectionResetError):
            pair.client.recv(1)
        assert pair.session.reason == "aborted"

    in_loop(scene)


def test_finish_meets_a_reset(in_loop: InLoop) -> None:
    """The client's reset is in the kernel, and not yet known to the loop, when the session is told to finish."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        reset(pair.client)
        pair.session.close("idle")
        await pair.session.ended
        assert pair.session.reason == "reset"

    in_loop(scene)


def test_what_has_ended_stays_as_it_was(in_loop: InLoop) -> None:
    """Between its end and its leaving the registry, a session may be told to end again."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.client.shutdown(socket.SHUT_WR)
        await pair.session.ended
        pair.session.abort("stalled")
        pair.session.close("idle")
        pair.session.end()
        assert pair.session.reason == "eof"
        assert pair.session.undelivered() == 0
        count = Count(Counters(), 0, 0)
        count.add([pair.life()])
        assert (count.sent, count.states) == (0, {})

    in_loop(scene)


def test_client_gone_before_its_turn(in_loop: InLoop) -> None:
    """Where the kernel or the loop refuses the accepted socket, that is a reset: nothing leaks, nothing is raised."""

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


def test_late_acknowledgement(in_loop: InLoop) -> None:
    """After the client's EOF the connection stays until the client has taken all, however late it begins."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        await asyncio.to_thread(pair.client.sendall, bytes(300_000))
        pair.client.shutdown(socket.SHUT_WR)
        while not pair.session.eof:  # noqa: ASYNC110  (the session has no event for it)
            await asyncio.sleep(0)
        assert not pair.session.ended.done()

        assert len(await asyncio.to_thread(read_to_the_end, pair.client)) == 300_000
        await pair.session.ended
        assert pair.session.delivery is not None
        assert pair.session.delivery.acked == 300_000

    in_loop(scene, 4096)


def test_a_large_read_counts_whole(in_loop: InLoop) -> None:
    """A read larger than the write buffer pauses reading when any of it is unsent, as all of it is kept in memory."""

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
    """The buffer may empty in the moment between an abort and the end: the client is reset, and sees no clean EOF."""

    async def scene(pair: Pair) -> None:
        pair.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        await pair.connect()
        while not pair.session.unsent():
            pair.session.data_received(bytes(100_000))
        pair.session.close("cut")
        # What is read here makes room for all that is unsent, before the loop looks at the socket again.
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
    """Who is let go and then resets was let go."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.session.close("quiet")
        assert await asyncio.to_thread(pair.client.recv, 1) == b""
        reset(pair.client)
        await pair.session.ended
        assert pair.session.reason == "quiet"

    in_loop(scene)


def test_reset_while_the_loop_ends(in_loop: InLoop) -> None:
    """A connection may be lost after its client's task was cancelled, and with it what the task was waiting for."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.session.ended.cancel()
        reset(pair.client)
        while pair.session.delivery is None:  # noqa: ASYNC110  (the event for it is cancelled)
            await asyncio.sleep(0)
        assert pair.session.reason == "reset"

    in_loop(scene)


def test_reset_while_it_lingers(in_loop: InLoop) -> None:
    """After the client's EOF no transport watches the socket: it is the linger that sees the client's reset."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.session.data_received(bytes(200_000))
        pair.client.shutdown(socket.SHUT_WR)
        while not pair.session.eof:  # noqa: ASYNC110  (the session has no event for it)
            await asyncio.sleep(0)
        assert pair.session.transport is not None
        linger = pair.session.transport.get_protocol()
        assert isinstance(linger, Linger)
        linger._timer.cancel()
        linger._poll()  # nothing has changed: it looks again later
        assert not pair.session.ended.done()
        reset(pair.client)
        await pair.session.ended
        assert pair.session.reason == "reset"

    in_loop(scene, 4096)


def test_end_of_the_patience(in_loop: InLoop) -> None:
    """A client that takes some of its echo after our FIN has its patience anew, and is closed when that is over."""

    async def scene(pair: Pair) -> None:
        pair.session.reconfigure(SessionSettings(290_000, 0.5))
        await pair.connect()
        pair.session.data_received(bytes(200_000))
        pair.session.close("idle")
        assert pair.session.transport is not None
        linger = pair.session.transport.get_protocol()
        assert isinstance(linger, Linger)
        linger._expiry = before = linger._expiry - 0.1  # a loop's clock may stand still for a millisecond
        assert await asyncio.to_thread(pair.client.recv, 1000, socket.MSG_WAITALL) == bytes(1000)
        linger._least += 1  # whether or not the kernel has told of these yet
        linger._timer.cancel()
        linger._poll()
        assert linger._expiry > before
        await pair.session.ended
        assert pair.session.delivery is not None
        assert pair.session.delivery.acked < 200_000

    in_loop(scene, 4096)


def test_fin_of_a_session_that_is_gone(in_loop: InLoop) -> None:
    """Between the last write and its FIN, which is an iteration later, the session may be aborted, or lost."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.session.close("quiet")
        pair.session.resume_writing()
        pair.session.abort("aborted")
        pair.session._send_fin()  # still to be closed
        await pair.session.ended
        pair.session._send_fin()
        assert pair.session.reason == "aborted"

    in_loop(scene)


def test_large_reads_that_pause_nothing(in_loop: InLoop) -> None:
    """One that the kernel has taken whole, and one of a session that is paused already."""

    async def scene(pair: Pair) -> None:
        pair.session.reconfigure(SessionSettings(1000, 1.0))
        await pair.connect()
        pair.session.data_received(bytes(1001))
        paused = [pair.session.paused]
        while not pair.session.paused:
            pair.session.data_received(bytes(100_000))
        pair.session.data_received(bytes(1001))
        pair.session.reconfigure(SessionSettings(290_000, 1.0))  # which waits until it is not paused any more
        assert [*paused, pair.session.paused] == [False, True]
        pair.session.end()
        await pair.session.ended
        assert pair.session.reason == "aborted"

    in_loop(scene, 4096)


def test_figures_of_a_closed_socket() -> None:
    """That a socket has no TCP_INFO is one thing, and that it is none any more another, which is a bug."""
    with socket.socket() as sock, socket.socket(socket.AF_UNIX) as unix:
        assert kernel.tcp_info(sock) is not None
        assert kernel.tcp_info(unix) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        kernel.tcp_info(sock)


def test_lost_for_another_reason(in_loop: InLoop) -> None:
    """What a transport reports that is no fault of the network's comes out where the end is waited for."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        transport = pair.session.transport
        assert transport is not None
        pair.session.connection_lost(KeyError("a bug"))
        with pytest.raises(KeyError):
            await pair.session.ended
        assert pair.session.reason == "failed"
        transport.abort()  # which reports the end once more
        while pair.sock.fileno() != -1:  # noqa: ASYNC110  (no event tells)
            await asyncio.sleep(0)
        assert pair.session.reason == "failed"

    in_loop(scene)


def test_info_of_a_session_that_has_ended() -> None:
    """A drain may reach a client before its answer does: then there is none."""
    with socket.socket() as sock:
        session = InfoSession(sock, SessionSettings(1, 1), None, dict)  # type: ignore[arg-type]
        session.close("cut")
        session.begin()
        assert session.written == 0


def test_peer_of_another_family() -> None:
    """A peer that is neither an IP address nor a unix socket's is shown as the kernel gives it."""
    with socket.socket() as sock:
        assert Client(sock, (3, 5000), 0, 0, lambda _, __: None).peer == "(3, 5000)"  # type: ignore[arg-type,return-value]


def test_last_acknowledgement_between_two_looks(in_loop: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection whose last acknowledgement comes while it is looked at has ended well, and was not reset."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.session.data_received(bytes(200_000))
        pair.client.shutdown(socket.SHUT_WR)
        while not pair.session.eof:  # noqa: ASYNC110  (the session has no event for it)
            await asyncio.sleep(0)
        unacknowledged = kernel.unacknowledged
        looks = []

        def look(sock: socket.socket) -> int:
            looks.append(sock)
            left = unacknowledged(sock)
            if len(looks) == 2:  # in a look of the linger's: now the client takes all, and closes
                read_to_the_end(pair.client)
                pair.client.close()
            return left

        monkeypatch.setattr(kernel, "unacknowledged", look)
        await pair.session.ended
        assert len(looks) > 2
        assert pair.session.reason == "eof"

    in_loop(scene, 4096)


def test_client_closes_before_it_has_read(in_loop: InLoop) -> None:
    """After our FIN the client sends its own, and only then takes its echo: the connection waits for that."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.session.data_received(bytes(200_000))
        pair.session.close("idle")
        pair.client.shutdown(socket.SHUT_WR)
        while not pair.session.eof:  # noqa: ASYNC110  (the session has no event for it)
            await asyncio.sleep(0)
        assert not pair.session.ended.done()
        assert len(await asyncio.to_thread(read_to_the_end, pair.client)) == 200_000
        await pair.session.ended
        assert pair.session.delivery is not None
        assert (pair.session.delivery.acked, pair.session.reason) == (200_000, "idle")

    in_loop(scene, 4096)
