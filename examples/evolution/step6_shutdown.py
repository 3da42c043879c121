"""Step 6: errors are logged and sockets closed in the client's task, and a signal gives clients two seconds.

Two flaws show only at a stop:

- The listener task goes on accepting, and the drain knows only the clients it began with. Send SIGTERM, connect within
  the two seconds, and you are served, and then cut off without a grace of your own.
- The drain expects timeouts only. The first task with another error ends it: all other clients lose their two seconds,
  and the errors of the tasks after it are at best "never retrieved" once more. Such an error is at hand: `shutdown`
  fails on a connection that the client has reset, and until the drain nobody hears of it.

And the list of tasks only ever grows. The way on from here is echod itself: docs/evolution.md.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from contextlib import suppress

GRACE = 2
log = logging.getLogger("step6")


def answer(message: bytes) -> bytes:
    """Return the echo, or fail on `boom`."""
    if message == b"boom\r\n":
        error = "boom"
        raise RuntimeError(error)
    return message


async def echo(client: socket.socket) -> None:
    """Serve one client to its end, log its error, and close."""
    loop = asyncio.get_running_loop()
    with client:
        try:
            while data := await loop.sock_recv(client, 65536):
                await loop.sock_sendall(client, answer(data))
        except Exception:
            log.exception("a client failed")
        client.shutdown(socket.SHUT_RDWR)


async def listen(listener: socket.socket, tasks: list[asyncio.Task[None]]) -> None:
    """Make a task for each client."""
    while True:
        client, _ = await asyncio.get_running_loop().sock_accept(listener)
        tasks.append(asyncio.create_task(echo(client)))


async def drain(tasks: list[asyncio.Task[None]]) -> None:
    """Give the clients two seconds, and cut off who is left."""
    deadline = asyncio.get_running_loop().time() + GRACE
    for task in tasks:
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await task


async def main(port: int) -> None:
    """Run the listener task until a signal comes, then drain."""
    tasks: list[asyncio.Task[None]] = []
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.setblocking(False)
        listening = asyncio.create_task(listen(listener, tasks))
        print("listening on {}:{}".format(*listener.getsockname()), flush=True)
        await stop.wait()
        log.info("draining %d tasks", len(tasks))
        await drain(tasks.copy())
        listening.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000))
