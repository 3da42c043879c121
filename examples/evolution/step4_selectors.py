"""Step 4: non-blocking sockets, and the kernel reports which of them are ready.

`select` sleeps until a socket has a connection or data. No client waits for another, and an idle server uses almost no
CPU.

The flaw: all clients share one loop, so the error of one client affects all. A client that resets ends the server. So does
a client that does not read until its buffer is full. The loop also has no place for state per client.
"""

from __future__ import annotations

import selectors
import socket
import sys


def main(port: int) -> None:
    """Serve the sockets that are ready."""
    with socket.create_server(("127.0.0.1", port)) as listener, selectors.DefaultSelector() as selector:
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)
        print("listening on {}:{}".format(*listener.getsockname()), flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    newcomer, _ = listener.accept()
                    newcomer.setblocking(False)
                    selector.register(newcomer, selectors.EVENT_READ, data=newcomer)
                    continue
                client: socket.socket = key.data
                data = client.recv(65536)
                if data:
                    client.sendall(data)
                else:
                    selector.unregister(client)
                    client.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
