"""Many clients in one thread, that check every byte of their echo."""

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

# What all clients send, each from a place of its own on, round and round. Its length is no multiple of any buffer's.
PATTERN = os.urandom(1_000_003)
_TWICE = PATTERN * 2
_LARGEST = 65536


class Peer:
    """A client that sends from the pattern, and checks what comes back.

    Args:
        sock: connected.
        total: how many bytes it sends before it half-closes; None: without end.
        rng: for its place in the pattern and the sizes of its writes.

    """

    def __init__(self, sock: socket.socket | TlsSocket, total: int | None, rng: random.Random) -> None:
        sock.setblocking(False)
        self.sock = sock
        name = sock.getsockname()
        self.port = name[1] if name else 0  # a unix socket's client has none
        self.total = total
        self.sent = 0
        self.received = 0
        self.half_close = True
        self.reading = True
        self.wrong = False
        self.end = ""
        """How it ended: "eof" or the error's name."""
        self._rng = rng
        self._place = rng.randrange(len(PATTERN))
        self._size = 0

    @property
    def writing(self) -> bool:
        return not self.end and self.sent != self.total

    def write(self) -> None:
        # A write that did not succeed at once is tried again with the same bytes.
        self._size = self._size or self._rng.randint(1, _LARGEST)
        size = self._size if self.total is None else min(self._size, self.total - self.sent)
        start = (self._place + self.sent) % len(PATTERN)
        try:
            self.sent += self.sock.send(memoryview(_TWICE)[start : start + size])
        except BlockingIOError:
            return
        except OSError as error:
            self._ended(error)
            return
        self._size = 0
        if self.sent == self.total and self.half_close:
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
        start = (self._place + self.received) % len(PATTERN)
        self.wrong = self.wrong or data != _TWICE[start : start + len(data)]
        self.received += len(data)

    def _ended(self, error: OSError | None) -> None:
        self.end = type(error).__name__ if error else "eof"
        self.sock.close()


class Crowd:
    """Some peers, and the loop that serves them."""

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
        """Take in a connected socket."""
        peer = Peer(sock, total, random.Random(seed))
        self.peers.append(peer)
        self._watch(peer)
        return peer

    def run(self, until: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Serve the peers until the condition holds, which is asked after each round of the loop."""
        deadline = time.monotonic() + patience
        while not until():
            assert time.monotonic() < deadline, f"waited in vain: {self}"
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
        """Let peers read no more, or again."""
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
    """True when a peer could not write for a while: the last buffer between it and the daemon fills without an event."""

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
    """Keeps a crowd's peers at a rate of reading, bytes a second each; always true."""

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
