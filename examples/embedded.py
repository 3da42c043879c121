"""A server inside another program: a client in the same loop, the ledger's entry of it, and the receipt.

Run it: python examples/embedded.py
"""

from __future__ import annotations

import asyncio

import echod


async def greet(host: str, port: int) -> bytes:
    """Be the client: send a line and a half, and return the echo of both."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"hello, echo\r\nunfinished")
    writer.write_eof()
    echo = await reader.read()
    writer.close()
    await writer.wait_closed()
    return echo


async def main() -> None:
    """Serve, be the client, and tell what happened."""
    closed: asyncio.Queue[echod.Entry] = asyncio.Queue()
    async with echod.Server.listen(
        "127.0.0.1:0",
        mode="line",
        limits={"max_line": "1KiB", "idle_timeout": 60},
        observe=closed.put_nowait,
    ) as server:
        match server.addresses:
            case [echod.TcpAddress(host, port)]:
                print(await greet(host, port))
        entry = await closed.get()
        print(f"{entry.received} bytes received, {entry.acked} acknowledged, end: {entry.reason}")
        receipt = await server.shutdown()
    print(f"{receipt.clients} clients were left, {receipt.unsent_bytes} bytes unsent")


if __name__ == "__main__":
    asyncio.run(main())
