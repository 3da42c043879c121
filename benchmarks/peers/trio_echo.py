"""Run an echo server on Trio with one task per client.

Usage: trio_echo.py PORT
"""

from __future__ import annotations

import contextlib
import resource
import sys

import trio

SIZE = 65536


async def echo(stream: trio.SocketStream) -> None:
    """Echo until EOF. Trio sets TCP_NODELAY and closes the connection."""
    with contextlib.suppress(trio.BrokenResourceError):
        while data := await stream.receive_some(SIZE):
            await stream.send_all(data)


def main() -> None:
    """Serve until a signal arrives."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    async def serve() -> None:
        await trio.serve_tcp(echo, int(sys.argv[1]), host="127.0.0.1", backlog=4096)

    trio.run(serve)


if __name__ == "__main__":
    main()
