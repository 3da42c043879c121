"""Ask the kernel about a connection: queues, acknowledgements, round trips.

All statements of echod about delivery are based on the kernel's counters. A byte that a transport has accepted may
still be lost. A byte that the peer's kernel has acknowledged has arrived. The functions also work on a socket that the
peer has reset, until it is closed.

Sources: tcp(7), socket(7), and struct tcp_info in linux/tcp.h.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import resource
import select
import socket
import struct
import sys
import termios
from typing import NamedTuple

# Offsets into struct tcp_info; the kernel only ever appends to it.
_STATE = struct.Struct("B")
_UNACKED = struct.Struct("24xI")
_DETAILS = struct.Struct("68xI28xI16xQ")
_TCP_CLOSE = 7

# Protocol and option of Multipath TCP (RFC 8684), and offsets into struct mptcp_info of linux/mptcp.h: the flags and the
# acknowledged bytes. Linux has the latter from 6.5 on.
_IPPROTO_MPTCP = 262
_SOL_MPTCP, _MPTCP_INFO = 284, 1
_MPTCP_DETAILS = struct.Struct("8xI60xQ")
_MPTCP_FALLBACK = 1

# The same structure by its members' names, times in microseconds where the kernel has them so.
_MEMBERS = struct.Struct("8x24I16xQQ3I")
_MEMBER_NAMES = (
    *("rto_us", "ato_us", "snd_mss", "rcv_mss", "unacked", "sacked", "lost", "retrans", "fackets"),
    *("last_data_sent_ms", "last_ack_sent_ms", "last_data_recv_ms", "last_ack_recv_ms"),
    *("pmtu", "rcv_ssthresh", "rtt_us", "rttvar_us", "snd_ssthresh", "snd_cwnd", "advmss", "reordering"),
    *("rcv_rtt_us", "rcv_space", "total_retrans"),
    *("bytes_acked", "bytes_received", "segs_out", "segs_in", "notsent_bytes"),
)

_TCP_FAMILIES = frozenset({socket.AF_INET, socket.AF_INET6})
_CREDENTIALS = struct.Struct("3i")

_ON = struct.pack("ii", 1, 0)

# An array of 32-bit numbers, the last of which are the drops: enum in linux/sock_diag.h. socket(7) calls it SO_MEMINFO.
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("32xI")


class TcpInfo(NamedTuple):
    """One connection's TCP_INFO."""

    rtt_ms: float
    """Smoothed round trip, milliseconds."""
    retransmits: int
    """Segments sent again, over the connection's life."""
    acked: int
    """Bytes the peer has acknowledged; our FIN counts as one."""


def tcp_info(sock: socket.socket) -> TcpInfo | None:
    """Return the connection's TCP_INFO, or None if the kernel has none.

    It has none of a unix socket, outside Linux, or of an MPTCP connection before Linux 6.5. For MPTCP, `acked` is the
    whole connection's, and the other figures are the first subflow's.
    """
    if sys.platform != "linux":  # pragma: no cover (Linux only)
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
    except OSError as error:  # instead of has_tcp_info(), as this is asked for each connection, and most have one
        if error.errno != errno.EOPNOTSUPP:
            raise
        return None
    rtt, retransmits, acked = _DETAILS.unpack_from(info)
    if sock.proto == _IPPROTO_MPTCP and (acked := _mptcp_acked(sock, acked)) is None:
        return None
    return TcpInfo(rtt / 1000, retransmits, acked)


def _mptcp_acked(sock: socket.socket, of_first_subflow: int) -> int | None:
    """Return the acknowledged bytes of a connection to an MPTCP listener, or None if the kernel does not count them.

    A client without MPTCP has a plain TCP connection to such a listener. If the path removes the MPTCP options, the
    connection falls back to a single subflow. In both cases TCP_INFO has the connection's figures.
    """
    try:
        info = sock.getsockopt(_SOL_MPTCP, _MPTCP_INFO, _MPTCP_DETAILS.size)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return of_first_subflow
    if len(info) < _MPTCP_DETAILS.size:
        return None
    flags, acked = _MPTCP_DETAILS.unpack(info)
    return of_first_subflow if flags & _MPTCP_FALLBACK else int(acked)


def has_tcp_info(sock: socket.socket) -> bool:
    """Tell whether the kernel has a TCP_INFO for this socket."""
    return sys.platform == "linux" and sock.family in _TCP_FAMILIES


def tcp_members(sock: socket.socket) -> dict[str, int] | None:
    """Return the useful members of the connection's TCP_INFO by name, or None if the kernel has none or refuses it."""
    if not has_tcp_info(sock):
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MEMBERS.size)
    except OSError:
        return None
    return dict(zip(_MEMBER_NAMES, _MEMBERS.unpack_from(info), strict=True))


def peer_credentials(sock: socket.socket) -> tuple[int, int, int] | None:
    """Return the process, user and group that connected to a unix socket (SO_PEERCRED).

    It is None outside Linux, and if the kernel refuses it.
    """
    if sys.platform != "linux":  # pragma: no cover (Linux only)
        return None
    try:
        pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    except OSError:
        return None
    return pid, uid, gid


def is_reset(sock: socket.socket) -> bool:
    """Tell whether the connection is gone. It is too when both sides' FINs are acknowledged: ask about that afterwards.

    If the kernel refuses to tell, the answer is no.
    """
    if not has_tcp_info(sock):
        return False
    try:
        (state,) = _STATE.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1))
    except OSError:
        return False
    return bool(state == _TCP_CLOSE)


def unacknowledged(sock: socket.socket) -> int:
    """Return how many bytes were given to the kernel and not acknowledged by the peer (SIOCOUTQ); a FIN is one."""
    if sys.platform == "darwin":  # pragma: no cover (macOS only)
        return sock.getsockopt(socket.SOL_SOCKET, 0x1024)  # SO_NWRITE
    # Into a buffer: with bytes, ioctl() first fails to write to them, and that costs as much as the call.
    count = bytearray(4)
    fcntl.ioctl(sock, termios.TIOCOUTQ, count)
    return int.from_bytes(count, sys.byteorder)


def readable(sock: socket.socket) -> bool:
    """Return whether the kernel has something to read: bytes, a connection to accept, or the peer's FIN or RST.

    If the kernel refuses to tell, the answer is yes: a caller that is about to close the socket then asks again.
    """
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    try:
        return bool(poll.poll(0))
    except OSError:  # ENOMEM
        return True


def datagram_drops(sock: socket.socket) -> int:
    """Return how many datagrams the kernel has dropped at a socket: its buffer was full, or a checksum was wrong.

    The count wraps at 2**32. It is 0 outside Linux, and if the kernel refuses it.
    """
    if sys.platform != "linux":  # pragma: no cover (Linux only)
        return 0
    try:
        (drops,) = _MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))
    except OSError:
        return 0
    return int(drops)


def waiting_connections(listening: socket.socket) -> int:
    """Return how many connections wait in a listening socket's queue; 1 for any number if the kernel does not tell."""
    if has_tcp_info(listening):
        with contextlib.suppress(OSError):  # ENOBUFS, ENOMEM
            (count,) = _UNACKED.unpack(listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28))
            return int(count)
    return int(readable(listening))


def reset_on_close(sock: socket.socket) -> None:
    """Make the next close send RST and drop unsent data (SO_LINGER with a time of 0)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ON)


def raise_descriptor_limit() -> int:
    """Raise RLIMIT_NOFILE to its hard limit if allowed, and return the limit in force."""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS refuses an unlimited one.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        limit = hard
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit
