"""Run correct and faulty echo servers in threads, to test clients."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Self

from harness import PATIENCE, reset

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    Handler = Callable[[socket.socket], None]


class Peer:
    """A server that handles each connection in a thread.

    Args:
        handler: handles a connection. It may block until the server is closed.
        sock: a listening socket, or None to listen on a free port of 127.0.0.1.
        tls: the context for a TLS handshake before the handler is called, or None.

    """

    def __init__(self, handler: Handler, sock: socket.socket | None = None, tls: ssl.SSLContext | None = None) -> None:
        self._handler = handler
        self._tls = tls
        self._listening = sock or socket.create_server(("127.0.0.1", 0))
        name = self._listening.getsockname()
        self.target = f"unix:{name}"
        """The server's address as an argument of `echod probe`."""
        if isinstance(name, tuple):
            self.target = f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.peers: list[str] = []
        """The addresses of the clients, in the order of their connections."""
        self.errors: list[str] = []
        """The TLS errors, as OpenSSL reports them."""
        self._thread = threading.Thread(target=self._accept)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sock in (self._listening, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that blocks on it
        for thread in (self._thread, *self._threads):
            thread.join(PATIENCE)
            assert not thread.is_alive()
        for sock in (self._listening, *self._open):
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, peer = self._listening.accept()
                self.peers.append(peer[0] if peer else "")
                self._open.append(sock)
                thread = threading.Thread(target=self._serve, args=(sock,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):  # the client has disconnected, or the test is over
            if self._tls is None:
                self._handler(sock)
                return
            try:
                with self._tls.wrap_socket(sock.dup(), server_side=True) as secure:
                    self._handler(secure)
            except ssl.SSLError as error:
                self.errors.append(error.reason or str(error))
                sock.shutdown(socket.SHUT_WR)
                silent(sock)  # closing with unread bytes would send a reset, and the alert would be lost


def echo(sock: socket.socket) -> None:
    """Echo until EOF. Over TLS, send close_notify."""
    while data := sock.recv(65536):
        sock.sendall(data)
    if isinstance(sock, ssl.SSLSocket):
        sock.unwrap()


def change(offset: int, *, to: int | None = None) -> Handler:
    """Return a handler that echoes, but changes the byte at an offset."""

    def handler(sock: socket.socket) -> None:
        place = 0
        while data := bytearray(sock.recv(65536)):
            if place <= offset < place + len(data):
                data[offset - place] = data[offset - place] ^ 1 if to is None else to
            place += len(data)
            sock.sendall(data)

    return handler


def messages(size: int, act: Callable[[socket.socket, int, bytes], None]) -> Handler:
    """Return a handler that calls `act` with the socket, the number and the bytes of each message."""

    def handler(sock: socket.socket) -> None:
        number = 0
        while message := sock.recv(size, socket.MSG_WAITALL):
            act(sock, number, message)
            number += 1

    return handler


def silent(sock: socket.socket) -> None:
    """Read until EOF without sending anything."""
    while sock.recv(65536):
        pass


def closing(_: socket.socket) -> None:
    """Close the connection at once."""


def ending(after: int) -> Handler:
    """Return a handler that echoes `after` bytes, and then half-closes."""

    def handler(sock: socket.socket) -> None:
        left = after
        while left and (data := sock.recv(left)):
            sock.sendall(data)
            left -= len(data)
        sock.shutdown(socket.SHUT_WR)
        silent(sock)  # closing with unread bytes would send a reset

    return handler


def resetting(after: int) -> Handler:
    """Return a handler that echoes `after` bytes, and then resets the connection."""

    def handler(sock: socket.socket) -> None:
        left = after
        while left and (data := sock.recv(left)):
            sock.sendall(data)
            left -= len(data)
        sock.recv(1)
        reset(sock)

    return handler


def each(*handlers: Handler) -> Handler:
    """Return a handler that passes each connection to the next handler. The last one gets all remaining connections."""
    left = list(handlers)
    lock = threading.Lock()

    def handler(sock: socket.socket) -> None:
        with lock:
            chosen = left.pop(0) if len(left) > 1 else left[0]
        chosen(sock)

    return handler
