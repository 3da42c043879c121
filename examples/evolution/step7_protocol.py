"""Step 7: a protocol echoes the data, and the client's task only waits for the end.

    step7_protocol.py [PORT [SECONDS]]

Data wakes no task, and each error is logged with its client. docs/explanation/evolution.md lists the gaps that echod fills.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from contextlib import suppress

log = logging.getLogger("step7")


def answer(message: bytes) -> bytes:
    """Return the echo, or raise an error for `boom`."""
    if message == b"boom\r\n":
        raise RuntimeError(message)
    return message


class Client(asyncio.Protocol):
    """The connection of one client. The transport calls each method except `finish`."""

    failure: Exception | None = None
    finishing = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport, self.ended = transport, asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        if not self.finishing:  # later data is discarded: closing a socket with unread input resets the connection
            try:
                self.transport.write(answer(data))
            except Exception as error:  # noqa: BLE001  (the client's task logs it)
                self.failure = error
                self.finish()

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def finish(self) -> None:
        """Send the rest of the echo and FIN, and give the client a second to send its FIN."""
        self.finishing = True
        self.transport.resume_reading()
        with suppress(OSError):  # the client has reset the connection
            self.transport.write_eof()
        asyncio.get_running_loop().call_later(1, self.transport.abort)

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(self.failure or error)


async def serve(sock: socket.socket, peer: tuple[str, int], deadline: asyncio.Future[None]) -> None:
    """Wait for the end of a client. At the deadline, end it."""
    _, client = await asyncio.get_running_loop().connect_accepted_socket(Client, sock)
    await asyncio.wait([client.ended, deadline], return_when=asyncio.FIRST_COMPLETED)
    client.finish()
    if error := await client.ended:
        log.error("client %s:%d failed", *peer, exc_info=error)


async def main(port: int = 8000, grace: int = 7) -> None:
    """Accept until a signal arrives, and then drain."""
    loop, stop, tasks = asyncio.get_running_loop(), asyncio.Event(), set[asyncio.Task[None]]()
    deadline: asyncio.Future[None] = loop.create_future()

    def accept() -> None:
        with suppress(BlockingIOError):
            while connection := listener.accept():
                task = asyncio.create_task(serve(*connection, deadline))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.setblocking(False)
        loop.add_reader(listener, accept)
        print("listening on {}:{}".format(*listener.getsockname()), flush=True)
        await stop.wait()
        loop.remove_reader(listener)
        accept()  # in the same step as the close, which resets the connections in the backlog
    log.info("draining %d clients", len(tasks))
    loop.call_later(grace, deadline.set_result, None)
    await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main(*map(int, sys.argv[1:])))
