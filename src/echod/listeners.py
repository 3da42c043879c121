"""From addresses to sockets that listen: all of them, or none."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from echod.addresses import TcpAddress

_NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})

# Tries to find a port that is free in both families.
_PORT_TRIES = 20


class ListenError(Exception):
    """Some addresses could not be opened; `problems` has a line for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Listener(NamedTuple):
    """A listener's name and its sockets, one for each address its host stands for."""

    name: str
    sockets: list[socket.socket]


def open_listeners(wanted: Iterable[tuple[str, TcpAddress]], backlog: int) -> list[Listener]:
    """Bind and listen on every address.

    The sockets are non-blocking, with SO_REUSEADDR, SO_KEEPALIVE and TCP_NODELAY; what they accept inherits these.

    Args:
        wanted: names and addresses.
        backlog: of each socket; the kernel cuts it down to net.core.somaxconn.

    Raises:
        ListenError: one or more could not be opened; those that could are closed again.

    """
    problems: list[str] = []
    with contextlib.ExitStack() as opened:
        listeners: list[Listener] = []
        for name, address in wanted:
            try:
                sockets = _open(address, backlog)
            except OSError as error:
                problems.append(f"cannot listen on {address}: {_explain(error)}")
                continue
            for sock in sockets:
                opened.enter_context(sock)
            listeners.append(Listener(name, sockets))
        if problems:
            raise ListenError(problems)
        opened.pop_all()
        return listeners


def _explain(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"the name cannot be resolved ({error.strerror})"
    return os.strerror(error.errno) if error.errno else str(error)


def _open(address: TcpAddress, backlog: int) -> list[socket.socket]:
    tries = 1 if address.port else _PORT_TRIES
    while True:
        try:
            return _open_once(address, backlog)
        except OSError as error:
            # The port that the kernel chose for the first family may be taken in the second.
            tries -= 1
            if error.errno != errno.EADDRINUSE or not tries:
                raise


def _open_once(address: TcpAddress, backlog: int) -> list[socket.socket]:
    """Open one socket for each IP address of the host, all on one port."""
    found = socket.getaddrinfo(
        address.host or None,
        address.port,
        type=socket.SOCK_STREAM,
        flags=socket.AI_PASSIVE,
    )
    port = address.port
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        # Some resolvers name an address twice, and IPv4 goes first whatever their order: one order on every host.
        for family, _, _, _, sockaddr in sorted(dict.fromkeys(found), key=lambda info: info[0] == socket.AF_INET6):
            try:
                sock = _bind(family, (sockaddr[0], port, *sockaddr[2:]), backlog)
            except OSError as error:
                # A host without IPv6 still has names with IPv6 addresses, localhost to begin with.
                if not sockets or family != socket.AF_INET6 or error.errno not in _NO_IPV6:
                    raise
                continue
            opened.enter_context(sock)
            port = sock.getsockname()[1]
            sockets.append(sock)
        opened.pop_all()
        return sockets


def _bind(family: int, sockaddr: tuple[str | int, ...], backlog: int) -> socket.socket:
    with contextlib.ExitStack() as opened:
        sock = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
        sock.setblocking(False)  # noqa: FBT003  (its only parameter)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if family == socket.AF_INET6:
            # Each family has a socket of its own, so that a peer's IPv4 address never shows as an IPv6 one.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(sockaddr)
        sock.listen(backlog)
        opened.pop_all()
        return sock
