"""Open the UDP socket of a probe."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from typing import TYPE_CHECKING

from echod.probe.udp import icmp

if TYPE_CHECKING:
    from echod.probe.connect import Endpoint, Route


# The longest time that send(2) may block while the network device is busy: struct timeval, seconds and microseconds.
_SEND_TIMEOUT = struct.pack("ll", 1, 0)
# Bytes of the receive buffer, or as many as net.core.rmem_max allows.
_RECEIVE_BUFFER = 4_194_304
# Of linux/sock_diag.h and asm-generic/socket.h: the number of dropped datagrams is the ninth member.
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("32xI")


def connect(route: Route, endpoint: Endpoint) -> socket.socket:
    """Return a connected UDP socket, which receives datagrams of the server only, and the ICMP errors.

    Raises:
        OSError: the system refuses the target, the source address or an option.

    """
    with contextlib.ExitStack() as opened:
        sock = opened.enter_context(socket.socket(endpoint.family, socket.SOCK_DGRAM))
        icmp.enable(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        route.prepare(sock)
        sock.connect(endpoint.sockaddr)
        if sock.getsockname() == sock.getpeername():
            # The kernel may choose the target's port if no server has it. The socket would receive its own datagrams.
            # It keeps that port until another socket has got a different one.
            return connect(route, endpoint)
        opened.pop_all()
        return sock


def receive_drops(sock: socket.socket) -> int | None:
    """Return the number of datagrams that the kernel dropped at the socket, or None outside Linux.

    Most of them found the receive buffer full, as the probe was too slow.
    """
    if sys.platform != "linux":  # pragma: no cover (Linux only)
        return None
    (drops,) = _MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))
    return int(drops)
