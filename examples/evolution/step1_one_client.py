"""Step 1: a blocking server for one client.

It accepts once, reads two bytes at a time until CR LF, and sends the line back. There is no simpler server, and reading
so little at a time costs a system call for every two bytes.

The flaw: whoever comes second is connected, by the kernel, and never served. Start it with a port, and then

    telnet 127.0.0.1 8000       type a line: it comes back
    telnet 127.0.0.1 8000       in another terminal: nothing comes back, and when the first one leaves, this one is reset
"""

from __future__ import annotations

import socket
import sys


def read_line(client: socket.socket) -> bytes:
    """Return the next line with its CR LF; what comes without one is the client's last."""
    line = b""
    while not line.endswith(b"\r\n"):
        piece = client.recv(2)
        if not piece:
            break
        line += piece
    return line


def main(port: int) -> None:
    """Serve one client, and end."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        print("listening on {}:{}".format(*listener.getsockname()), flush=True)
        client, _ = listener.accept()
        with client:
            while (line := read_line(client)).endswith(b"\r\n"):
                client.sendall(line)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
