"""One client's life, from accepted to closed."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from echod.connection.proxy_header import HeaderReader
from echod.connection.state import Phase
from echod.connection.tls import TlsEnd, TlsLayer
from echod.net import addresses, kernel, proxy_protocol
from echod.net.addresses import TcpAddress
from echod.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from ipaddress import IPv4Network, IPv6Network

    from echod.connection.echo import EchoSession
    from echod.connection.outcome import Reason
    from echod.net.addresses import UnixAddress


# Seconds that a client's last steps may take after it was told to end: its transport only has to report the end.
LAST_STEPS = 1.0

# Phases that end within the handshake timeout, and the reason if they do not.
_PREAMBLES: Mapping[Phase, Reason] = {Phase.PROXY_HEADER: "proxy_header", Phase.HANDSHAKE: "handshake"}


def watch(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    """Register an accepted socket with asyncio's selector, before it has a transport.

    The transport would register it in a callback of its own, whose failure only the exception handler hears of: the
    client would stay connected and unread. It takes over this registration without a system call. A libuv loop
    registers in C, and is left alone.

    Raises:
        OSError: of epoll_ctl(2): ENOSPC or ENOMEM.

    """
    if isinstance(loop, asyncio.SelectorEventLoop):
        loop.add_reader(sock.fileno(), lambda: None)


def unwatch(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    """Undo `watch`, which is necessary before the socket is closed without a transport."""
    if isinstance(loop, asyncio.SelectorEventLoop) and sock.fileno() >= 0:
        loop.remove_reader(sock.fileno())


class Timeouts(NamedTuple):
    """How long a client may take, each in seconds."""

    idle: float
    """Without a byte either way; 0: for ever."""
    write: float
    """Taking nothing of the echo that holds up its reading."""
    handshake: float
    """For PROXY header and TLS handshake, from its connecting on."""


class AdmissionPolicy(NamedTuple):
    """How a listener lets clients in."""

    proxy_trusted: Sequence[IPv4Network | IPv6Network] | None = None
    """Who may send the PROXY header that every client has to begin with; None: there is none."""
    tls: TlsEnd | None = None
    """None: without TLS."""


class Quota:
    """How many clients there are of each address, and may be.

    The address of a client of IPv6 stands for its network of 64 bits: a single host may take any of that. A link-local
    address stands for itself, with its zone. Clients of a unix socket have no address, and are not counted.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        """0: none."""
        self._clients = Counter[object]()

    def enter(self, client: TcpAddress | UnixAddress | None) -> bool:
        """Count a client in, if there is room for it."""
        key = _network(client)
        if key is None:
            return True
        if self.limit and self._clients[key] >= self.limit:
            return False
        self._clients[key] += 1
        return True

    def leave(self, client: TcpAddress | UnixAddress | None) -> None:
        """Count a client out that was let in."""
        if (key := _network(client)) is not None:
            self._clients[key] -= 1
            if not self._clients[key]:
                del self._clients[key]


def _network(client: TcpAddress | UnixAddress | None) -> object:
    if not isinstance(client, TcpAddress):
        return None
    if ":" not in client.host:
        return client.host
    address = ipaddress.IPv6Address(client.host)
    if address.is_link_local:  # all hosts of an interface share one network of 64 bits
        return str(address)
    # HAProxy names an IPv4 client so that has come to a socket of both families.
    return str(address.ipv4_mapped) if address.ipv4_mapped else int(address) >> 64


class Client:
    """An accepted connection: its session, whence it came, and when it was last seen to move.

    `run` is the body of the client's task. The bytes go past it, through the session; the task only waits for their
    end. That makes the task the one place where a failure of this client comes out.

    Args:
        sock: accepted, non-blocking.
        sockaddr: what accept(2) gave with it.
        opened: the loop's time.
        now: the time by the clock of the timeouts.
        new_session: makes the session.

    """

    __slots__ = ("_address", "_bytes_seen", "_entered", "_left", "_since", "header", "opened", "peer", "session")

    def __init__(
        self,
        sock: socket.socket,
        sockaddr: Any,
        opened: float,
        now: float,
        new_session: Callable[[Client, socket.socket], EchoSession],
    ) -> None:
        self._address = addresses.from_sockaddr(sockaddr)
        self.peer = printable(str(self._address)) if self._address is not None else _nameless(sock, sockaddr)
        self.opened = opened
        self.header: proxy_protocol.Header | None = None
        self._entered = False
        self._since = now
        self._bytes_seen = 0
        self._left = 0
        self.session = new_session(self, sock)

    @property
    def proxied_client(self) -> TcpAddress | UnixAddress | None:
        """The client that the PROXY header names, if there is a header and it does."""
        return self.header.source if self.header is not None else None

    async def run(self, admission: AdmissionPolicy, quota: Quota) -> None:
        """Serve the client until its connection is closed. Cancelling it resets the client.

        Raises:
            Exception: whatever failed in the session, save what the network did.

        """
        if admission.proxy_trusted is not None:
            if not self._is_trusted(admission.proxy_trusted):
                self._refuse("proxy_header", "the sender is not in proxy_trusted")
                return
        elif not self._enter(quota):
            self._refuse("client_limit", "")
            return
        try:
            try:
                await self._join(admission, quota)
            except asyncio.CancelledError:
                # The loop has closed the transport that it had made. uvloop does not report that.
                self.session.reject("aborted")
            try:
                await self.session.ended
            except asyncio.CancelledError:
                await self._reset()
        finally:
            if self._entered:
                quota.leave(self._counted)

    def _refuse(self, reason: Reason, detail: str) -> None:
        unwatch(asyncio.get_running_loop(), self.session.sock)
        self.session.reject(reason, detail)

    async def _reset(self) -> None:
        """Reset the client, and report its end even if the transport does not."""
        session = self.session
        if session.delivery is None:
            # The task is cancelled, and with it the future that it was waiting for.
            session.renew_ended()
            session.abort("aborted")
            await asyncio.wait([session.ended], timeout=LAST_STEPS)
            if not session.ended.done():
                session.abandon()
            await session.ended

    @property
    def _counted(self) -> TcpAddress | UnixAddress | None:
        """Whom the quota counts."""
        return self.proxied_client or self._address

    def _enter(self, quota: Quota) -> bool:
        self._entered = quota.enter(self._counted)
        return self._entered

    def _identify(self, quota: Quota, header: proxy_protocol.Header) -> bool:
        """Take the PROXY header; end the session, and say so, if there are enough clients of that address."""
        self.header = header
        if not self._enter(quota):
            self.session.reject("client_limit")
        return self._entered

    async def _join(self, admission: AdmissionPolicy, quota: Quota) -> None:
        """Join the socket to the session, with what comes in between."""
        session = self.session
        following: EchoSession | TlsLayer = session
        loop = asyncio.get_running_loop()
        try:
            if admission.tls is not None:
                following = TlsLayer(session, admission.tls)
            front: EchoSession | TlsLayer | HeaderReader = following
            if admission.proxy_trusted is not None:
                front = HeaderReader(session, following, partial(self._identify, quota))
            await loop.connect_accepted_socket(lambda: front, session.sock)
        except Exception as error:  # noqa: BLE001  (the session reports it; a reset is one that arrived too early)
            unwatch(loop, session.sock)
            session.connection_lost(error)
            session.sock.close()
        else:
            if front is session:
                session.attempt(session.begin)

    def _is_trusted(self, networks: Sequence[IPv4Network | IPv6Network]) -> bool:
        # Who may connect to a unix socket is for its file's permissions to say.
        if not isinstance(self._address, TcpAddress):
            return True
        return addresses.is_within(self._address.host, networks)

    def describe(self) -> dict[str, object]:
        """Return what the server sees of this connection, ready for JSON."""
        session = self.session
        local = addresses.from_sockaddr(session.sock.getsockname())
        seen: dict[str, object] = {"local": str(local) if local is not None else None, "peer": self.peer}
        if session.sock.family == socket.AF_UNIX and (credentials := kernel.peer_credentials(session.sock)):
            seen["credentials"] = dict(zip(("pid", "uid", "gid"), credentials, strict=True))
        seen["proxy"] = proxy_protocol.describe(self.header) if self.header is not None else None
        seen["tls"] = session.tls._asdict() if session.tls is not None else None
        seen["tcp_info"] = kernel.tcp_members(session.sock)
        return seen

    def overdue(self, now: float, timeouts: Timeouts) -> Reason | None:
        """Tell why this client has to be closed at the time `now`, if it has to.

        To be asked once each sweep, which is what the timeouts are exact to. What has moved is derived from counters
        here, so that a message costs nothing for it.

        Args:
            now: the time by the clock of the timeouts.
            timeouts: those in force.

        """
        session = self.session
        if (preamble := _PREAMBLES.get(session.phase)) is not None:
            expired = now - self._since >= timeouts.handshake
            return preamble if expired and not session.unread() else None
        if session.bytes_seen != self._bytes_seen:
            self._bytes_seen = session.bytes_seen
            self._since = now
            self._left = 0
            return None
        silent = now - self._since
        if session.paused:
            reason: Reason = "stalled"
            late = silent >= timeouts.write
        elif session.phase <= Phase.OPEN and timeouts.idle and silent >= timeouts.idle:
            reason = "idle"
            late = True
        else:
            return None
        # Linux reports a socket as writable in large steps, so the write buffer alone would call a slow reader
        # stalled. The first look at what is left only takes the measure.
        left = session.undelivered()
        if reason == "idle" and session.unread():
            return None  # this process was silent, not the client
        fell = left < self._left
        unknown = left and not self._left
        self._left = left
        if fell:
            self._since = now
        return reason if late and not fell and not unknown else None


def _nameless(sock: socket.socket, sockaddr: object) -> str:
    """Return what can be said of a peer without an address."""
    if sock.family == socket.AF_UNIX and (credentials := kernel.peer_credentials(sock)):
        pid, uid, _ = credentials
        return f"unix:pid={pid},uid={uid}"
    return str(sockaddr)
