"""Run a server inside another program, with a client in the same loop.

The program prints the echo, the ledger entry of the connection, and the receipt of the stop.

Run it: python examples/embedded.py
"""

from __future__ import annotations

import asyncio

import echod


async def greet(port: int) -> bytes:
    """Connect as a client, send a complete line and an incomplete one, and return the echo."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello, echo\r\nunfinished")
    writer.write_eof()
    echo = await reader.read()
    writer.close()
    await writer.wait_closed()
    return echo


async def main() -> None:
    """Serve one client, and print the results."""
    closed: asyncio.Queue[echod.Entry] = asyncio.Queue()
    async with echod.Server.listen(
        "127.0.0.1:0",
        mode="line",
        limits={"max_line": "1KiB", "idle_timeout": 60},
        observe=closed.put_nowait,
    ) as server:
        print(await greet(server.port))
        entry = await closed.get()
        print(f"{entry.received} bytes received, {entry.acked} acknowledged, end: {entry.reason}")
        receipt = await server.shutdown()
    print(f"{receipt.clients} clients were left, {receipt.unsent_bytes} bytes unsent")


if __name__ == "__main__":
    asyncio.run(main())
