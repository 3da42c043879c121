"""Run an echo server on asyncio or uvloop, with one of their three APIs: protocol, sock or streams.

Usage: loops.py PORT (asyncio | uvloop) (protocol | sock | streams) [CERTIFICATE]
"""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import sys
from typing import cast

import uvloop

HOST = "127.0.0.1"
BACKLOG = 4096
SIZE = 65536


class Echo(asyncio.Protocol):
    """Echo. Reading pauses above the high-water mark. At EOF, the transport writes the rest and closes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Echo the data."""
        self.transport.write(data)

    def pause_writing(self) -> None:
        """Stop reading, so that the client's window fills up."""
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """Read again."""
        self.transport.resume_reading()


async def serve_protocol(port: int, context: ssl.SSLContext | None) -> None:
    """Serve with a protocol."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Echo, HOST, port, backlog=BACKLOG, ssl=context)
    await server.serve_forever()


async def serve_streams(port: int, context: ssl.SSLContext | None) -> None:
    """Serve each client with a pair of streams."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(SIZE):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, HOST, port, backlog=BACKLOG, ssl=context)
    await server.serve_forever()


async def serve_sock(port: int, _: ssl.SSLContext | None) -> None:
    """Serve with the socket methods of the loop."""
    loop = asyncio.get_running_loop()

    async def echo(client: socket.socket) -> None:
        with client:
            try:
                while data := await loop.sock_recv(client, SIZE):
                    await loop.sock_sendall(client, data)
            except ConnectionError:
                pass

    tasks = set()
    with socket.create_server((HOST, port), backlog=BACKLOG) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        listener.setblocking(False)
        while True:
            client, _address = await loop.sock_accept(listener)
            task = loop.create_task(echo(client))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


def main() -> None:
    """Serve until a signal arrives."""
    port, loop, way = sys.argv[1:4]
    context = None
    if len(sys.argv) > 4:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(sys.argv[4])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    serve = {"protocol": serve_protocol, "sock": serve_sock, "streams": serve_streams}[way]
    factory = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[loop]
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(int(port), context))


if __name__ == "__main__":
    main()
