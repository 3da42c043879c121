"""The drain by itself, with one client."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING

import pytest

from echod.server.drain import Drain
from echod.settings.model import LimitsSettings, ShutdownSettings
from harness import PATIENCE

if TYPE_CHECKING:
    from pairs import InLoop, Pair

PATIENT = ShutdownSettings(quiet_period=PATIENCE, drain_timeout=PATIENCE, linger_timeout=PATIENCE)
HASTY = PATIENT.model_copy(update={"drain_timeout": 0})


async def iterate() -> None:
    """Let the loop run until every task waits."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_unread_input_is_not_silence(in_loop: InLoop) -> None:
    """Neither the sweep nor a drain closes a client as silent if a message of it is still unread."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        client = pair.life()
        drain = Drain([client], lambda: True)
        drain.close_quiet(0, quiet_period=1)
        pair.client.sendall(b"x")
        limits = LimitsSettings(idle_timeout=1)
        assert client.overdue(5, limits) is None
        drain.close_quiet(5, quiet_period=1)
        before = pair.session.reason
        assert await asyncio.to_thread(pair.client.recv, 1) == b"x"
        assert client.overdue(6, limits) is None
        assert client.overdue(8, limits) == "idle"
        for now in (6, 6.5, 8):
            drain.close_quiet(now, quiet_period=1)
        assert (before, pair.session.reason) == (None, "quiet")
        pair.client.shutdown(socket.SHUT_WR)
        await pair.session.ended

    in_loop(scene)


def test_quiet_period(in_loop: InLoop) -> None:
    """A client is closed after `quiet_period` of silence, not before. A byte starts the period again."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        drain = Drain([pair.life()], lambda: True)
        reasons = []
        for now in (0, 0.9):
            drain.close_quiet(now, quiet_period=1)
        pair.client.sendall(b"x")
        assert await asyncio.to_thread(pair.client.recv, 1) == b"x"
        for now in (1.0, 1.9, 2.0):
            drain.close_quiet(now, quiet_period=1)
            reasons.append(pair.session.reason)
        assert reasons == [None, None, "quiet"]
        pair.client.close()
        await pair.session.ended

    in_loop(scene)


def test_undelivered_echo_is_not_silence(in_loop: InLoop) -> None:
    """A client that has not acknowledged all its echo is not quiet, however long it is silent."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.session.data_received(bytes(200_000))
        assert not pair.session.paused
        drain = Drain([pair.life()], lambda: True)
        for now in range(10):
            drain.close_quiet(now, quiet_period=1)
        assert pair.session.reason is None
        pair.session.abort("aborted")
        await pair.session.ended

    in_loop(scene, 4096)


def test_departures_wake_the_drain(in_loop: InLoop) -> None:
    """A departure wakes the drain if it freed a descriptor for the backlog, or if the last client has left."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        answers = [False, False, True]
        clients = [pair.life()]
        times: list[float] = []

        def source() -> float:
            times.append(time.monotonic())
            return times[-1]

        drain = Drain(clients, lambda: answers.pop(0), source)
        task = asyncio.create_task(drain.run(PATIENT))
        await iterate()
        assert answers == [True]
        drain.client_left()
        await iterate()
        assert answers == []
        checks = len(times)
        drain.client_left()
        await iterate()
        assert len(times) == checks
        clients.clear()
        drain.client_left()
        assert await task

    in_loop(scene)


def test_backlog_that_is_never_emptied(in_loop: InLoop) -> None:
    """After the cut, a drain ends when the last client has left, and reports the rest of the backlog."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        clients = [pair.life()]
        drain = Drain(clients, lambda: False)
        task = asyncio.create_task(drain.run(HASTY))
        await iterate()
        assert pair.session.reason == "cut"
        clients.clear()
        drain.client_left()
        assert not await task
        pair.client.shutdown(socket.SHUT_WR)
        await pair.session.ended

    in_loop(scene)


@pytest.mark.parametrize("when", ["before", "in the delay", "while it waits", "after the cut"])
def test_abort(in_loop: InLoop, when: str) -> None:
    """A drain can be aborted at any moment: it resets every client and ends."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        drain = Drain([pair.life()], lambda: True)

        async def stop() -> bool:
            await drain.delay(PATIENCE if when == "in the delay" else 0)
            return await drain.run(HASTY if when == "after the cut" else PATIENT)

        if when == "before":
            drain.abort()
        task = asyncio.create_task(stop())
        await iterate()
        drain.abort()
        assert await task == (when in {"while it waits", "after the cut"})
        assert pair.session.reason == "aborted"
        await pair.session.ended

    in_loop(scene)


def test_end_of_a_quiet_client(in_loop: InLoop) -> None:
    """A quiet client that does not close is closed at the end of the drain."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        drain = Drain([pair.life()], lambda: True)
        await drain.run(ShutdownSettings(quiet_period=0.01, drain_timeout=0.3, linger_timeout=0.05))
        await pair.session.ended
        assert pair.session.reason == "quiet"

    in_loop(scene)
