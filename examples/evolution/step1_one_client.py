"""Step 1: a blocking server for one client.

It accepts once, reads two bytes at a time until CR LF, and sends the line back. No server is simpler. Reading two bytes
at a time costs a system call for every two bytes.

The flaw: the kernel connects a second client, but the server never serves it. Start the server with a port, and then

    telnet 127.0.0.1 8000       type a line: the echo comes back
    telnet 127.0.0.1 8000       in another terminal: no echo, and a reset when the first client leaves
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
    """Serve one client, and exit."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        print("listening on {}:{}".format(*listener.getsockname()), flush=True)
        client, _ = listener.accept()
        with client:
            while (line := read_line(client)).endswith(b"\r\n"):
                client.sendall(line)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
