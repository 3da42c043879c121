"""A client, from the accept to the close."""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

from echod.connection.proxy_header import HeaderReader
from echod.connection.state import Phase
from echod.connection.tls import TlsLayer
from echod.net import addresses, kernel, proxy_protocol
from echod.net.addresses import TcpAddress
from echod.server.listener_task import unwatch
from echod.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from echod.connection.echo import EchoSession
    from echod.connection.outcome import Reason
    from echod.net.addresses import UnixAddress
    from echod.server.quota import Quota
    from echod.server.settings import ServerSettings
    from echod.server.shared_quota import SharedQuota
    from echod.settings.model import LimitsSettings


# Seconds for the last steps of a client that is closed or reset: its transport only has to report the end.
LAST_STEPS = 1.0

# Phases that end within the handshake timeout, and the reason if they do not.
_PREAMBLES: Mapping[Phase, Reason] = {Phase.PROXY_HEADER: "proxy_header", Phase.HANDSHAKE: "handshake"}


class Client:
    """An accepted connection: its session, its address, and the time of its last progress.

    `run` is the body of the client's task. Transport and session echo the bytes without it: the task only waits for the
    end. So every failure of this client is raised in one place, its task.

    Args:
        sock: accepted.
        sockaddr: the peer's address from accept(2).
        opened: the loop's time of the accept.
        new_session: creates the session of this client and socket.

    """

    __slots__ = ("_bytes_seen", "_counted", "_left", "_name", "_since", "_sockaddr", "header", "opened", "session")

    def __init__(
        self,
        sock: socket.socket,
        sockaddr: Any,
        opened: float,
        new_session: Callable[[Client, socket.socket], EchoSession],
    ) -> None:
        self._sockaddr = sockaddr
        # A client of a unix socket mostly has no address. Only an open socket tells its process.
        self._name = "" if sockaddr else _process_name(sock)
        self.opened = opened
        self.header: proxy_protocol.Header | None = None
        self._counted: str | None = None
        """The IP address for which the quota counts this client."""
        # The clock of the sweep. Clients that one sweep finds share its time: with many clients, a float each counts.
        self._since: float | None = None
        self._bytes_seen = 0
        self._left = 0
        self.session = new_session(self, sock)

    @property
    def peer(self) -> str:
        """The peer's address as text. For a unix socket without a name, its process and user."""
        return self._name or printable(addresses.text(self._sockaddr))

    @property
    def proxied_client(self) -> TcpAddress | UnixAddress | None:
        """The client that the PROXY header names, if any."""
        return self.header.source if self.header is not None else None

    async def run(self, settings: ServerSettings, quota: Quota | SharedQuota) -> None:
        """Serve the client until its connection is closed. If cancelled, reset the client.

        Raises:
            Exception: a defect in the session. Errors of the network are not raised.

        """
        session = self.session
        if settings.listener.proxy_protocol == "require":
            if not self._is_trusted(settings):
                self._refuse("proxy_header", "the sender is not in proxy_trusted")
                return
        elif (reason := self._refusal(settings, quota)) is not None:
            self._refuse(reason, "")
            return
        try:
            try:
                # Connect the socket to the session, through the PROXY header and TLS if the listener has them.
                front = self._front(settings, quota)
                await asyncio.get_running_loop().connect_accepted_socket(lambda: front, session.sock)
            except asyncio.CancelledError:
                # The loop has closed the transport that it made. uvloop does not report that.
                session.reject("aborted")
            except Exception as error:  # noqa: BLE001  (the session reports it; a client that has reset already is one)
                unwatch(session.sock)
                session.connection_lost(error)
                session.sock.close()
            try:
                await session.ended
            except asyncio.CancelledError:
                await self._reset()
        finally:
            if self._counted is not None:
                quota.release(self._counted)

    def _refuse(self, reason: Reason, detail: str) -> None:
        unwatch(self.session.sock)
        self.session.reject(reason, detail)

    async def _reset(self) -> None:
        """Reset the client, and report the end even if its transport does not."""
        session = self.session
        if session.delivery is None:
            # Cancelling the task has cancelled the future that it awaited.
            session.renew_ended()
            session.abort("aborted")
            await asyncio.wait([session.ended], timeout=LAST_STEPS)
            if not session.ended.done():
                session.abandon()
            await session.ended

    def _refusal(self, settings: ServerSettings, quota: Quota | SharedQuota) -> Reason | None:
        """Return the reason to refuse the client. If there is none, it is counted from now on, unless it has no IP address."""
        host = self._host()
        if host is None:
            return None
        # A header without a client is the proxy's own health check.
        is_named = self.header is None or self.proxied_client is not None
        networks = settings.listener.allowed_networks
        if networks and is_named and not addresses.is_within(host, networks):
            return "not_allowed"
        if not quota.acquire(host):
            return "client_limit"
        self._counted = host
        return None

    def _host(self) -> str | None:
        """Return the IP address of the client that the PROXY header names, or else of the peer; None if it has none."""
        if (source := self.proxied_client) is not None:
            return source.host if isinstance(source, TcpAddress) else None
        return addresses.host(self._sockaddr)

    def _identify(self, settings: ServerSettings, quota: Quota | SharedQuota, header: proxy_protocol.Header) -> bool:
        """Take the PROXY header; return False and close the session if the client that it names is refused."""
        self.header = header
        reason = self._refusal(settings, quota)
        if reason is not None:
            self.session.reject(reason)
        return reason is None

    def _front(self, settings: ServerSettings, quota: Quota | SharedQuota) -> EchoSession | TlsLayer | HeaderReader:
        """Return the protocol that the client's first bytes go to."""
        following = self.session if settings.tls is None else TlsLayer(self.session, settings.tls)
        if settings.listener.proxy_protocol == "require":
            return HeaderReader(self.session, following, partial(self._identify, settings, quota))
        return following

    def _is_trusted(self, settings: ServerSettings) -> bool:
        # A unix socket is protected by the permissions of its file.
        host = addresses.host(self._sockaddr)
        return host is None or addresses.is_within(host, settings.listener.trusted_networks)

    def describe(self) -> dict[str, object]:
        """Describe the connection as the server sees it, ready for JSON."""
        session = self.session
        local = session.sock.getsockname()
        seen: dict[str, object] = {"local": addresses.text(local) if local else None, "peer": self.peer}
        if session.sock.family == socket.AF_UNIX and (credentials := kernel.peer_credentials(session.sock)):
            seen["credentials"] = dict(zip(("pid", "uid", "gid"), credentials, strict=True))
        seen["proxy"] = proxy_protocol.describe(self.header) if self.header is not None else None
        seen["tls"] = session.tls._asdict() if session.tls is not None else None
        seen["tcp_info"] = kernel.tcp_members(session.sock)
        return seen

    def overdue(self, now: float, limits: LimitsSettings) -> Reason | None:
        """Return the reason to close this client now, if there is one.

        Call this once per sweep. It derives progress from the session's counters, so that a message costs nothing extra.
        Timeouts begin with the first sweep that finds the client, and are exact to one sweep.

        Args:
            now: the time by the clock of the sweep.
            limits: the timeouts.

        """
        session = self.session
        if self._since is None:
            self._since = now
        if (preamble := _PREAMBLES.get(session.phase)) is not None:
            expired = now - self._since >= limits.handshake_timeout
            return preamble if expired and not session.unread() else None
        if session.bytes_seen != self._bytes_seen:
            self._bytes_seen = session.bytes_seen
            self._since = now
            self._left = 0
            return None
        silent = now - self._since
        if session.paused:
            reason: Reason = "stalled"
            late = silent >= limits.write_timeout
        elif session.phase <= Phase.OPEN and limits.idle_timeout and silent >= limits.idle_timeout:
            reason = "idle"
            late = True
        else:
            return None
        # Linux reports a socket as writable in large steps, so by the write buffer alone a slow reader looks stalled.
        # The first check only records the number of undelivered bytes.
        left = session.undelivered()
        if reason == "idle" and session.unread():
            return None  # this process was paused; the client was not silent
        fell = left < self._left
        unknown = left and not self._left
        self._left = left
        if fell:
            self._since = now
        return reason if late and not fell and not unknown else None


def _process_name(sock: socket.socket) -> str:
    """Return the process at the other end of a unix socket as text, or nothing if it is unknown."""
    if (credentials := kernel.peer_credentials(sock)) is None:
        return ""
    pid, uid, _ = credentials
    return f"unix:pid={pid},uid={uid}"
