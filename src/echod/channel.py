"""A client's connection: where it goes, from where, with what before its first byte, over TLS or not."""

from __future__ import annotations

import errno
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from echod.addresses import TcpAddress, UnixAddress

if TYPE_CHECKING:
    from collections.abc import Callable

    from echod.secure import Secure, Tls


_RETRY = 0.01


class TlsError(OSError):
    """TLS has failed; the message says how."""


class Channel(Protocol):
    """What a connected socket and TLS over one have in common: errors are OSErrors, BlockingIOError is "not now"."""

    def recv(self, size: int, /) -> bytes:
        """Return some bytes, none at EOF."""

    def send(self, data: bytes | memoryview, /) -> int:
        """Take some of the bytes, and tell how many."""

    def shutdown(self, how: int, /) -> None:
        """With SHUT_WR: let the peer read EOF, and go on receiving."""

    def close(self) -> None:
        """Let go of it."""


class Endpoint(NamedTuple):
    """What connect(2) takes."""

    family: int
    sockaddr: Any


class Connected(NamedTuple):
    """A connection that may carry messages."""

    socket: socket.socket
    channel: Channel
    tls: Secure | None
    seconds: float
    """Of connecting and of the TLS handshake."""


class Route(NamedTuple):
    """All that there is to say about how to connect."""

    target: TcpAddress | UnixAddress
    source: str | None = None
    """The local IP address."""
    header: Callable[[TcpAddress], bytes] | None = None
    """From the peer's address to a PROXY header."""
    family: int = socket.AF_UNSPEC
    tls: Tls | None = None

    def endpoints(self) -> list[Endpoint]:
        """Return where the target may be reached; all addresses of a host, best first.

        Raises:
            OSError: the name cannot be resolved.

        """
        if isinstance(self.target, UnixAddress):
            return [Endpoint(socket.AF_UNIX, self.target.sockaddr)]
        # Without a host: the loopback addresses of both families, whatever this machine's files say of localhost.
        found = socket.getaddrinfo(self.target.host or None, self.target.port, self.family, socket.SOCK_STREAM)
        return list(dict.fromkeys(Endpoint(family, sockaddr) for family, _, _, _, sockaddr in found))

    def connect(self, endpoints: list[Endpoint], timeout: float) -> Connected:
        """Connect to the first endpoint that answers.

        Args:
            endpoints: at least one.
            timeout: for each of them, seconds.

        Raises:
            OSError: of the last one.

        """
        *others, last = endpoints
        for endpoint in others:
            try:
                return self._connect(endpoint, timeout)
            except OSError:
                continue
        return self._connect(last, timeout)

    def _connect(self, endpoint: Endpoint, timeout: float) -> Connected:
        began = time.perf_counter()
        sock = socket.socket(endpoint.family, socket.SOCK_STREAM)
        try:
            if endpoint.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.source is not None:
                sock.bind(socket.getaddrinfo(self.source, 0, endpoint.family, socket.SOCK_STREAM)[0][4])
            _reach(sock, endpoint, began + timeout)
            if self.header is not None:
                host, port = sock.getpeername()[:2]
                sock.sendall(self.header(TcpAddress(host.partition("%")[0], port)))
            secure = None
            if self.tls is not None:
                limit_time(sock, began + timeout)
                secure = self.tls.handshake(sock)
        except BaseException:
            sock.close()
            raise
        return Connected(sock, secure or sock, secure, time.perf_counter() - began)


def _reach(sock: socket.socket, endpoint: Endpoint, deadline: float) -> None:
    while True:
        limit_time(sock, deadline)
        try:
            sock.connect(endpoint.sockaddr)
        except BlockingIOError:  # a unix socket's full backlog, for which connect(2) does not wait as it does for TCP
            time.sleep(_RETRY)
        else:
            return


def limit_time(sock: socket.socket, deadline: float) -> None:
    """Let the socket's next call time out at the deadline, on the clock of `time.perf_counter`.

    Raises:
        TimeoutError: that has passed.

    """
    if (left := deadline - time.perf_counter()) <= 0:
        raise TimeoutError(errno.ETIMEDOUT, "timed out")
    sock.settimeout(left)


def kind(error: OSError) -> str:
    """Return a word for an error, by which errors are counted."""
    match error:
        case TlsError():
            return "tls"
        case TimeoutError():
            return "timeout"
        case ConnectionRefusedError():
            return "refused"
        case ConnectionResetError() | BrokenPipeError():
            return "reset"
        case socket.gaierror():
            return "name"
        case _:
            return errno.errorcode.get(error.errno or 0, "other").lower()


def reason(error: OSError) -> str:
    """Return an error's text for people."""
    match error:
        case TlsError():
            return str(error)
        case TimeoutError():
            return "timed out"
        case socket.gaierror():
            return f"the name cannot be resolved ({error.strerror})"
        case _:
            return error.strerror or str(error)
