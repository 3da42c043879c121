"""Run many clients in one thread, and check every byte of their echo."""

from __future__ import annotations

import contextlib
import os
import random
import selectors
import socket
import time
from typing import TYPE_CHECKING, Self

from harness import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from certificates import TlsSocket

# All clients send this pattern cyclically, each from its own offset. Its length is not a multiple of any buffer size.
PATTERN = os.urandom(1_000_003)
_TWICE = PATTERN * 2
_LARGEST = 65536


class Peer:
    """A client that sends the pattern and checks its echo.

    Args:
        sock: a connected socket.
        total: the number of bytes to send before a half-close, or None to send without end.
        rng: chooses the offset in the pattern and the sizes of writes.

    """

    def __init__(self, sock: socket.socket | TlsSocket, total: int | None, rng: random.Random) -> None:
        sock.setblocking(False)
        self.sock = sock
        name = sock.getsockname()
        self.port = name[1] if name else 0  # the client of a unix socket has none
        self.total = total
        self.sent = 0
        self.received = 0
        self.half_close = True
        self.reading = True
        self.wrong = False
        self.end = ""
        """Why the connection ended: "eof", the name of an exception, or "" if it has not ended."""
        self._rng = rng
        self._offset = rng.randrange(len(PATTERN))
        self._size = 0

    @property
    def writing(self) -> bool:
        return not self.end and self.sent != self.total

    def write(self) -> None:
        # OpenSSL requires that a write is retried with the same bytes.
        self._size = self._size or self._rng.randint(1, _LARGEST)
        size = self._size if self.total is None else min(self._size, self.total - self.sent)
        start = (self._offset + self.sent) % len(PATTERN)
        try:
            self.sent += self.sock.send(memoryview(_TWICE)[start : start + size])
        except BlockingIOError:
            return
        except OSError as error:
            self._ended(error)
            return
        self._size = 0
        if self.sent == self.total and self.half_close:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._ended(error)

    def stop(self) -> None:
        """Half-close after the write in progress. OpenSSL may have sent some of its records."""
        self.total = self.sent + self._size
        if not self._size:
            self.sock.shutdown(socket.SHUT_WR)

    def read(self) -> None:
        try:
            data = self.sock.recv(_LARGEST)
        except BlockingIOError:
            return
        except OSError as error:
            self._ended(error)
            return
        if not data:
            self._ended(None)
            return
        start = (self._offset + self.received) % len(PATTERN)
        self.wrong = self.wrong or data != _TWICE[start : start + len(data)]
        self.received += len(data)

    def _ended(self, error: OSError | None) -> None:
        self.end = type(error).__name__ if error else "eof"
        self.sock.close()


class Crowd:
    """A group of peers, and the loop that serves them."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.close()
        for peer in self.peers:
            peer.sock.close()

    def add(self, sock: socket.socket | TlsSocket, total: int | None, seed: int) -> Peer:
        """Add a peer with a connected socket."""
        peer = Peer(sock, total, random.Random(seed))
        self.peers.append(peer)
        self._watch(peer)
        return peer

    def run(self, until: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Serve the peers until the condition holds. It is checked after each iteration of the loop."""
        deadline = time.monotonic() + patience
        while not until():
            assert time.monotonic() < deadline, f"the condition did not become true within {patience} s"
            for key, events in self._selector.select(0.05):
                peer: Peer = key.data
                if events & selectors.EVENT_READ:
                    peer.read()
                if events & selectors.EVENT_WRITE and peer.writing:
                    peer.write()
                if events & selectors.EVENT_WRITE or peer.end:
                    self._watch(peer)

    def finish(self, patience: float = PATIENCE) -> None:
        """Serve the peers until all have ended."""
        self.run(lambda: all(peer.end for peer in self.peers), patience)

    def pause_reading(self, *peers: Peer, reading: bool = False) -> None:
        """Stop or resume the reading of peers."""
        for peer in peers:
            peer.reading = reading
            self._watch(peer)

    def _watch(self, peer: Peer) -> None:
        events = (selectors.EVENT_READ if peer.reading else 0) | (selectors.EVENT_WRITE if peer.writing else 0)
        with contextlib.suppress(KeyError, ValueError):
            if not peer.end and self._selector.get_key(peer.sock).events == events:
                return
            self._selector.unregister(peer.sock)
        if events and not peer.end:
            self._selector.register(peer.sock, events, peer)


class Stuck:
    """A condition: a peer has not been able to write for a while, because all buffers up to the daemon are full."""

    def __init__(self, peer: Peer, seconds: float = 0.5) -> None:
        self._peer = peer
        self._seconds = seconds
        self._sent = -1
        self._since = 0.0

    def __call__(self) -> bool:
        if self._peer.sent != self._sent:
            self._sent, self._since = self._peer.sent, time.monotonic()
        return time.monotonic() - self._since > self._seconds


class Pace:
    """Limits how fast each peer of a crowd reads, in bytes per second, when called as a condition. Always true."""

    def __init__(self, crowd: Crowd, rate: float) -> None:
        self._crowd = crowd
        self._rate = rate
        self._began = time.monotonic()

    def __call__(self) -> bool:
        budget = self._rate * (time.monotonic() - self._began)
        for peer in self._crowd.peers:
            if not peer.end:
                self._crowd.pause_reading(peer, reading=peer.received < budget)
        return True
