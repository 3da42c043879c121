"""Test parsing and formatting of addresses."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import echod
from echod.loops import loop_factory
from echod.net.addresses import (
    AddressError,
    InheritedAddress,
    TcpAddress,
    UdpAddress,
    UnixAddress,
    from_sockaddr,
    host,
    is_within,
    network,
    parse,
    parse_bindable,
    text,
)
from echod.server.quota import Quota
from harness import PATIENCE, receive
from watching import WATCHED, status

if TYPE_CHECKING:
    from harness import Command, Start

LOOPBACK = socket.if_nametoindex("lo")


@pytest.mark.parametrize(
    ("text", "host", "port", "canonical"),
    [
        ("127.0.0.1:8000", "127.0.0.1", 8000, "127.0.0.1:8000"),
        (":7", "", 7, ":7"),
        ("[::]:8443", "::", 8443, "[::]:8443"),
        ("[0:0:0::1]:0", "::1", 0, "[::1]:0"),
        ("[FE80::1%eth0]:80", "fe80::1%eth0", 80, "[fe80::1%eth0]:80"),
        ("[fe80::1%Eth0.5]:80", "fe80::1%Eth0.5", 80, "[fe80::1%Eth0.5]:80"),
        (":0", "", 0, ":0"),
        ("example.org.:80", "example.org.", 80, "example.org.:80"),
        ("BÜCHER.example:80", "bücher.example", 80, "bücher.example:80"),
        ("a" * 63 + ":80", "a" * 63, 80, "a" * 63 + ":80"),
        ("LocalHost:65535", "localhost", 65535, "localhost:65535"),
        ("a-b.example_1.org:1", "a-b.example_1.org", 1, "a-b.example_1.org:1"),
        ("h:00080", "h", 80, "h:80"),
    ],
)
def test_parse(text: str, host: str, port: int, canonical: str) -> None:
    address = parse(text)
    assert address == TcpAddress(host, port)
    assert str(address) == canonical
    assert parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' has no port: write HOST:PORT"),
        ("localhost", "'localhost' has no port"),
        ("localhost:", "'' is not a port: use 0 to 65535"),
        ("localhost:http", "'http' is not a port"),
        ("h:65536", "'65536' is not a port"),
        ("h:0655350", "'0655350' is not a port"),
        ("h:-1", "'-1' is not a port"),
        ("h: 80", "' 80' is not a port"),
        ("h:٣", "is not a port"),
        ("h:" + "9" * 5000, "is not a port"),
        ("::1:8000", "'::1:8000': an IPv6 address needs brackets: write"),
        ("::1", "'::1': an IPv6 address needs brackets"),
        ("fe80::1%eth0:80", "an IPv6 address needs brackets"),
        ("[::1]", r"'\[::1\]' has no port"),
        ("[::1", r"'\[:' is not a host name"),
        ("[::1]80", "is not a host name"),
        ("[::1]:", "'' is not a port"),
        ("[::1%]:80", "'::1%' is not an IPv6 address"),
        ("[::1%a\nb]:80", r"'::1%a\\nb' is not an IPv6 address"),
        ("[::1/64]:80", "'::1/64' is not an IPv6 address"),
        ("[g::1]:80", "'g::1' is not an IPv6 address"),
        ("[127.0.0.1]:80", "'127.0.0.1' is not an IPv6 address"),
        ("[]:80", "'' is not an IPv6 address"),
        ("a b:80", "'a b' is not a host name"),
        ("http://h:80", "'http://h' is not a host name: write HOST:PORT"),
        ("tcp:h:80", "'tcp:h' is not a host name"),
        ("unix/x:80", "'unix/x' is not a host name"),
        ("*:80", r"'\*' is not a host name"),
        ("8000", "'8000' is a port without a host: write 127.0.0.1:8000, or :8000 for all addresses"),
        ("99999", "'99999' is not a port: use 0 to 65535"),
        # getaddrinfo(3) takes 010 for 8.
        ("127.0.0.010:80", "'127.0.0.010' is ambiguous, .*: write 127.0.0.10 if it is decimal"),
        ("010.00.0.0:80", "'010.00.0.0' is ambiguous, .*: write 10.0.0.0 if it is decimal"),
        ("127.0.0.01.:80", "'127.0.0.01.' is ambiguous"),
        ("256.1.1.1:80", "'256.1.1.1' is not an IPv4 address: write four numbers of at most 255"),
        ("1.2.3.4.5:80", "'1.2.3.4.5' is not an IPv4 address"),
        # For these, the resolver would raise an error that is not an OSError.
        ("a" * 64 + ":80", "is not a host name"),
        ("a..b:80", "'a..b' is not a host name"),
        ("a." * 126 + "aa:80", "is not a host name"),
        (".:80", "'.' is not a host name"),
        ("ü" * 64 + ":80", "is not a host name"),
        ("\udcff:80", "is not a host name"),
    ],
)
def test_invalid_addresses(text: str, message: str) -> None:
    with pytest.raises(AddressError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[::ffff:192.0.2.1]:80", "an IPv6 socket accepts no IPv4 clients: write 192.0.2.1:80"),
        ("[FE80::1]:80", "a link-local address needs its interface: write [fe80::1%eth0]:80"),
        ("[febf::]:80", "a link-local address needs its interface: write [febf::%eth0]:80"),
    ],
)
@pytest.mark.parametrize("option", ["--listen", "--admin.address", "--listeners.a.address"])
def test_addresses_to_connect_to_only(command: Command, option: str, text: str, message: str) -> None:
    """The kernel binds no socket to these, so `check` refuses them, and says what to write. They name peers all the same."""
    assert isinstance(parse(text), TcpAddress)
    result = command("check", option, text)
    assert (result.returncode, result.stdout) == (78, "")
    assert result.stderr.endswith(f"{text!r}: {message}\n")


def test_asterisk() -> None:
    """Other servers write all addresses with an asterisk."""
    with pytest.raises(AddressError, match=r"'\*:80': '\*' is not a host name: write :80 for all addresses"):
        parse_bindable("*:80")


@pytest.mark.parametrize("text", ["[fe80::1%eth0]:80", "[::1]:80", "192.0.2.1:80", ":80", "localhost:80", "unix:@x"])
def test_addresses_to_listen_on(text: str) -> None:
    assert parse_bindable(text) == parse(text)


@pytest.mark.parametrize(
    ("text", "address", "sockaddr"),
    [
        ("unix:/run/echod.sock", UnixAddress("/run/echod.sock"), "/run/echod.sock"),
        ("unix:echod.sock", UnixAddress("echod.sock"), "echod.sock"),
        ("unix:@echod", UnixAddress("@echod"), "\0echod"),
        ("unix:" + "x" * 107, UnixAddress("x" * 107), "x" * 107),
        ("unix:@" + "x" * 107, UnixAddress("@" + "x" * 107), "\0" + "x" * 107),
        ("unix:/a:80", UnixAddress("/a:80"), "/a:80"),
    ],
)
def test_unix(text: str, address: UnixAddress, sockaddr: str) -> None:
    """Check the text and the sockaddr of unix addresses. Bind the abstract ones, which leave no file behind."""
    assert parse(text) == address
    assert str(address) == text
    assert address.sockaddr == sockaddr
    if sockaddr.startswith("\0"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(address.sockaddr)
            assert from_sockaddr(sock.getsockname()) == address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("udp:127.0.0.1:8000", UdpAddress("127.0.0.1", 8000)),
        ("udp::7", UdpAddress("", 7)),
        ("udp:[::1]:0", UdpAddress("::1", 0)),
        ("udp:LocalHost:7", UdpAddress("localhost", 7)),
        ("udp:systemd:web", InheritedAddress("web", datagram=True)),
    ],
)
def test_udp(text: str, address: UdpAddress | InheritedAddress) -> None:
    """An address of UDP differs from that of TCP with the same host and port."""
    assert parse(text) == parse_bindable(text) == address
    assert parse(str(address)) == address
    assert parse(text.removeprefix("udp:")) != address


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("udp:7", "'udp:7' is a port without a host: write udp:127.0.0.1:7, or udp::7 for all addresses"),
        ("udp:h", "'udp:h' has no port"),
        ("udp:::1:7", "an IPv6 address needs brackets: write udp:[V6]:PORT"),
        ("udp:unix:/x", "a unix socket has no UDP: write udp:HOST:PORT, or unix:/x for a stream"),
        ("udp:systemd:", "does not name an inherited socket"),
        ("udp:*:80", "'*' is not a host name: write udp::80 for all addresses"),
        ("udp:[::ffff:192.0.2.1]:80", "an IPv6 socket accepts no IPv4 clients: write udp:192.0.2.1:80"),
        ("udp:[fe80::1]:80", "a link-local address needs its interface: write udp:[fe80::1%eth0]:80"),
    ],
)
def test_invalid_udp_addresses(text: str, message: str) -> None:
    """The advice is for UDP too."""
    with pytest.raises(AddressError) as caught:
        parse_bindable(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["systemd:echod.socket", "systemd:web", "systemd:unknown"])
def test_inherited(text: str) -> None:
    assert parse(text) == InheritedAddress(text.removeprefix("systemd:"))
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unix:", "'unix:' does not name a socket: write unix:PATH or unix:@NAME"),
        ("unix:@", "does not name a socket"),
        ("unix:a\0b", "does not name a socket"),
        ("unix:a\nb", "does not name a socket"),
        ("unix:" + "x" * 108, "has at most 107 bytes, not 108"),
        ("unix:" + "ü" * 60, "has at most 107 bytes, not 120"),
        ("unix:@" + "x" * 108, "has at most 107 bytes, not 109"),
        ("systemd:", "does not name an inherited socket: write systemd:NAME"),
        ("systemd:a:b", "does not name an inherited socket"),
        ("systemd:ü", "does not name an inherited socket"),
    ],
)
def test_invalid_socket_names(text: str, message: str) -> None:
    with pytest.raises(AddressError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("sockaddr", "address"),
    [
        (("127.0.0.1", 80), TcpAddress("127.0.0.1", 80)),
        (("::1", 80, 0, 0), TcpAddress("::1", 80)),
        (("::ffff:192.0.2.1", 80, 0, 0), TcpAddress("192.0.2.1", 80)),
        (("fe80::1", 80, 0, LOOPBACK), TcpAddress("fe80::1%lo", 80)),
        (("fe80::1%lo", 80, 0, LOOPBACK), TcpAddress("fe80::1%lo", 80)),
        (("fe80::1", 80, 0, 2**31 - 1), TcpAddress("fe80::1%2147483647", 80)),  # an interface that has gone
        ("/run/x", UnixAddress("/run/x")),
        (b"\0x", UnixAddress("@x")),
        ("", None),
        (b"", None),
        ((3, 5000), None),  # AF_VSOCK
    ],
)
def test_from_sockaddr(sockaddr: object, address: TcpAddress | UnixAddress | None) -> None:
    assert from_sockaddr(sockaddr) == address
    assert text(sockaddr) == str(address or sockaddr)
    assert host(sockaddr) == (address.host if isinstance(address, TcpAddress) else None)


def link_local() -> str:
    """Return a link-local address of this machine with its zone, or skip the test."""
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, _, _, scope, flags, name = line.split()
        if scope == "20" and not int(flags, 16) & 0x48:  # link; neither tentative nor a duplicate
            return f"{socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))}%{name}"
    pytest.skip("no interface has a link-local address")


def test_zones_are_shown(start: Start) -> None:
    """The log, the status and mode info show a link-local address with its zone, in the form that is read back."""
    host = link_local()
    daemon = start(
        *(*WATCHED, "--listeners.zoned.address", f"[{host}]:0", "--listeners.zoned.mode", "info"), listen=None
    )
    address = daemon.wait_for("listening", listener="zoned")["address"]
    assert parse(address) == TcpAddress(host, daemon.address[1])
    assert status(daemon)["listeners"][0]["addresses"] == [address]
    with socket.create_connection(daemon.address, PATIENCE) as client:
        seen = json.loads(receive(client, 100_000))
        peer = f"[{host}]:{client.getsockname()[1]}"
    assert (seen["local"], seen["peer"]) == (address, peer)
    assert daemon.stop() == 0
    assert daemon.wait_for("client_closed")["peer"] == peer


def test_zones_of_the_library(loop_name: str) -> None:
    """A server in another program tells the address that a client can connect to."""
    host = link_local()

    async def serve() -> None:
        async with echod.Server.listen(f"[{host}]:0") as server:
            (address,) = server.addresses
            assert isinstance(address, TcpAddress)
            assert address.host == host
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            writer.close()
            await writer.wait_closed()

    with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
        runner.run(serve())


@pytest.mark.parametrize(
    ("first", "second", "one"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::1%eth0", True),
        ("fe80::1%eth0", "fe80::2%eth0", False),
        ("fe80::1%eth0", "fe80::1%eth1", False),
        ("fe80::1", "fe80::2", False),
        ("febf::1%eth0", "febf::2%eth0", False),
        ("fec0::1", "fec0::2", True),
    ],
)
def test_clients_that_share_a_quota(first: str, second: str, *, one: bool) -> None:
    """An IPv6 /64 network counts as one client. Link-local hosts count one by one, per interface."""
    quota = Quota(1)
    assert quota.acquire(first)
    assert quota.acquire(second) is not one
    quota.release(first)
    assert quota.acquire(first)


@pytest.mark.parametrize(
    ("text", "host", "within"),
    [
        ("10.0.0.0/8", "10.9.9.9", True),
        ("10.0.0.0/8", "2001:db8::1", False),
        ("::ffff:10.0.0.0/104", "10.9.9.9", True),
        ("::ffff:10.0.0.0/104", "11.0.0.1", False),
        ("::ffff:0:0/96", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "192.0.2.2", False),
        ("::/0", "192.0.2.1", False),
        ("::/0", "2001:db8::1", True),
        ("fe80::/10", "fe80::1%eth0", True),
        ("fe80::1", "fe80::2%eth0", False),
    ],
)
def test_networks(text: str, host: str, *, within: bool) -> None:
    """A network in IPv4-mapped form has IPv4 hosts, and an IPv6 network has hosts of every zone."""
    assert is_within(host, [network("192.0.2.99/32"), network(text)]) is within


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10.1.2.3/8", "'10.1.2.3/8' has host bits set: write 10.0.0.0/8, or 10.1.2.3 for that address alone"),
        ("::ffff:10.1.2.3/104", "has host bits set: write 10.0.0.0/8, or ::ffff:"),
        ("2001:db8::1/32", "has host bits set: write 2001:db8::/32, or 2001:db8::1 for that address alone"),
        ("fe80::1%eth0", "'fe80::1%eth0': a network has no zone: write fe80::1, which matches on every interface"),
        ("fe80::%eth0/64", "a network has no zone: write fe80::/64, which matches on every interface"),
        ("10", "'10' is not a network: write for example 10.0.0.0/8, 2001:db8::/32 or an address"),
        ("127.0.0.010", "'127.0.0.010' is not a network"),
        ("proxy.example", "'proxy.example' is not a network"),
    ],
)
def test_invalid_networks(command: Command, text: str, message: str) -> None:
    """Refuse a text that is not a network, and say what to write."""
    with pytest.raises(AddressError, match=message):
        network(text)
    result = command("check", "--listeners.a.address=h:1", f"--listeners.a.proxy_trusted={text}")
    assert result.returncode == 78
    assert message in result.stderr


def test_mapped_networks_are_trusted(start: Start) -> None:
    """An IPv4 proxy may send its header if `proxy_trusted` names its network in IPv4-mapped form."""
    daemon = start(
        *("--listeners.p.address", "127.0.0.1:0", "--listeners.p.proxy-protocol", "require"),
        *("--listeners.p.proxy-trusted", "::ffff:127.0.0.0/104"),
        listen=None,
    )
    with daemon.connect() as client:
        client.sendall(b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 7\r\nx")
        assert client.recv(1) == b"x"
    assert daemon.wait_for("client_closed")["client"] == "192.0.2.7:4711"
