"""Test the phases of a connection, and the states on the status page."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from echod.admin.snapshot import Count
from echod.connection.state import Phase
from echod.server.ledger import Counters

if TYPE_CHECKING:
    from pairs import InLoop, Pair


def test_phases(in_loop: InLoop) -> None:
    """Follow the connection from phase to phase, and show its state on the status page."""

    async def scene(pair: Pair) -> None:
        session = pair.session
        phases = [session.phase]
        await pair.connect()
        phases.append(session.phase)
        for phase in (Phase.PROXY_HEADER, Phase.HANDSHAKE):
            session.expect(phase)
            phases.append(session.phase)
        session.begin()
        phases.append(session.phase)
        session.data_received(bytes(200_000))
        while not session.paused:
            session.data_received(bytes(100_000))
        states = [shown(pair)]
        session.close("cut")
        phases.append(session.phase)
        session.expect(Phase.HANDSHAKE)  # an ending session ignores it
        states.append(shown(pair))
        while session.phase is Phase.FLUSHING:
            await asyncio.to_thread(pair.client.recv, 1 << 20)
        phases.append(session.phase)
        pair.client.close()
        await session.ended
        assert [*phases, session.phase] == [
            Phase.CONNECTING,
            Phase.OPEN,
            Phase.PROXY_HEADER,
            Phase.HANDSHAKE,
            *(Phase.OPEN, Phase.FLUSHING, Phase.LINGERING, Phase.CLOSED),
        ]
        assert states == [{"paused": 1}, {"closing": 1}]

    in_loop(scene, 4096)


def shown(pair: Pair) -> dict[str, int]:
    """Return the state that the status page shows."""
    count = Count(Counters(), 0, 0)
    count.add([pair.life()])
    return dict(count.states)
