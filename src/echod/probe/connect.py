"""A client's connection: where it goes, from where, with what before its first byte, over TLS or not."""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from echod.net import resolver
from echod.net.addresses import TcpAddress, UnixAddress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from echod.probe.tls import Secure, Tls


_RETRY = 0.01

# RFC 8305, section 5, "Connection Attempt Delay", seconds: the next address is tried after it.
_ATTEMPT_DELAY = 0.25


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

    def endpoints(self, timeout: float, stopped: Callable[[], bool] = lambda: False) -> list[Endpoint]:
        """Return the addresses of the target, best first and of both families in turn.

        Args:
            timeout: seconds.
            stopped: called while a name is resolved; True ends the wait.

        Raises:
            OSError: the name cannot be resolved in time.
            InterruptedError: `stopped` returned True.

        """
        if isinstance(self.target, UnixAddress):
            return [Endpoint(socket.AF_UNIX, self.target.sockaddr)]
        # Without a host: the loopback addresses of both families, whatever this machine's files say of localhost.
        found = resolver.resolve(
            self.target.host, self.target.port, family=self.family, timeout=timeout, stopped=stopped
        )
        return _interleave(dict.fromkeys(Endpoint(family, sockaddr) for family, _, _, _, sockaddr in found))

    def connect(self, endpoints: Sequence[Endpoint], deadline: float) -> Connected:
        """Connect to the endpoint that answers first, and do the TLS handshake.

        Args:
            endpoints: at least one; a later one is tried when the one before has failed, or has not answered for 250 ms.
            deadline: of all of it, on the clock of `time.perf_counter`.

        Raises:
            OSError: no endpoint could be connected to (it is the error of the last that failed), or TLS failed.

        """
        began = time.perf_counter()
        if isinstance(self.target, UnixAddress):
            sock = _connect_unix(self.target, deadline)
        else:
            sock = _race(self._begin, endpoints, deadline)
        try:
            limit_time(sock, deadline)
            if self.header is not None:
                host, port = sock.getpeername()[:2]
                sock.sendall(self.header(TcpAddress(host.partition("%")[0], port)))
            secure = self.tls.handshake(sock, deadline) if self.tls is not None else None
        except BaseException:
            sock.close()
            raise
        return Connected(sock, secure or sock, secure, time.perf_counter() - began)

    def _begin(self, endpoint: Endpoint) -> socket.socket:
        """Return a TCP socket that has begun to connect."""
        with contextlib.ExitStack() as opened:
            sock = opened.enter_context(socket.socket(endpoint.family, socket.SOCK_STREAM))
            sock.settimeout(0)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.source is not None:
                numeric = socket.AI_NUMERICHOST  # no name server is asked, whatever zone the address has
                sock.bind(socket.getaddrinfo(self.source, 0, endpoint.family, flags=numeric)[0][4])
            with contextlib.suppress(BlockingIOError):  # EINPROGRESS
                sock.connect(endpoint.sockaddr)
            opened.pop_all()
            return sock


def _interleave(endpoints: Iterable[Endpoint]) -> list[Endpoint]:
    """Take one endpoint of each family in turn, beginning with the family of the first (RFC 8305, section 4)."""
    families: dict[int, list[Endpoint]] = {}
    for endpoint in endpoints:
        families.setdefault(endpoint.family, []).append(endpoint)
    rounds = itertools.zip_longest(*families.values())
    return [endpoint for one in rounds for endpoint in one if endpoint is not None]


def _race(begin: Callable[[Endpoint], socket.socket], endpoints: Sequence[Endpoint], deadline: float) -> socket.socket:
    """Connect to several endpoints with overlapping attempts, and keep the first connection (RFC 8305, section 5)."""
    waiting = collections.deque(endpoints)
    begun: dict[int, socket.socket] = {}
    failures: list[OSError] = []
    poll = select.poll()  # select(2) fails for descriptors above 1,023
    port = endpoints[0].sockaddr[1]
    due = 0.0
    try:
        while waiting or begun:
            now = time.perf_counter()
            if now >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, "timed out")
            if waiting and now >= due:
                try:
                    sock = begin(waiting.popleft())
                except OSError as error:
                    failures.append(error)
                    continue
                begun[sock.fileno()] = sock
                poll.register(sock, select.POLLOUT)
                due = now + _ATTEMPT_DELAY
            wake = min(due, deadline) if waiting else deadline
            for descriptor, _ in poll.poll((wake - now) * 1000):
                poll.unregister(descriptor)
                sock = begun.pop(descriptor)
                try:
                    _confirm(sock, port)
                except OSError as error:
                    sock.close()
                    failures.append(error)
                    due = now
                else:
                    return sock
        raise failures[-1]
    finally:
        for sock in begun.values():
            sock.close()


def _confirm(sock: socket.socket, port: int) -> None:
    """Raise the error of a finished connection attempt, if it has failed.

    A socket whose local port is the target's connects to itself (simultaneous open, RFC 9293, section 3.5). The kernel
    may choose that port if no server listens on it and it is in the range of ephemeral ports.
    """
    if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(number, os.strerror(number))
    if sock.getsockname()[1] == port and sock.getsockname() == sock.getpeername():
        from echod.net import kernel  # noqa: PLC0415  (rarely needed)

        kernel.reset_on_close(sock)  # TIME_WAIT would keep the port from a server that starts now
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def _connect_unix(target: UnixAddress, deadline: float) -> socket.socket:
    with contextlib.ExitStack() as opened:
        sock = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        while True:
            limit_time(sock, deadline)
            try:
                sock.connect(target.sockaddr)
            except BlockingIOError:  # a full backlog, for which connect(2) does not wait as it does for TCP
                time.sleep(_RETRY)
            else:
                opened.pop_all()
                return sock


def limit_time(sock: socket.socket, deadline: float) -> None:
    """Let the socket's next call time out at the deadline, on the clock of `time.perf_counter`.

    Raises:
        TimeoutError: that has passed.

    """
    if (left := deadline - time.perf_counter()) <= 0:
        raise TimeoutError(errno.ETIMEDOUT, "timed out")
    sock.settimeout(left)


def wait_readable(sock: socket.socket, deadline: float) -> None:
    """Wait until a socket can be read, or the deadline passes.

    Raises:
        TimeoutError: it has passed.

    """
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if not poll.poll(max(0.0, deadline - time.perf_counter()) * 1000):
        raise TimeoutError(errno.ETIMEDOUT, "timed out")


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
