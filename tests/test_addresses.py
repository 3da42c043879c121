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
        # The resolver would fail on these with an error that is no OSError.
        ("a" * 64 + ":80", "is no host name"),
        ("a..b:80", "'a..b' is no host name"),
        (".:80", "'.' is no host name"),
        ("ü" * 64 + ":80", "is no host name"),
        ("\udcff:80", "is no host name"),
    ],
)
def test_what_is_no_address(text: str, message: str) -> None:
    with pytest.raises(AddressError, match=message):
        parse(text)


def test_from_sockaddr() -> None:
    assert from_sockaddr(("127.0.0.1", 80)) == "127.0.0.1:80"
    assert from_sockaddr(("::1", 80, 0, 0)) == "[::1]:80"
