"""Test parsing and formatting of addresses."""

from __future__ import annotations

import socket

import pytest

from echod.addresses import AddressError, InheritedAddress, TcpAddress, UnixAddress, from_sockaddr, parse


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
        ("localhost:", "'' is no port: write a number from 0 to 65535"),
        ("localhost:http", "'http' is no port"),
        ("h:65536", "'65536' is no port"),
        ("h:0655350", "'0655350' is no port"),
        ("h:-1", "'-1' is no port"),
        ("h: 80", "' 80' is no port"),
        ("h:٣", "is no port"),
        ("h:" + "9" * 5000, "is no port"),
        ("::1:8000", "'::1:8000': an IPv6 address goes into brackets, and its port after them"),
        ("::1", "'::1': an IPv6 address goes into brackets"),
        ("fe80::1%eth0:80", "an IPv6 address goes into brackets"),
        ("[::1]", r"'\[::1\]' has no port"),
        ("[::1", r"'\[:' is no host name"),
        ("[::1]80", "is no host name"),
        ("[::1]:", "'' is no port"),
        ("[::1%]:80", "'::1%' is no IPv6 address"),
        ("[::1%a\nb]:80", r"'::1%a\\nb' is no IPv6 address"),
        ("[::1/64]:80", "'::1/64' is no IPv6 address"),
        ("[g::1]:80", "'g::1' is no IPv6 address"),
        ("[127.0.0.1]:80", "'127.0.0.1' is no IPv6 address"),
        ("[]:80", "'' is no IPv6 address"),
        ("a b:80", "'a b' is no host name"),
        ("http://h:80", "'http://h' is no host name: write HOST:PORT"),
        ("tcp:h:80", "'tcp:h' is no host name"),
        ("unix/x:80", "'unix/x' is no host name"),
        ("*:80", r"'\*' is no host name"),
        # For these, the resolver would raise an error that is not an OSError.
        ("a" * 64 + ":80", "is no host name"),
        ("a..b:80", "'a..b' is no host name"),
        (".:80", "'.' is no host name"),
        ("ü" * 64 + ":80", "is no host name"),
        ("\udcff:80", "is no host name"),
    ],
)
def test_invalid_addresses(text: str, message: str) -> None:
    with pytest.raises(AddressError, match=message):
        parse(text)


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


@pytest.mark.parametrize("text", ["systemd:echod.socket", "systemd:web", "systemd:unknown"])
def test_inherited(text: str) -> None:
    assert parse(text) == InheritedAddress(text.removeprefix("systemd:"))
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unix:", "'unix:' names no socket: write unix:PATH or unix:@NAME"),
        ("unix:@", "names no socket"),
        ("unix:a\0b", "names no socket"),
        ("unix:a\nb", "names no socket"),
        ("unix:" + "x" * 108, "has at most 107 bytes, not 108"),
        ("unix:" + "ü" * 60, "has at most 107 bytes, not 120"),
        ("unix:@" + "x" * 108, "has at most 107 bytes, not 109"),
        ("systemd:", "names no inherited socket: write systemd:NAME"),
        ("systemd:a:b", "names no inherited socket"),
        ("systemd:ü", "names no inherited socket"),
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
        (("fe80::1%eth0", 80, 0, 2), TcpAddress("fe80::1%eth0", 80)),
        ("/run/x", UnixAddress("/run/x")),
        (b"\0x", UnixAddress("@x")),
        ("", None),
        (b"", None),
        ((3, 5000), None),  # AF_VSOCK
    ],
)
def test_from_sockaddr(sockaddr: object, address: TcpAddress | UnixAddress | None) -> None:
    assert from_sockaddr(sockaddr) == address
