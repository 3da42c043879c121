"""Connect to an echo server: name resolution, Happy Eyeballs, the PROXY header and the TLS handshake."""

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
from echod.net.addresses import TcpAddress, UdpAddress, UnixAddress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from echod.probe.timing import Deadline
    from echod.probe.tls import ClientTls, TlsChannel

# Seconds between attempts on a unix socket with a full backlog.
_RETRY = 0.01

# Seconds before the next address is tried: the "Connection Attempt Delay" of RFC 8305, section 5.
ATTEMPT_DELAY = 0.25

# The DSCP are the upper six bits of the former TOS and traffic class (RFC 2474, section 3).
_DSCP_SHIFT = 2


class Channel(Protocol):
    """The methods that a socket and a `TlsChannel` share. A call that would block raises BlockingIOError."""

    def recv(self, size: int, /) -> bytes:
        """Return some bytes, or none at EOF."""

    def send(self, data: bytes | memoryview, /) -> int:
        """Accept some of the bytes and return their number."""

    def shutdown(self, how: int, /) -> None:
        """Send EOF if `how` is SHUT_WR. Data can still be received."""

    def close(self) -> None:
        """Close the connection."""


class Endpoint(NamedTuple):
    """An address as connect(2) takes it."""

    family: int
    sockaddr: Any


class Connected(NamedTuple):
    """An established connection."""

    socket: socket.socket
    channel: Channel
    tls: TlsChannel | None
    seconds: float
    """Duration of the connection attempt and of the TLS handshake."""


class Route(NamedTuple):
    """The way to the server: where to, where from, and with which preamble and TLS."""

    target: TcpAddress | UnixAddress | UdpAddress
    source: str | None = None
    """The local IP address."""
    dscp: int | None = None
    """The code point of the IP packets, or None for that of the system."""
    ttl: int | None = None
    """The TTL or hop limit of the IP packets, or None for that of the system."""
    header: Callable[[TcpAddress], bytes] | None = None
    """Returns the PROXY header for a connection to the given address."""
    family: int = socket.AF_UNSPEC
    tls: ClientTls | None = None

    def endpoints(self, timeout: float, stopped: Callable[[], bool] = lambda: False) -> list[Endpoint]:
        """Return the addresses of the target, best first, with the families alternating.

        Args:
            timeout: seconds to resolve the name.
            stopped: called while a name is resolved. If it returns True, the wait ends.

        Raises:
            OSError: the name cannot be resolved in time.
            InterruptedError: `stopped` returned True.

        """
        if isinstance(self.target, UnixAddress):
            return [Endpoint(socket.AF_UNIX, self.target.sockaddr)]
        # An empty host gives the loopback addresses of both families, regardless of localhost in /etc/hosts.
        found = resolver.resolve(
            self.target.host, self.target.port, family=self.family, timeout=timeout, stopped=stopped
        )
        return _interleave(dict.fromkeys(Endpoint(family, sockaddr) for family, _, _, _, sockaddr in found))

    def connect(self, endpoints: Sequence[Endpoint], deadline: Deadline) -> Connected:
        """Connect to the endpoint that answers first, and do the TLS handshake.

        Args:
            endpoints: at least one. The next one is tried when one fails or does not answer within 250 ms.
            deadline: for the connection and the handshake together.

        Raises:
            OSError: TLS failed, or no endpoint accepted the connection. The error is that of the last endpoint.

        """
        began = deadline.clock()
        if isinstance(self.target, UnixAddress):
            sock = _connect_unix(self.target, deadline)
        else:
            sock = race(self._begin, endpoints, deadline, select.poll())  # select(2) fails for descriptors above 1,023
        try:
            deadline.limit(sock)
            if self.header is not None:
                host, port = sock.getpeername()[:2]
                sock.sendall(self.header(TcpAddress(host.partition("%")[0], port)))
            secure = self.tls.handshake(sock, deadline, self.advice) if self.tls is not None else None
        except BaseException:
            sock.close()
            raise
        return Connected(sock, secure or sock, secure, deadline.clock() - began)

    def prepare(self, sock: socket.socket) -> None:
        """Set the source address, the DSCP and the TTL of an IP socket.

        Raises:
            OSError: the system refuses one of them.

        """
        v6 = sock.family == socket.AF_INET6
        level = socket.IPPROTO_IPV6 if v6 else socket.IPPROTO_IP
        if self.dscp is not None:
            sock.setsockopt(level, socket.IPV6_TCLASS if v6 else socket.IP_TOS, self.dscp << _DSCP_SHIFT)
        if self.ttl is not None:
            sock.setsockopt(level, socket.IPV6_UNICAST_HOPS if v6 else socket.IP_TTL, self.ttl)
        if self.source is not None:
            numeric = socket.AI_NUMERICHOST  # no name server is asked, even for an address with a zone
            sock.bind(socket.getaddrinfo(self.source, 0, sock.family, flags=numeric)[0][4])

    @property
    def advice(self) -> str:
        """Advice on a server that ended the connection, or was silent in the handshake, without an answer."""
        tls = "if the server does not use TLS, remove --tls" if self.tls else "if the server uses TLS, add --tls"
        if isinstance(self.target, UnixAddress):
            return tls
        if self.header is None:
            return f"{tls}; if it expects a PROXY header, add --proxy-v2 SRC:PORT"
        return f"{tls}; if it expects no PROXY header, remove the --proxy option"

    def _begin(self, endpoint: Endpoint) -> socket.socket:
        """Start to connect, and return the TCP socket."""
        with contextlib.ExitStack() as opened:
            sock = opened.enter_context(socket.socket(endpoint.family, socket.SOCK_STREAM))
            sock.settimeout(0)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.prepare(sock)
            with contextlib.suppress(BlockingIOError):  # EINPROGRESS
                sock.connect(endpoint.sockaddr)
            opened.pop_all()
            return sock


def _interleave(endpoints: Iterable[Endpoint]) -> list[Endpoint]:
    """Alternate between the families, starting with that of the first endpoint (RFC 8305, section 4)."""
    families: dict[int, list[Endpoint]] = {}
    for endpoint in endpoints:
        families.setdefault(endpoint.family, []).append(endpoint)
    rounds = itertools.zip_longest(*families.values())
    return [endpoint for group in rounds for endpoint in group if endpoint is not None]


def race(
    begin: Callable[[Endpoint], socket.socket], endpoints: Sequence[Endpoint], deadline: Deadline, poll: select.poll
) -> socket.socket:
    """Connect to several endpoints with overlapping attempts, and keep the first connection (RFC 8305, section 5).

    Args:
        begin: starts an attempt and returns its socket.
        endpoints: at least one.
        deadline: for all attempts together.
        poll: waits for the sockets.

    Raises:
        OSError: all attempts failed. The error is that of the last one to fail.

    """
    waiting = collections.deque(endpoints)
    begun: dict[int, socket.socket] = {}
    failures: list[OSError] = []
    port = endpoints[0].sockaddr[1]
    due = 0.0
    try:
        while waiting or begun:
            left = deadline.left()
            now = deadline.clock()
            if waiting and now >= due:
                try:
                    sock = begin(waiting.popleft())
                except OSError as error:
                    failures.append(error)
                    continue
                begun[sock.fileno()] = sock
                poll.register(sock, select.POLLOUT)
                due = now + ATTEMPT_DELAY
            wait = min(due - now, left) if waiting else left
            for descriptor, _ in poll.poll(wait * 1000):
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
    """Raise the error of a finished connection attempt if it failed.

    A socket connects to itself if its local port is that of the target (simultaneous open, RFC 9293, section 3.5).
    The kernel may choose that port if no server listens on it and it is in the range of ephemeral ports.
    """
    if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(number, os.strerror(number))
    if sock.getsockname()[1] == port and sock.getsockname() == sock.getpeername():
        from echod.net import kernel  # noqa: PLC0415  (rarely needed)

        kernel.reset_on_close(sock)  # TIME_WAIT would keep the port from a server that starts now
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def _connect_unix(target: UnixAddress, deadline: Deadline) -> socket.socket:
    with contextlib.ExitStack() as opened:
        sock = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        while True:
            deadline.limit(sock)
            try:
                sock.connect(target.sockaddr)
            except BlockingIOError:  # the backlog is full: unlike for TCP, connect(2) does not wait
                time.sleep(_RETRY)
            else:
                opened.pop_all()
                return sock
