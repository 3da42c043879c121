"""The sweep, with a clock that the test sets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from echod.connection.state import Phase
from echod.server.timeouts import Sweep
from echod.settings.model import LimitsSettings

if TYPE_CHECKING:
    from pairs import InLoop, Pair

LIMITS = LimitsSettings(idle_timeout=10, write_timeout=20, handshake_timeout=5)


class Time:
    """The time in seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_idle_client(in_loop: InLoop) -> None:
    """A client is closed after `idle_timeout` without a byte, not before. A byte starts the time again."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        clock = Time()
        sweep = Sweep([pair.life()], LIMITS, clock)
        pair.client.sendall(b"x")
        assert await asyncio.to_thread(pair.client.recv, 1) == b"x"
        reasons = []
        for clock.now in (9, 18.9, 19):
            sweep.sweep()
            reasons.append(pair.session.reason)
        assert reasons == [None, None, "idle"]
        pair.client.close()
        await pair.session.ended

    in_loop(scene)


def test_stalled_client(in_loop: InLoop) -> None:
    """A client that takes no echo for `write_timeout` is reset, even without an `idle_timeout`."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        while not pair.session.paused:
            pair.session.data_received(bytes(100_000))
        clock = Time()
        sweep = Sweep([pair.life()], LIMITS, clock)
        sweep.reconfigure(LIMITS.model_copy(update={"idle_timeout": 0}))
        reasons = []
        # The first sweep sees the bytes received. The next records how many are undelivered.
        for clock.now in (1, 2, 20.9, 21):
            sweep.sweep()
            reasons.append(pair.session.reason)
        assert reasons == [None, None, None, "stalled"]
        await pair.session.ended

    in_loop(scene, 4096)


@pytest.mark.parametrize("phase", [Phase.PROXY_HEADER, Phase.HANDSHAKE])
def test_slow_preamble(in_loop: InLoop, phase: Phase) -> None:
    """A client with an incomplete preamble is closed after `handshake_timeout`, even without an `idle_timeout`."""

    async def scene(pair: Pair) -> None:
        await pair.connect()
        pair.session.expect(phase)
        clock = Time()
        sweep = Sweep([pair.life()], LIMITS.model_copy(update={"idle_timeout": 0}), clock)
        reasons = []
        for clock.now in (0, 4.9, 5):
            sweep.sweep()
            reasons.append(pair.session.reason)
        assert reasons == [None, None, phase.name.lower()]
        pair.client.close()
        await pair.session.ended

    in_loop(scene)
