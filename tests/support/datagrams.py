"""Run scripted UDP servers in threads, to test clients."""

from __future__ import annotations

import select
import socket
import threading
from typing import TYPE_CHECKING, Self

from harness import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    Script = Callable[[int, bytes], Iterable[bytes]]


class UdpPeer:
    """A UDP server that sends datagrams to the client as its script says.

    Args:
        script: returns the datagrams to send, given the number of a received datagram and its bytes.
        host: an IP address to bind.
        port: its port, or 0 for a free one.

    """

    def __init__(self, script: Script, host: str = "127.0.0.1", port: int = 0) -> None:
        self._script = script
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((host, port))
        self.port = self.socket.getsockname()[1]
        self.target = f"udp:[{host}]:{self.port}" if ":" in host else f"udp:{host}:{self.port}"
        """The server's address as an argument of `echod probe`."""
        self.clients: list[str] = []
        """The address of the client, for each datagram."""
        self._news = threading.Condition()
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.close()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self.close()

    def close(self) -> None:
        """Close the sockets. A script may close `socket` alone earlier."""
        for sock in (self._stop, self._stopped, self.socket):
            sock.close()

    def wait(self, datagrams: int) -> None:
        """Wait until a number of datagrams has been received."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.clients) >= datagrams, PATIENCE)

    def _serve(self) -> None:
        while self._stopped not in select.select([self.socket, self._stopped], [], [])[0]:
            datagram, client = self.socket.recvfrom(65536)
            with self._news:
                self.clients.append(client[0])
                self._news.notify_all()
            for answer in self._script(len(self.clients) - 1, datagram):
                self.socket.sendto(answer, client)
            if self.socket.fileno() < 0:  # the script has closed it
                return


def twins(v4: Script, v6: Script) -> tuple[UdpPeer, UdpPeer]:
    """Return two servers with one port number on the loopback addresses of both families."""
    while True:
        first = UdpPeer(v4)
        try:
            return first, UdpPeer(v6, "::1", first.port)
        except OSError:  # another process has the port
            first.close()


def echo(_: int, datagram: bytes) -> list[bytes]:
    """Echo each datagram."""
    return [datagram]


def silent(_: int, __: bytes) -> list[bytes]:
    """Send nothing."""
    return []


def changing(offset: int) -> Script:
    """Return a script that echoes, but changes the byte at an offset."""
    return lambda _, datagram: [datagram[:offset] + bytes([datagram[offset] ^ 1]) + datagram[offset + 1 :]]
