"""Step 2: a blocking server for several clients, in a loop.

After each `accept`, it visits all clients and reads one line from each.

The flaw: every call blocks, and meanwhile the server serves no other client. A silent client blocks all others. After the
echo of its line, a client waits until another client connects. A client that resets ends the server.

    telnet 127.0.0.1 8000       type nothing yet
    telnet 127.0.0.1 8000       in another terminal: type a line; the echo comes only when the first client leaves
"""

from __future__ import annotations

import socket
import sys


def read_line(client: socket.socket) -> bytes:
    """Return the next line with its CR LF. At EOF, return the incomplete rest."""
    line = b""
    while not line.endswith(b"\r\n"):
        piece = client.recv(2)
        if not piece:
            break
        line += piece
    return line


def main(port: int) -> None:
    """Serve the clients in turn."""
    clients: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", port)) as listener:
        print("listening on {}:{}".format(*listener.getsockname()), flush=True)
        while True:
            newcomer, _ = listener.accept()
            clients.append(newcomer)
            for client in clients.copy():
                line = read_line(client)
                if line.endswith(b"\r\n"):
                    client.sendall(line)
                else:
                    clients.remove(client)
                    client.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
