"""A session by itself, in a loop, with a blocking socket as its client."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, Protocol

from echod.connection.echo import EchoSession
from echod.loops import loop_factory
from echod.server.client import Client
from echod.settings.model import LimitsSettings, ShutdownSettings
from harness import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Scene = Callable[["Pair"], Awaitable[None]]

    class InLoop(Protocol):
        """The fixture `in_loop`."""

        def __call__(self, scene: Scene, receive_buffer: int | None = None) -> None: ...


LIMITS = LimitsSettings(write_buffer=290_000)
SHUTDOWN = ShutdownSettings(linger_timeout=1.0)


class Pair:
    """A session on one end of a TCP connection, and a blocking socket on the other.

    Args:
        receive_buffer: of the client, bytes. It is set before the client connects, as a larger window is never taken back.

    """

    def __init__(self, receive_buffer: int | None) -> None:
        self.client = socket.socket()
        self.client.settimeout(PATIENCE)
        if receive_buffer is not None:
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.client.connect(listening.getsockname())
            self.sock, _ = listening.accept()
        self.sock.setblocking(False)
        self.session: EchoSession
        self.renew()

    def renew(self) -> None:
        """Make a session of the socket."""
        self.session = EchoSession(self.sock, LIMITS, SHUTDOWN, asyncio.get_running_loop().create_future())

    def break_off(self, error: OSError) -> None:
        """Have the transport fail as if a system call of its had failed."""
        transport: Any = self.session.transport
        transport._force_close(error)

    def life(self) -> Client:
        return Client(self.sock, ("127.0.0.1", 1), 0, lambda _, __: self.session)

    async def connect(self) -> None:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: self.session, self.sock)


def runner(loop_name: str) -> InLoop:
    """Return a function that runs a scene in that loop, with no exception left to its handler."""

    def run(scene: Scene, receive_buffer: int | None = None) -> None:
        async def main() -> None:
            errors: list[dict[str, Any]] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
            pair = Pair(receive_buffer)
            try:
                await asyncio.wait_for(scene(pair), PATIENCE)
            finally:
                pair.client.close()
            assert errors == []

        with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
            runner.run(main())

    return run
