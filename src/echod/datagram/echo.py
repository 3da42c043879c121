"""The receive path of one UDP socket: receive, admit, answer.

Nothing is queued: an answer that the kernel does not take at once is dropped and counted. The loop only reports that the
socket is readable, so this module works the same on every loop. The transports of the loops are not used: uvloop's drops
empty datagrams, and both buffer without a limit.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any

from echod.datagram.guards import is_wildcard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echod.datagram.flows import Flow
    from echod.datagram.guards import Cause
    from echod.datagram.registry import FlowRegistry
    from echod.datagram.shaping import FlowFault

BATCH = 64
"""Datagrams that are read at one wake-up. Then other sockets of the loop get their turn."""

# A UDP datagram has at most 65,507 bytes over IPv4, and 65,527 over IPv6.
_LARGEST = 65_536

# The kernel returns the real size of a longer datagram: recv(2). An enum member would be slower.
_TRUNC = int(socket.MSG_TRUNC)

# In Python from 3.14 on; its value on Linux and on macOS.
_IP_PKTINFO = 8 if sys.platform == "linux" else 26

# Interface, local address and destination: struct in_pktinfo of ip(7). The destination and the interface: ipv6(7).
_PKTINFO4 = struct.Struct("=I4s4s")
_PKTINFO6 = struct.Struct("=16sI")
_PACKET_INFO = ((socket.IPPROTO_IP, _IP_PKTINFO), (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO))

# The owner of an inherited socket may have asked for further messages, such as timestamps.
_CONTROL_SIZE = 512

_BROADCAST = "255.255.255.255"

# errno of a send buffer or a queue of the interface without room.
_FULL = frozenset({errno.EAGAIN, errno.ENOBUFS})

Control = list[tuple[int, int, bytes]]


class DatagramEcho:
    """Answer the datagrams of one socket.

    Args:
        sock: bound and non-blocking.
        registry: admits the datagrams.
        clock: returns the time in nanoseconds.
        on_held: called after an answer was delayed.
        capacity: bytes of the buffer.

    """

    def __init__(
        self,
        sock: socket.socket,
        registry: FlowRegistry,
        clock: Callable[[], int],
        on_held: Callable[[], None],
        capacity: int = _LARGEST,
    ) -> None:
        self.sock = sock
        self._registry = registry
        self._clock = clock
        self._on_held = on_held
        self._sendto, self._sendmsg = sock.sendto, sock.sendmsg
        self._capacity = capacity
        self._buffer = bytearray(capacity)
        self._view = memoryview(self._buffer)
        host, self._port = sock.getsockname()[:2]
        self._local = _unmapped(host)
        self._is_wildcard = is_wildcard(host)
        self._is_ipv6 = sock.family == socket.AF_INET6
        # An inherited socket may serve both families. The kernel then shows IPv4 addresses as IPv4-mapped ones.
        self._has_both = self._is_ipv6 and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        if self._is_wildcard:
            if self._is_ipv6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            if not self._is_ipv6 or self._has_both:
                sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)

    def read(self) -> bool:
        """Answer up to BATCH datagrams. Return whether more may be waiting."""
        try:
            if self._is_wildcard:
                self._read_wildcard()
            else:
                self._read_bound()
        except BlockingIOError:
            return False
        except OSError as error:
            self._registry.ledger.fail_to_receive(error, self._clock())
        return True

    def seal(self) -> None:
        """Have the kernel deliver no more datagrams to this socket. Those in its queue can still be read.

        The socket connects to itself, and a connected socket receives from its peer only: connect(2). Later datagrams get
        ICMP's port unreachable, as after a close.
        """
        own = self.sock.getsockname()
        if self._is_wildcard:
            own = ("::1" if self._is_ipv6 else "127.0.0.1", *own[1:])
        with contextlib.suppress(OSError):  # no route to itself: the interface is down
            self.sock.connect(own)

    def _read_bound(self) -> None:
        """Read from a socket that is bound to an address, which is the source of each answer.

        Raises:
            OSError: recvfrom(2) failed. BlockingIOError: nothing is left.

        """
        receive, buffer, local = self.sock.recvfrom_into, self._buffer, self._local
        find, handle, now = self._registry.flows.find, self._handle, self._clock()
        for _ in range(BATCH):
            size, peer = receive(buffer, 0, _TRUNC)
            flow = find((peer, local)) or self._admit(peer, local, local, (), now)
            if flow is not None:
                handle(flow, size, now)

    def _read_wildcard(self) -> None:
        """Read from a socket that is bound to all addresses, with the destination of each datagram.

        Raises:
            OSError: recvmsg(2) failed. BlockingIOError: nothing is left.

        """
        receive, buffers = self.sock.recvmsg_into, [self._buffer]
        find, handle, now = self._registry.flows.find, self._handle, self._clock()
        for _ in range(BATCH):
            size, control, _, peer = receive(buffers, _CONTROL_SIZE, _TRUNC)
            local = control[0][2] if len(control) == 1 else _packet_info(control)
            flow = find((peer, local))
            if flow is None:
                destination, answer = _destination(local)
                flow = self._admit(peer, local, destination, answer, now)
            if flow is not None:
                handle(flow, size, now)

    def _admit(
        self, peer: Any, local: object, destination: str, answer: Sequence[tuple[int, int, bytes]], now: int
    ) -> Flow | None:
        host = _unmapped(peer[0]) if self._has_both else peer[0]
        ends = (host, peer[1], destination)
        return self._registry.admit((peer, local), peer, ends, self._port, answer, now)

    def _handle(self, flow: Flow, size: int, now: int) -> None:
        """Answer the datagram in the buffer. This runs for each datagram, so it makes few calls."""
        take_total = self._registry.take_total
        if size > self._capacity:
            self._refuse(flow, "truncated", now)
        elif not flow.bucket.take(now) or (take_total is not None and not take_total(now)):
            self._refuse(flow, "rate", now)
        elif flow.fault is not None:
            flow.receive(size, now)
            self._distort(flow, flow.fault, bytes(self._view[:size]), now)
        else:
            try:
                if flow.control:
                    self._sendmsg((self._view[:size],), flow.control, 0, flow.peer)
                else:
                    self._sendto(self._view[:size], flow.peer)
            except OSError as error:
                flow.receive(size, now)
                self._drop(flow, error, now)
            else:
                flow.echo(size, now)

    def _refuse(self, flow: Flow, cause: Cause, now: int) -> None:
        flow.refuse(now)
        self._registry.ledger.refuse(cause, flow.names[0], now)

    def _distort(self, flow: Flow, fault: FlowFault, datagram: bytes, now: int) -> None:
        """Apply the fault of a flow to a datagram."""
        echo = fault.decide(datagram, now)
        if echo is None:
            self._registry.ledger.drop(flow, "fault", now)
        elif not echo.shaped:
            self.send(flow, echo.data, echo.copies, now)
        elif self._registry.held.push(fault.due(len(echo.data), now), flow, echo, self.send):
            flow.hold()
            self._on_held()
        else:
            self._registry.ledger.drop(flow, "hold_limit", now)

    def send(self, flow: Flow, data: bytes, copies: int, now: int) -> None:
        """Send an answer, and its copy if there are to be two."""
        try:
            self._pass_on(flow, data)
        except OSError as error:
            self._drop(flow, error, now)
            return
        flow.answer(len(data))
        if copies > 1:
            with contextlib.suppress(OSError):  # the answer itself was sent
                self._pass_on(flow, data)
                flow.copy()

    def _pass_on(self, flow: Flow, data: bytes) -> None:
        if flow.control:
            self._sendmsg((data,), flow.control, 0, flow.peer)
        else:
            self._sendto(data, flow.peer)

    def _drop(self, flow: Flow, error: OSError, now: int) -> None:
        if error.errno in _FULL:
            self._registry.ledger.drop(flow, "would_block", now)
        else:
            self._registry.ledger.drop(flow, "error", now, error)


def _packet_info(control: Sequence[tuple[int, int, bytes]]) -> bytes:
    """Return IP_PKTINFO or else IPV6_PKTINFO. A socket of both families has both for a datagram over IPv4."""
    found = {(level, kind): data for level, kind, data in control}
    return next((found[kind] for kind in _PACKET_INFO if kind in found), b"")


def _destination(info: bytes) -> tuple[str, Control]:
    """Return the address that was asked, and the control messages that make it the source of the answer.

    For a datagram to a broadcast or multicast address, the local address of IP_PKTINFO differs from the destination. The
    result is then 255.255.255.255, which the guards refuse. So it is if the kernel has left out the information.
    """
    if len(info) == _PKTINFO6.size:
        packed, interface = _PKTINFO6.unpack(info)
        address = ipaddress.IPv6Address(packed)
        scope = interface if address.is_link_local else 0
        return str(address), [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _PKTINFO6.pack(packed, scope))]
    if len(info) == _PKTINFO4.size:
        _, local, destination = _PKTINFO4.unpack(info)
        if local == destination:
            return socket.inet_ntoa(local), [(socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO4.pack(0, local, b""))]
    return _BROADCAST, []


def _unmapped(host: str) -> str:
    """Return the IPv4 address that an IPv4-mapped address stands for, or the same text."""
    if not host.startswith("::ffff:"):
        return host
    return str(ipaddress.IPv6Address(host).ipv4_mapped or host)
