"""The session that a client of some listener gets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from echod.connection.echo import EchoSession, SessionSettings
from echod.connection.faults import Fault, FaultLineSession, FaultSession
from echod.connection.modes import InfoSession, LineSession

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from echod.server.settings import ServerSettings


def session_settings(settings: ServerSettings) -> SessionSettings:
    """Return what a session takes of the settings."""
    limits = settings.limits
    return SessionSettings(limits.write_buffer, settings.shutdown.linger_timeout, limits.max_line)


def new_session(
    sock: socket.socket, settings: ServerSettings, number: int, describe: Callable[[], dict[str, object]]
) -> EchoSession:
    """Return the session that the listener's mode and fault ask for.

    Args:
        sock: accepted, non-blocking.
        settings: of the server.
        number: of the connection on its listener. With the seed of a fault, it makes a run repeatable.
        describe: describes the connection, for mode info.

    """
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    options, listener = session_settings(settings), settings.listener
    if listener.mode == "info":
        return InfoSession(sock, options, ended, describe)
    if settings.fault is not None:
        kind = FaultLineSession if listener.mode == "line" else FaultSession
        return kind(sock, options, ended, Fault.derive(listener.fault, settings.fault), number)
    return (LineSession if listener.mode == "line" else EchoSession)(sock, options, ended)
