"""Addresses as text."""

from __future__ import annotations

import pytest

from echod.addresses import AddressError, TcpAddress, from_sockaddr, parse


@pytest.mark.parametrize(
    ("text", "host", "port", "canonical"),
    [
        ("127.0.0.1:8000", "127.0.0.1", 8000, "127.0.0.1:8000"),
        (":7", "", 7, ":7"),
        ("[::]:8443", "::", 8443, "[::]:8443"),
        ("[0:0:0::1]:0", "::1", 0, "[::1]:0"),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80, "[fe80::1%eth0]:80"),
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
        ("::1:8000", r"an IPv6 address goes into brackets: \[::1\]:8000"),
        ("[::1]", "brackets|is no port|no host"),
        ("[127.0.0.1]:80", "'127.0.0.1' is no IPv6 address"),
        ("[]:80", "'' is no IPv6 address"),
        ("a b:80", "'a b' is no host name"),
        ("http://h:80", "brackets|no host name"),
        ("unix/x:80", "'unix/x' is no host name"),
    ],
)
def test_what_is_no_address(text: str, message: str) -> None:
    with pytest.raises(AddressError, match=message):
        parse(text)


def test_from_sockaddr() -> None:
    assert from_sockaddr(("127.0.0.1", 80)) == "127.0.0.1:80"
    assert from_sockaddr(("::1", 80, 0, 0)) == "[::1]:80"
