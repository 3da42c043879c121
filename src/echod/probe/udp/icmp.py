"""The errors that the network reports for a UDP socket: the kind of the ICMP message, and its sender.

A connected UDP socket on Linux reports only some errors as the errno of the next call. With IP_RECVERR the kernel queues
all of them with their ICMP message (ip(7), ipv6(7), and struct sock_extended_err in linux/errqueue.h).
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys

from echod.probe.errors import IcmpError

# linux/in.h and linux/in6.h; the module socket has them from Python 3.14 on.
_IP_RECVERR, _IPV6_RECVERR = 11, 25

# The members errno, origin, type and code of struct sock_extended_err. The address of the sender follows it.
_EXTENDED = struct.Struct("IBBBx8x")
_ORIGIN_LOCAL = 1
# In struct sockaddr_in and sockaddr_in6, the place of the address.
_IPV4, _IPV6 = slice(4, 8), slice(8, 24)

# Larger than the control message.
_ANCILLARY = 256

# By type and code: RFC 792, RFC 1812 section 5.2.7.1.
_ICMP = {
    (3, 0): "net_unreachable",
    (3, 1): "host_unreachable",
    (3, 2): "protocol_unreachable",
    (3, 3): "port_unreachable",
    (3, 4): "message_too_long",
    (3, 9): "prohibited",
    (3, 10): "prohibited",
    (3, 13): "prohibited",
    (11, 0): "ttl_exceeded",
}
# By type and code: RFC 4443, section 3.
_ICMP_V6 = {
    (1, 0): "net_unreachable",
    (1, 1): "prohibited",
    (1, 3): "host_unreachable",
    (1, 4): "port_unreachable",
    (2, 0): "message_too_long",
    (3, 0): "ttl_exceeded",
}
_BY_ERRNO = {
    errno.ECONNREFUSED: "port_unreachable",
    errno.EHOSTUNREACH: "host_unreachable",
    errno.ENETUNREACH: "net_unreachable",
    errno.EMSGSIZE: "message_too_long",
}


def enable(sock: socket.socket) -> None:
    """Make the kernel queue all ICMP errors of a UDP socket, if it can."""
    if sys.platform != "linux":  # pragma: no cover (Linux only)
        return
    sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)


def queued(sock: socket.socket) -> list[IcmpError]:
    """Return the queued errors of a socket, oldest first, and remove them."""
    found: list[IcmpError] = []
    with contextlib.suppress(BlockingIOError):
        while sys.platform == "linux":  # pragma: no branch (Linux only)
            _, ancillary, _, _ = sock.recvmsg(0, _ANCILLARY, socket.MSG_ERRQUEUE)
            found.extend(parse(level, data) for level, _, data in ancillary)
    return found


def parse(level: int, data: bytes) -> IcmpError:
    """Return the error in a control message of the error queue.

    Args:
        level: IPPROTO_IP or IPPROTO_IPV6.
        data: a struct sock_extended_err and a socket address.

    """
    number, origin, kind, code = _EXTENDED.unpack_from(data)
    if origin == _ORIGIN_LOCAL:
        return from_errno(number)
    v6 = level == socket.IPPROTO_IPV6
    word = (_ICMP_V6 if v6 else _ICMP).get((kind, code), f"icmp_{kind}_{code}")
    sockaddr = data[_EXTENDED.size :]
    sender = socket.inet_ntop(socket.AF_INET6, sockaddr[_IPV6]) if v6 else socket.inet_ntoa(sockaddr[_IPV4])
    return IcmpError(number, word, sender)


def from_errno(number: int) -> IcmpError:
    """Return the error for an errno without an ICMP message."""
    return IcmpError(number, _BY_ERRNO.get(number) or errno.errorcode.get(number, "other").lower())
