"""Step 3: non-blocking sockets, asked again and again.

A non-blocking `accept` or `recv` that would have to wait fails with `BlockingIOError` instead. A bare `accept` would
end this server before its first client could come; suppressed and tried again, the error lets nobody wait for another.

The flaw: it asks all the time, so it burns a whole core, most of all while nothing happens: look at `top`. And the
errors it suppresses include those of sending: to a client that does not read, the rest of the echo is lost in silence.
"""

from __future__ import annotations

import socket
import sys
from contextlib import suppress


def main(port: int) -> None:
    """Ask for new clients, and all clients for bytes, for ever."""
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
