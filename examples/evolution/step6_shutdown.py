"""Step 6: each client's task logs its error and closes its socket, and a signal gives the clients two seconds.

    step6_shutdown.py [PORT [SECONDS]]

Two flaws show only when the server stops:

- The listener task still accepts, but the drain knows only the clients that were connected at its beginning. Send SIGTERM,
  and connect within the two seconds. You are served, and then cut off without two seconds of your own.
- The drain expects only timeouts. The first task with another error ends it, so all other clients lose their two seconds.
  The errors of later tasks are never retrieved. Such an error is easy to cause: `shutdown` fails on a connection that the
  client has reset. The server notices that only during the drain.

The list of tasks also grows forever. As in step 5, each message wakes a task.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from contextlib import suppress

log = logging.getLogger("step6")


def answer(message: bytes) -> bytes:
    """Return the echo, or raise an error for `boom`."""
    if message == b"boom\r\n":
        error = "boom"
        raise RuntimeError(error)
    return message


async def echo(client: socket.socket) -> None:
    """Serve one client until EOF, log its error, and close the socket."""
    loop = asyncio.get_running_loop()
    with client:
        try:
            while data := await loop.sock_recv(client, 65536):
                await loop.sock_sendall(client, answer(data))
        except Exception:
            log.exception("a client failed")
        client.shutdown(socket.SHUT_RDWR)


async def listen(listener: socket.socket, tasks: list[asyncio.Task[None]]) -> None:
    """Create a task for each client."""
    while True:
        client, _ = await asyncio.get_running_loop().sock_accept(listener)
        tasks.append(asyncio.create_task(echo(client)))


async def drain(tasks: list[asyncio.Task[None]], grace: float) -> None:
    """Give the clients some seconds, and cut off the remaining ones."""
    deadline = asyncio.get_running_loop().time() + grace
    for task in tasks:
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await task


async def main(port: int, grace: float) -> None:
    """Run the listener task until a signal arrives, and then drain."""
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
        await drain(tasks.copy(), grace)
        listening.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    grace = float(sys.argv[2]) if len(sys.argv) > 2 else 2
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000, grace))
