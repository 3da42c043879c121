"""The socket between the parent and one worker."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

from echod.workers.messages import HEAD, decode, encode

if TYPE_CHECKING:
    from collections.abc import Sequence

# Descriptors per message: the kernel accepts 253 (SCM_MAX_FD in unix(7)).
_BATCH = 200


def send_descriptors(sock: socket.socket, descriptors: Sequence[int]) -> None:
    """Send descriptors, before the first message. Each batch comes with the number of those that are left.

    Raises:
        OSError: the worker has ended.

    """
    for first in range(0, len(descriptors), _BATCH):
        socket.send_fds(sock, [HEAD.pack(len(descriptors) - first)], list(descriptors[first : first + _BATCH]))


def receive_descriptors(sock: socket.socket) -> list[int]:
    """Wait for the descriptors.

    Raises:
        EOFError: the parent has ended.

    """
    descriptors: list[int] = []
    left = 1
    while left:
        data, batch, _, _ = socket.recv_fds(sock, HEAD.size, _BATCH)
        if not data:
            raise EOFError
        descriptors += batch
        left = HEAD.unpack(data)[0] - len(batch)
    return descriptors


def receive_first(sock: socket.socket) -> object:
    """Wait for the first message, before there is a loop.

    Raises:
        EOFError: the parent has ended.

    """
    return decode(_exactly(sock, HEAD.unpack(_exactly(sock, HEAD.size))[0]))


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not (more := sock.recv(size - len(data))):
            raise EOFError
        data += more
    return bytes(data)


class Channel:
    """Exchange messages in the running loop. Create it with `open`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, sock: socket.socket) -> Channel:
        """Return the channel of a socket, which it owns from now on."""
        return cls(*await asyncio.open_unix_connection(sock=sock))

    def send(self, message: object) -> None:
        """Queue a message. It is lost if the other end has closed the channel."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def receive(self) -> object | None:
        """Return the next message, or None if the other process has ended."""
        try:
            (size,) = HEAD.unpack(await self._reader.readexactly(HEAD.size))
            return decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError):
            return None

    def end(self) -> None:
        """Send the queued messages, and no more. The other process then closes its end.

        Wait for that before `close`. Otherwise an unread message could destroy the last one: at the close, the kernel reports
        ECONNRESET to the other process.
        """
        self._writer.write_eof()

    async def close(self) -> None:
        """Send the queued messages, and close the socket."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
