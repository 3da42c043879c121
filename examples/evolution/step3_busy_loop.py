"""Step 3: non-blocking sockets, polled all the time.

A non-blocking `accept` or `recv` that would have to wait fails with `BlockingIOError` instead. A bare `accept` would end
this server before its first client. The server suppresses the error and tries again, so no client waits for another.

The flaw: it polls all the time, so it uses a whole core even when it is idle; `top` shows it. It also suppresses errors
of `sendall`. If a client does not read, the rest of its echo is lost silently.
"""

from __future__ import annotations

import socket
import sys
from contextlib import suppress


def main(port: int) -> None:
    """Poll the listening socket and all clients forever."""
    clients: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.setblocking(False)
        print("listening on {}:{}".format(*listener.getsockname()), flush=True)
        while True:
            with suppress(BlockingIOError):
                newcomer, _ = listener.accept()
                newcomer.setblocking(False)
                clients.append(newcomer)
            for client in clients.copy():
                with suppress(BlockingIOError):
                    data = client.recv(65536)
                    if data:
                        client.sendall(data)
                    else:
                        clients.remove(client)
                        client.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
