"""Step 5: asyncio, a listener task and a task for each client.

The loop sleeps in `select` as step 4 did, and each client reads like step 1 again: state is local variables, and an
error is one client's.

The flaw: nobody awaits the clients' tasks, so nobody hears of their errors. Connect with telnet, and send `boom`:

    step5_tasks.py 8000         "Task exception was never retrieved" is all that asyncio says of a task that is forgotten:
                                not whose it was. When the socket is closed is up to the garbage collector
    step5_tasks.py 8000 keep    a list keeps the tasks: nothing is said at all, and the client hangs, connected

A stop is no better: a signal ends everything where it stands.
"""

from __future__ import annotations

import asyncio
import socket
import sys


def answer(message: bytes) -> bytes:
    """Return the echo, or fail on `boom`."""
    if message == b"boom\r\n":
        error = "boom"
        raise RuntimeError(error)
    return message


async def echo(client: socket.socket) -> None:
    """Serve one client to its end."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(client, 65536):
        await loop.sock_sendall(client, answer(data))
    client.close()


async def listen(listener: socket.socket, *, keep: bool) -> None:
    """Make a task for each client, and keep it or forget it."""
    kept: list[asyncio.Task[None]] = []
    while True:
        client, _ = await asyncio.get_running_loop().sock_accept(listener)
        task = asyncio.create_task(echo(client))
        if keep:
            kept.append(task)
        del task  # or else this name would keep the last one


async def main(port: int, *, keep: bool) -> None:
    """Run the listener task."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.setblocking(False)
        print("listening on {}:{}".format(*listener.getsockname()), flush=True)
        await asyncio.create_task(listen(listener, keep=keep))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000, keep="keep" in sys.argv[2:]))
