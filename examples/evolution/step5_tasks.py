"""Step 5: asyncio, with a listener task and a task per client.

The loop sleeps in `select`, as in step 4. Each client is served by sequential code again, as in step 1. Its state is in
local variables, and its error does not affect other clients.

The flaw: the server never awaits the clients' tasks, so it never handles their errors. Connect with telnet, and send
`boom`:

    step5_tasks.py 8000         asyncio reports "Task exception was never retrieved", but not for which client. The
                                garbage collector decides when the socket is closed
    step5_tasks.py 8000 keep    a list keeps the tasks: the error is never reported, and the client hangs

A signal ends the server and all connections at once, in the middle of any transfer.
"""

from __future__ import annotations

import asyncio
import socket
import sys


def answer(message: bytes) -> bytes:
    """Return the echo, or raise an error for `boom`."""
    if message == b"boom\r\n":
        error = "boom"
        raise RuntimeError(error)
    return message


async def echo(client: socket.socket) -> None:
    """Serve one client until EOF."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(client, 65536):
        await loop.sock_sendall(client, answer(data))
    client.close()


async def listen(listener: socket.socket, *, keep: bool) -> None:
    """Create a task for each client, with or without keeping a reference."""
    kept: list[asyncio.Task[None]] = []
    while True:
        client, _ = await asyncio.get_running_loop().sock_accept(listener)
        task = asyncio.create_task(echo(client))
        if keep:
            kept.append(task)
        del task  # this name would keep a reference to the last task


async def main(port: int, *, keep: bool) -> None:
    """Run the listener task."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.setblocking(False)
        print("listening on {}:{}".format(*listener.getsockname()), flush=True)
        await asyncio.create_task(listen(listener, keep=keep))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000, keep="keep" in sys.argv[2:]))
