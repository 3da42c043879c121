"""Test the linger after our FIN."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from echod.clock import Clock
from echod.connection.linger import Linger
from echod.connection.state import Phase
from echod.net import kernel
from harness import reset

if TYPE_CHECKING:
    import pytest

    from pairs import InLoop, Pair

ECHO = 200_000


class Lab:
    """Provide a connection with unread echo, and a linger with a clock that the test controls."""

    def __init__(self, pair: Pair) -> None:
        self.now = 100.0
        self.session = pair.session
        self.client = pair.client
        assert self.session.transport is not None
        self.transport = self.session.transport
        self.session.data_received(bytes(ECHO))
        self.transport.pause_reading()
        pair.sock.shutdown(socket.SHUT_WR)
        self.linger = Linger(self.session, self.transport, Clock(lambda: self.now))
        self.linger._timer.cancel()

    def poll(self, seconds: float) -> bool:
        """Poll after this many seconds; return whether the linger has closed the connection."""
        self.now += seconds
        self.linger._poll()
        self.linger._timer.cancel()  # the test polls instead
        return self.transport.is_closing()


def test_timeout_without_progress(in_loop: InLoop) -> None:
    """Close a client that takes nothing for `linger_timeout`, here one second."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        lab = Lab(pair)
        assert [lab.poll(0.25) for _ in range(4)] == [False, False, False, True]
        await pair.session.ended
        assert pair.session.delivery is not None
        assert pair.session.delivery.acked < ECHO

    in_loop(scene, 4096)


def test_progress_renews_the_timeout(in_loop: InLoop) -> None:
    """Restart `linger_timeout` when a client takes some of its echo."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        lab = Lab(pair)
        assert [lab.poll(0.25) for _ in range(3)] == [False] * 3
        before = kernel.unacknowledged(pair.sock)
        await asyncio.to_thread(pair.client.recv, ECHO // 2, socket.MSG_WAITALL)
        while kernel.unacknowledged(pair.sock) >= before:  # noqa: ASYNC110  (no event reports it)
            await asyncio.sleep(0)
        assert [lab.poll(0.25) for _ in range(5)] == [False, False, False, False, True]
        await pair.session.ended
        assert pair.session.delivery is not None
        assert pair.session.delivery.acked < ECHO

    in_loop(scene, 4096)


def test_reset_while_lingering(in_loop: InLoop) -> None:
    """Notice the client's reset after its EOF, when no transport watches the socket."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.session.data_received(bytes(ECHO))
        pair.client.shutdown(socket.SHUT_WR)
        while pair.session.phase is not Phase.LINGERING:  # noqa: ASYNC110  (no event reports it)
            await asyncio.sleep(0)
        assert not pair.session.ended.done()
        reset(pair.client)
        await pair.session.ended
        assert pair.session.reason == "reset"
        assert pair.session.delivery is not None
        assert pair.session.delivery.acked < ECHO

    in_loop(scene, 4096)


def read_to_the_end(client: socket.socket) -> bytes:
    """Read until EOF."""
    data = b""
    while more := client.recv(1 << 20):
        data += more
    return data


def test_late_acknowledgement(in_loop: InLoop) -> None:
    """Deliver all echo after the client's EOF, even if it reads late."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        await asyncio.to_thread(pair.client.sendall, bytes(300_000))
        pair.client.shutdown(socket.SHUT_WR)
        while not pair.session.eof:  # noqa: ASYNC110  (no event reports it)
            await asyncio.sleep(0)
        assert not pair.session.ended.done()

        assert len(await asyncio.to_thread(read_to_the_end, pair.client)) == 300_000
        await pair.session.ended
        assert pair.session.delivery is not None
        assert pair.session.delivery.acked == 300_000

    in_loop(scene, 4096)


def test_last_acknowledgement_during_a_poll(in_loop: InLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the reason `eof` if the last acknowledgement arrives during a poll."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.session.data_received(bytes(200_000))
        pair.client.shutdown(socket.SHUT_WR)
        while not pair.session.eof:  # noqa: ASYNC110  (no event reports it)
            await asyncio.sleep(0)
        unacknowledged = kernel.unacknowledged
        looks = []

        def look(sock: socket.socket) -> int:
            looks.append(sock)
            left = unacknowledged(sock)
            if len(looks) == 2:  # during a poll of the linger, the client takes everything and closes
                read_to_the_end(pair.client)
                pair.client.close()
            return left

        monkeypatch.setattr(kernel, "unacknowledged", look)
        await pair.session.ended
        assert len(looks) > 2
        assert pair.session.reason == "eof"

    in_loop(scene, 4096)


def test_client_closes_before_it_has_read(in_loop: InLoop) -> None:
    """Wait for a client that sends FIN after ours and then reads its echo."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.session.data_received(bytes(200_000))
        pair.session.close("idle")
        pair.client.shutdown(socket.SHUT_WR)
        while not pair.session.eof:  # noqa: ASYNC110  (no event reports it)
            await asyncio.sleep(0)
        assert not pair.session.ended.done()
        assert len(await asyncio.to_thread(read_to_the_end, pair.client)) == 200_000
        await pair.session.ended
        assert pair.session.delivery is not None
        assert (pair.session.delivery.acked, pair.session.reason) == (200_000, "idle")

    in_loop(scene, 4096)
