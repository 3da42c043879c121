"""Run an echo server on gevent with one greenlet per client.

Usage: gevent_echo.py PORT
"""

from __future__ import annotations

import contextlib
import resource
import sys

from gevent import socket
from gevent.server import StreamServer

SIZE = 65536


def echo(client: socket.socket, _: tuple[str, int]) -> None:
    """Echo until EOF. gevent closes the connection afterwards."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(ConnectionError):
        while data := client.recv(SIZE):
            client.sendall(data)


def main() -> None:
    """Serve until a signal arrives."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    StreamServer(("127.0.0.1", int(sys.argv[1])), echo, backlog=4096).serve_forever()


if __name__ == "__main__":
    main()
