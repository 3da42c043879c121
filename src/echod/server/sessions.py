"""The session that a client of some listener gets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from echod.connection.echo import EchoSession
from echod.connection.faults.profile import FaultProfile
from echod.connection.faults.session import FaultSession
from echod.connection.info import InfoSession
from echod.connection.line import LineSession

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from echod.server.settings import ServerSettings


def new_session(
    sock: socket.socket, settings: ServerSettings, number: int, describe: Callable[[], dict[str, object]]
) -> EchoSession:
    """Return the session that the listener's mode and fault ask for.

    Args:
        sock: accepted.
        settings: of the server.
        number: of the connection on its listener. With the seed of a fault, it makes a run repeatable.
        describe: describes the connection, for mode info.

    """
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    listener, limits, shutdown = settings.listener, settings.limits, settings.shutdown
    if listener.mode == "info":
        return InfoSession(sock, limits, shutdown, ended, describe)
    if settings.fault is not None:
        profile = FaultProfile(listener.fault, settings.fault)
        return FaultSession(sock, limits, shutdown, ended, profile, listener.mode, number)
    return (LineSession if listener.mode == "line" else EchoSession)(sock, limits, shutdown, ended)
