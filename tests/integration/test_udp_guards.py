"""The guards of UDP listeners over real sockets, the end of a loop, and `allow` for streams."""

from __future__ import annotations

import contextlib
import socket
import struct
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE
from udp_clients import AT_ONCE, UNLIMITED, ask, client, flow, name, udp_address

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Start

LOOPBACK = "udp:127.0.0.1:0"


@pytest.fixture
def owned() -> Iterator[ExitStack]:
    """Yield a stack that closes the sockets of the test."""
    with ExitStack() as stack:
        yield stack


def forge(source: tuple[str, int], destination: tuple[str, int], payload: bytes) -> None:
    """Send a datagram over IPv4 with another source address, without a checksum, which UDP permits (RFC 768)."""
    udp = struct.pack("!4H", source[1], destination[1], 8 + len(payload), 0) + payload
    addresses = socket.inet_aton(source[0]) + socket.inet_aton(destination[0])
    # The kernel fills in the lengths and checksums of the header that are 0: raw(7).
    header = struct.pack("!2B3H2BH8s", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0, addresses)
    try:
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    except PermissionError:
        pytest.skip("forging a source address needs CAP_NET_RAW")
    with raw:
        raw.sendto(header + udp, (destination[0], 0))


def test_refusals_send_nothing(start: Start, owned: ExitStack) -> None:
    """A refused datagram gets no answer. The log has each cause, and the ledger has no flow."""
    low, other = (owned.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in range(2))
    low.bind(("127.0.0.1", 0))
    port = low.getsockname()[1]
    other.bind(("127.0.0.2", 0))
    listener = ("--listeners.a.address", "udp:0.0.0.0:0", "--listeners.a.allow", "127.0.0.1,10.0.0.0/8")
    daemon = start(*AT_ONCE, *listener, "--listeners.a.refuse-ports", f"7, {port}-{port}", listen=None)
    address = "127.0.0.1", udp_address(daemon)[1]
    for sock, cause, destination in (
        (low, "port", address),
        (other, "network", address),
        (owned.enter_context(client(address)), "multicast", ("127.255.255.255", address[1])),
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.sendto(b"x", destination)
        line = daemon.wait_for("datagrams_refused", cause=cause, peer=name(sock))
        assert (line["datagrams"], line["level"]) == (1, "warning")
    last = owned.enter_context(client(address))
    assert ask(last, b"x") == b"x"
    for sock in (low, other):
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)
    assert daemon.stop() == 0
    assert flow(daemon, last)["received_datagrams"] == 1
    stopped = daemon.wait_for("stopped")
    assert (stopped["flows"], stopped["datagrams_received"], stopped["datagrams_refused"]) == (1, 1, 3)


def test_rate(start: Start, owned: ExitStack) -> None:
    """A source above its rate is refused, whatever its port. Each datagram is answered or counted as refused."""
    daemon = start("--limits.datagram-rate", "1", "--limits.datagram-burst", "5", *AT_ONCE, listen=LOOPBACK)
    address = udp_address(daemon)
    first, second = (owned.enter_context(client(address)) for _ in range(2))
    elsewhere = owned.enter_context(client(address, "127.0.0.2"))
    for _ in range(50):
        first.send(b"x")
    daemon.wait_for("datagrams_refused", cause="rate")
    second.send(b"x")
    assert ask(elsewhere, b"y") == b"y"
    assert daemon.stop() == 0
    stopped = daemon.wait_for("stopped")
    received, refused = stopped["datagrams_received"], stopped["datagrams_refused"]
    assert received + refused == 52
    assert refused > 1
    assert sum(line["datagrams"] for line in daemon.all("datagrams_refused")) == refused
    line = flow(daemon, first)
    assert line["received_datagrams"] + line["refused"] == 50
    assert line["received_datagrams"] >= 5
    for _ in range(line["sent_datagrams"]):
        assert first.recv(1) == b"x"
    first.setblocking(False)
    # The listener's port is closed by now, but nothing was sent to it since.
    with pytest.raises(BlockingIOError):
        first.recv(1)


def test_total_rate(start: Start, owned: ExitStack) -> None:
    """All sources together are limited too."""
    daemon = start(
        "--limits.datagram-total-rate", "5", *UNLIMITED, "--log.connections", "all", *AT_ONCE, listen=LOOPBACK
    )
    address = udp_address(daemon)
    peers = [owned.enter_context(client(address, f"127.0.1.{number}")) for number in range(1, 51)]
    for sock in peers:
        sock.send(b"x")
    daemon.wait_for("datagrams_refused", cause="rate")
    assert daemon.stop() == 0
    stopped = daemon.wait_for("stopped")
    assert stopped["datagrams_received"] + stopped["datagrams_refused"] == 50
    assert stopped["datagrams_received"] >= 1
    assert sum(line["refused"] for line in daemon.all("flow_closed")) == stopped["datagrams_refused"]


def test_loop_ends(start: Start) -> None:
    """One forged datagram makes two daemons answer each other. The bucket of one of them ends that, after its burst."""
    guarded = start("--limits.datagram-rate", "1", "--limits.datagram-burst", "200", *AT_ONCE, listen=LOOPBACK)
    naive = start(*UNLIMITED, *AT_ONCE, listen=LOOPBACK)
    forge(udp_address(naive), udp_address(guarded), b"x")
    refusal = guarded.wait_for("datagrams_refused", cause="rate")
    assert refusal["peer"] == "{}:{}".format(*udp_address(naive))
    assert guarded.stop() == 0
    assert naive.stop() == 0
    (one,), (other,) = guarded.all("flow_closed"), naive.all("flow_closed")
    rounds = one["received_datagrams"]
    assert rounds >= 200
    # A token is added per second, so a loop of a second would have one round more.
    assert rounds <= 200 + one["seconds"] + 1
    assert (one["sent_datagrams"], one["refused"]) == (rounds, 1)
    assert (other["received_datagrams"], other["sent_datagrams"]) == (rounds, rounds)


def test_own_listener(start: Start) -> None:
    """A datagram that claims to be from another listener of the daemon is refused, whichever address it names."""
    daemon = start("--listen", LOOPBACK, *AT_ONCE, listen="udp:0.0.0.0:0")
    wildcard, fixed = udp_address(daemon), udp_address(daemon, 2)
    forge(fixed, ("127.0.0.1", wildcard[1]), b"x")
    daemon.wait_for("datagrams_refused", cause="self", peer="{}:{}".format(*fixed))
    forge(("127.0.0.9", wildcard[1]), fixed, b"x")
    daemon.wait_for("datagrams_refused", cause="self", peer=f"127.0.0.9:{wildcard[1]}")
    assert daemon.stop() == 0
    assert daemon.wait_for("stopped")["flows"] == 0


# Streams


def connect(address: tuple[str, int], source: str) -> socket.socket:
    return socket.create_connection(address, PATIENCE, (source, 0))


def end(sock: socket.socket) -> bytes:
    """Return what arrives until the connection ends, in whatever way."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(100):
            received += data
    return received


def test_allow_for_streams(start: Start, owned: ExitStack) -> None:
    """A client from another network is closed before a byte is read."""
    daemon = start("--listeners.a.address", "127.0.0.1:0", "--listeners.a.allow", "127.0.0.1", listen=None)
    friend = owned.enter_context(connect(daemon.address, "127.0.0.1"))
    friend.sendall(b"x")
    assert friend.recv(1) == b"x"
    stranger = owned.enter_context(connect(daemon.address, "127.0.0.3"))
    with contextlib.suppress(ConnectionError):
        stranger.sendall(b"x")
    assert end(stranger) == b""
    line = daemon.wait_for("client_closed", peer=name(stranger))
    assert (line["reason"], line["received"], line["sent"]) == ("not_allowed", 0, 0)
    friend.shutdown(socket.SHUT_WR)
    assert friend.recv(1) == b""
    assert daemon.stop() == 0
    assert daemon.receipt()["failed"] == 0


def test_allow_behind_a_proxy(start: Start, owned: ExitStack) -> None:
    """With PROXY headers, the client that the header names counts. The sender and its health checks need no permission."""
    listener = ("--listeners.a.address", "127.0.0.1:0", "--listeners.a.proxy-protocol", "require")
    daemon = start(*listener, "--listeners.a.allow", "192.0.2.0/24", listen=None)
    for source, answer in (("192.0.2.1", b"x"), ("198.51.100.1", b""), (None, b"x")):
        proxy = owned.enter_context(connect(daemon.address, "127.0.0.1"))
        client_of_proxy = "UNKNOWN" if source is None else f"TCP4 {source} 203.0.113.1 5 7"
        proxy.sendall(f"PROXY {client_of_proxy}\r\nx".encode())
        with contextlib.suppress(OSError):
            proxy.shutdown(socket.SHUT_WR)
        assert end(proxy) == answer
        line = daemon.wait_for("client_closed", peer=name(proxy), reason="eof" if answer else "not_allowed")
        assert line.get("client") == (None if source is None else f"{source}:5")
    assert daemon.stop() == 0
