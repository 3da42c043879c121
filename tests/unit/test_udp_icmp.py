"""The error queue of a UDP socket."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from echod.probe.udp import icmp

pytestmark = pytest.mark.once

LOCAL, ICMP, ICMP6 = 1, 2, 3


def message(number: int, origin: int, kind: int, code: int, sender: str) -> bytes:
    """Return a struct sock_extended_err and the address of the sender, as in linux/errqueue.h."""
    error = struct.pack("IBBBBII", number, origin, kind, code, 0, 0, 0)
    if ":" in sender:
        return error + struct.pack("HHI16sI", socket.AF_INET6, 0, 0, socket.inet_pton(socket.AF_INET6, sender), 0)
    return error + struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(sender))


@pytest.mark.parametrize(
    ("number", "kind", "code", "word"),
    [
        (errno.ECONNREFUSED, 3, 3, "port_unreachable"),
        (errno.EHOSTUNREACH, 3, 1, "host_unreachable"),
        (errno.ENETUNREACH, 3, 0, "net_unreachable"),
        (errno.EHOSTUNREACH, 3, 13, "prohibited"),
        (errno.EMSGSIZE, 3, 4, "message_too_long"),
        (errno.EHOSTUNREACH, 11, 0, "ttl_exceeded"),
        (errno.EPROTO, 12, 7, "icmp_12_7"),
    ],
)
def test_icmp(number: int, kind: int, code: int, word: str) -> None:
    error = icmp.parse(socket.IPPROTO_IP, message(number, ICMP, kind, code, "192.0.2.7"))
    assert (error.errno, error.word) == (number, word)
    assert error.strerror == f"{word.replace('_', ' ')} (ICMP from 192.0.2.7)"


@pytest.mark.parametrize(
    ("number", "kind", "code", "word"),
    [
        (errno.ECONNREFUSED, 1, 4, "port_unreachable"),
        (errno.EHOSTUNREACH, 1, 3, "host_unreachable"),
        (errno.EMSGSIZE, 2, 0, "message_too_long"),
        (errno.EHOSTUNREACH, 3, 0, "ttl_exceeded"),
        (errno.EPROTO, 3, 3, "icmp_3_3"),
    ],
)
def test_icmp_v6(number: int, kind: int, code: int, word: str) -> None:
    error = icmp.parse(socket.IPPROTO_IPV6, message(number, ICMP6, kind, code, "2001:db8::7"))
    assert (error.errno, error.word) == (number, word)
    assert error.strerror == f"{word.replace('_', ' ')} (ICMP from 2001:db8::7)"


def test_local_errors() -> None:
    """An error of the own kernel has no sender, and a word by its errno."""
    error = icmp.parse(socket.IPPROTO_IP, message(errno.EMSGSIZE, LOCAL, 0, 0, "0.0.0.0"))
    assert (error.word, error.strerror) == ("message_too_long", "message too long")
    assert [icmp.from_errno(number).word for number in (errno.EPERM, errno.ENETUNREACH, 0)] == [
        "eperm",
        "net_unreachable",
        "other",
    ]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_kernel(host: str) -> None:
    """The kernel queues each ICMP message of the loopback device, and the queue is empty after that."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        icmp.enable(sock)
        sock.connect((host, 1))
        sock.send(b"1")
        with pytest.raises(ConnectionRefusedError):
            sock.send(b"2")
        assert [error.strerror for error in icmp.queued(sock)] == [f"port unreachable (ICMP from {host})"]
        assert icmp.queued(sock) == []
