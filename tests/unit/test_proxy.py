"""Test PROXY protocol headers against each rule of the specification, with bytes written by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from echod.net import proxy_protocol
from echod.net.addresses import TcpAddress, UnixAddress
from echod.net.proxy_protocol import Header, ProxyError, Tlv, describe, encode_v1, encode_v2, parse, size
from proxy_headers import HAPROXY_CHECK, HAPROXY_TLS, HAPROXY_V1_MAPPED, HAPROXY_V2, SIGNATURE, rejection, tlv, v2

if TYPE_CHECKING:
    from collections.abc import Callable

V4 = bytes.fromhex("c0000201 c6336402 dc04 01bb")  # 192.0.2.1:56324 to 198.51.100.2:443
V4_SOURCE, V4_DESTINATION = TcpAddress("192.0.2.1", 56324), TcpAddress("198.51.100.2", 443)
V6 = bytes.fromhex("20010db8000000000000000000000001 20010db8000000000000000000000002 dc04 01bb")
V6_SOURCE, V6_DESTINATION = TcpAddress("2001:db8::1", 56324), TcpAddress("2001:db8::2", 443)


def unix(source: bytes, destination: bytes) -> bytes:
    return source.ljust(108, b"\0") + destination.ljust(108, b"\0")


# Version 1


@pytest.mark.parametrize(
    ("line", "family", "source", "destination"),
    [
        ("TCP4 192.0.2.1 198.51.100.2 56324 443", "TCP4", "192.0.2.1:56324", "198.51.100.2:443"),
        ("TCP4 255.255.255.255 255.255.255.255 65535 65535", "TCP4", "255.255.255.255:65535", "255.255.255.255:65535"),
        ("TCP4 0.0.0.0 0.0.0.0 0 0", "TCP4", "0.0.0.0:0", "0.0.0.0:0"),
        ("TCP6 2001:db8::1 ::1 1 2", "TCP6", "[2001:db8::1]:1", "[::1]:2"),
        ("TCP6 2001:0DB8:0000:0000:0000:0000:0000:0001 :: 1 2", "TCP6", "[2001:db8::1]:1", "[::]:2"),
        ("TCP6 1:2:3:4:5:6:7:8 1::8 1 2", "TCP6", "[1:2:3:4:5:6:7:8]:1", "[1::8]:2"),
        (f"TCP6 {':'.join(['ffff'] * 8)} {':'.join(['FFFF'] * 8)} 65535 65535", "TCP6", *2 * [f"[{'ffff:' * 7}ffff]:65535"]),
        ("TCP6 ::ffff:192.0.2.1 ::ffff:c000:202 1 2", "TCP6", "[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:2"),
    ],
)  # fmt: skip
def test_v1(line: str, family: str, source: str, destination: str) -> None:
    data = f"PROXY {line}\r\n".encode()
    header = parse(data)
    assert (header.version, header.command, header.family, header.tlvs) == (1, "PROXY", family, ())
    assert (str(header.source), str(header.destination)) == (source, destination)
    assert size(data + b"payload\r\n") == len(data)


@pytest.mark.parametrize(
    "line",
    [
        b"UNKNOWN",
        b"UNKNOWN ",
        b"UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535",
        b"UNKNOWN \xff\x00\r \n\r\r",  # any bytes except CR LF
        b"UNKNOWN TCP4 1.2.3.4 5.6.7.8 1 2",
        b"UNKNOWN " + b"x" * 91,  # 107 with CR LF
    ],
)
def test_v1_unknown_ignores_the_rest(line: bytes) -> None:
    data = b"PROXY " + line + b"\r\n"
    assert parse(data) == Header(1, "PROXY", "UNKNOWN", None, None, ())
    assert size(data + b"\r\n") == len(data)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01",
        b"proxy TCP4 ",
        b" PROXY TCP4 ",
        b"PROXX",
        b"PROXY\t",
        b"PROXY\r\n",
        b"\r\nPROXY ",
    ],
)
def test_no_header(data: bytes) -> None:
    assert rejection(size, data).startswith("no PROXY header")
    assert rejection(parse, data).startswith("no PROXY header")


@pytest.mark.parametrize("family", ["X", " ", "TCP4\t", "TCP4\r\n", "TCP5", "UDP4 ", "tcp4", "UNKNOWNS", "UNKNOWN\n", "UNKNOWN\rX"])  # fmt: skip
def test_v1_with_an_invalid_family(family: str) -> None:
    assert "not followed by TCP4, TCP6 or UNKNOWN" in rejection(size, b"PROXY " + family.encode())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("TCP4 01.2.3.4 5.6.7.8 1 2", "the source is not an IPv4 address"),
        ("TCP4 1.2.3 5.6.7.8 1 2", "the source is not an IPv4 address"),
        ("TCP4 1.2.3.256 5.6.7.8 1 2", "the source is not an IPv4 address"),
        ("TCP4 1.2.3.4.5 5.6.7.8 1 2", "the source is not an IPv4 address"),
        ("TCP4 16909060 5.6.7.8 1 2", "the source is not an IPv4 address"),
        ("TCP4 ::1 ::1 1 2", "the source is not an IPv4 address"),
        ("TCP4 1.2.3.4 5.6.7.08 1 2", "the destination is not an IPv4 address"),
        ("TCP6 1.2.3.4 5.6.7.8 1 2", "the source is not an IPv6 address"),
        ("TCP6 ::1 1:2:3:4:5:6:7 1 2", "the destination is not an IPv6 address"),
        ("TCP6 ::1 1:2:3:4:5:6:7:8:9 1 2", "the destination is not an IPv6 address"),
        ("TCP6 ::1 1::2::3 1 2", "the destination is not an IPv6 address"),
        ("TCP6 ::1 12345:: 1 2", "the destination is not an IPv6 address"),
        ("TCP6 ::1 ::ffff:1.2.3.04 1 2", "the destination is not an IPv6 address"),
        ("TCP4 1.2.3.4 5.6.7.8 01 2", "the source port is not a number from 0 to 65535 without leading zeros"),
        ("TCP4 1.2.3.4 5.6.7.8 00 2", "the source port is not a number"),
        ("TCP4 1.2.3.4 5.6.7.8 65536 2", "the source port is not a number"),
        ("TCP4 1.2.3.4 5.6.7.8 1 99999999999999999999", "the destination port is not a number"),
        ("TCP4 1.2.3.4 5.6.7.8 1 a", "the destination port is not a number"),
        ("TCP4 1.2.3.4 5.6.7.8 1 ", "the destination port is not a number"),
        ("TCP4 1.2.3.4 5.6.7.8 1", "expected two addresses and two ports"),
        ("TCP4 1.2.3.4  5.6.7.8 1 2", "expected two addresses and two ports"),
        ("TCP4  1.2.3.4 5.6.7.8 1 2", "expected two addresses and two ports"),
        ("TCP4 1.2.3.4 5.6.7.8 1 2 ", "expected two addresses and two ports"),
        ("TCP4 1.2.3.4 5.6.7.8 1 2 3", "expected two addresses and two ports"),
        ("TCP4 ", "expected two addresses and two ports"),
    ],
)
def test_v1_with_invalid_fields(line: str, message: str) -> None:
    data = f"PROXY {line}\r\n".encode()
    assert size(data) == len(data)
    assert message in rejection(parse, data)


@pytest.mark.parametrize(
    ("begun", "then"),
    [
        (b"TCP4 1.2.3.4 5.6.7.8 1 2", b"\n"),
        (b"TCP4 1.2.3.4 5.6.7.8 1 2\r", b"G"),
        (b"TCP4 1.2.3.4 5.6.7.8 1 2\r", b"\r\n"),
        (b"TCP4 1.2.3.4", b"\t"),
        (b"TCP4 1.2.3.4 5.6.7.8 ", b"+1"),
        (b"TCP4 ", b"\xb2.2.3.4"),
        (b"TCP4 1.2.3.4 5.6.7.8 1 ", b"\0"),
        (b"TCP6 fe80::1", b"%e"),
    ],
)
def test_v1_is_rejected_before_it_ends(begun: bytes, then: bytes) -> None:
    assert size(b"PROXY " + begun) is None
    assert "a bare CR or LF" in rejection(size, b"PROXY " + begun + then)
    assert "a bare CR or LF" in rejection(size, b"PROXY " + begun + then + b"\r\n")


@pytest.mark.parametrize("start", [b"PROXY UNKNOWN ", b"PROXY TCP6 "])
def test_v1_has_107_bytes_at_most(start: bytes) -> None:
    assert size(start.ljust(105, b"1") + b"\r\n") == 107
    assert size(start.ljust(106, b"1")) is None
    assert size(start.ljust(105, b"1") + b"\r") is None
    assert "no CR LF in the first 107 bytes" in rejection(size, start.ljust(107, b"1"))
    assert "no CR LF in the first 107 bytes" in rejection(size, start.ljust(106, b"1") + b"\r\n")


# Version 2


@pytest.mark.parametrize(
    ("family", "name", "block", "source", "destination"),
    [
        (0x11, "TCP4", V4, V4_SOURCE, V4_DESTINATION),
        (0x12, "UDP4", V4, V4_SOURCE, V4_DESTINATION),
        (0x21, "TCP6", V6, V6_SOURCE, V6_DESTINATION),
        (0x22, "UDP6", V6, V6_SOURCE, V6_DESTINATION),
        (0x31, "UNIX", unix(b"/run/a", b"/run/b"), UnixAddress("/run/a"), UnixAddress("/run/b")),
        (0x32, "UNIX_DGRAM", unix(b"", b"\0name"), UnixAddress(""), UnixAddress("@name")),
    ],
)
def test_v2(family: int, name: str, block: bytes, source: object, destination: object) -> None:
    data = v2(0x21, family, block)
    assert size(data + b"payload") == len(data)
    header = parse(data)
    assert (header.version, header.command, header.family, header.tlvs) == (2, "PROXY", name, ())
    assert (header.source, header.destination) == (source, destination)

    # The bytes after the addresses are TLVs.
    assert parse(v2(0x21, family, block + tlv(0xE0, b"x") + tlv(0xE0))).tlvs == (Tlv(0xE0, b"x"), Tlv(0xE0, b""))

    message = rejection(size, v2(0x21, family, block[:-1]))
    assert f"{len(block) - 1} bytes, but {name} addresses take {len(block)}" in message
    assert f"0 bytes, but {name} addresses take" in rejection(size, v2(0x21, family))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"", ""),
        (b"/run/x", "/run/x"),
        (b"/" + b"x" * 107, "/" + "x" * 107),
        (b"/a\0/b", "/a"),  # a path ends at the first NUL
        (b"\0a", "@a"),
        (b"\0a\0b", "@a\\x00b"),
        (b"\0" + b"x" * 107, "@" + "x" * 107),
        (b"@a", "\\x40a"),
        (b"a@", "a@"),
        (b"\0@", "@@"),
        ("/ü\N{SNOWMAN}".encode(), "/ü\N{SNOWMAN}"),
        (b"/\xff\xfe", "/\\xff\\xfe"),
        (b"/\\xff", "/\\\\xff"),
        (b"/\n\x1b[31m", "/\\x0a\\x1b[31m"),
        ("/\N{RIGHT-TO-LEFT OVERRIDE}".encode(), "/\\xe2\\x80\\xae"),
        (b"/ ", "/ "),
    ],
)
def test_unix_paths_print_safely(name: bytes, text: str) -> None:
    header = parse(v2(0x21, 0x31, unix(name, b"/x")))
    assert header.source == UnixAddress(text)
    assert header.destination == UnixAddress("/x")
    assert str(header.source).isprintable()


@pytest.mark.parametrize("command", [0x00, 0x11, 0x22, 0x2F, 0x30, 0x31, 0xFF])
def test_v2_with_an_invalid_version_or_command(command: int) -> None:
    assert f"byte 13 is 0x{command:02x}" in rejection(size, SIGNATURE + bytes([command]))


@pytest.mark.parametrize("family", [0x03, 0x13, 0x1F, 0x40, 0x41, 0xF1])
def test_v2_with_an_invalid_family(family: int) -> None:
    assert f"byte 14 is 0x{family:02x}" in rejection(size, SIGNATURE + bytes([0x21, family]))


@pytest.mark.parametrize("at", range(12))
def test_v2_with_an_invalid_signature(at: int) -> None:
    assert "no PROXY header" in rejection(size, SIGNATURE[:at] + b"\x01")


@pytest.mark.parametrize("family", [0x00, 0x01, 0x02, 0x10, 0x20, 0x30])
def test_v2_with_an_unspecified_family(family: int) -> None:
    """Check that addresses of any length are ignored."""
    for block in (b"", b"\xff" * 5, b"\xff" * 500):
        assert parse(v2(0x21, family, block)) == Header(2, "PROXY", "UNKNOWN", None, None, ())


@pytest.mark.parametrize("family", [0x00, 0x11, 0x21, 0x31, 0x10, 0xFF, 0x44])
def test_v2_local(family: int) -> None:
    """Check that the family and the block are ignored, even if they are invalid."""
    for block in (b"", b"\xff", b"\xff" * 12, tlv(0x20), V4 + tlv(0x03, b"x")):
        assert parse(v2(0x20, family, block)) == Header(2, "LOCAL", "UNKNOWN", None, None, ())


def test_tlvs_are_parsed_if_addresses_are_ignored() -> None:
    assert parse(v2(0x20, 0x00, tlv(0x05, b"id"))).tlvs == (Tlv(0x05, b"id"),)
    assert parse(v2(0x20, 0x11, V4 + tlv(0x05, b"id"))).tlvs == (Tlv(0x05, b"id"),)
    assert parse(v2(0x21, 0x20, V6 + tlv(0x05, b"id"))).tlvs == (Tlv(0x05, b"id"),)
    assert parse(v2(0x21, 0x00, tlv(0x05, b"id"))).tlvs == (Tlv(0x05, b"id"),)
    for command in (0x20, 0x21):
        assert "does not match" in rejection(parse, v2(command, 0x00, tlv(0x03, b"wron")))


@pytest.mark.parametrize(
    ("tlvs", "message"),
    [
        (b"\x04", "the header ends after 1 of the 3 bytes of a TLV's type and length"),
        (b"\x04\x00", "the header ends after 2 of the 3 bytes"),
        (tlv(0x04, b"x") + b"\x04", "ends after 1 of the 3 bytes"),
        (tlv(0xE1, b"xy", 3), "a TLV of type 0xe1 has a length of 3 bytes, but the header has only 2 left"),
        (tlv(0xE1, b"", 0xFFFF), "a length of 65535 bytes, but the header has only 0 left"),
        (tlv(0x20), "the SSL TLV has 0 bytes, fewer than 5"),
        (tlv(0x20, b"\x01\0\0\0"), "the SSL TLV has 4 bytes, fewer than 5"),
        (tlv(0x20, b"\x01\0\0\0\0" + tlv(0x21, b"x", 2)), "a length of 2 bytes, but the SSL TLV has only 1 left"),
        (tlv(0x20, b"\x01\0\0\0\0\x21") + tlv(4), "the SSL TLV ends after 1 of the 3 bytes"),
        (tlv(0x03, b"123"), "the checksum has 3 bytes, not 4"),
        (tlv(0x03, b"12345"), "the checksum has 5 bytes, not 4"),
        (tlv(0x03, b"1234") * 2, "2 checksums, but a header may have only one"),
        (tlv(0x03, b"1234"), "the checksum does not match"),
        (tlv(0x05, b"x" * 129), "the unique ID has 129 bytes, more than 128"),
    ],
)
def test_invalid_tlvs(tlvs: bytes, message: str) -> None:
    data = v2(0x21, 0x11, V4 + tlvs)
    assert size(data) == len(data)
    assert message in rejection(parse, data)


def test_the_longest_header() -> None:
    data = v2(0x21, 0x11, V4 + tlv(0x04, b"x" * (0xFFFF - 12 - 3)))
    assert len(data) == 16 + 0xFFFF
    assert size(data) == len(data)
    assert parse(data).tlvs[0].type == 0x04


def test_parse_takes_exactly_one_header() -> None:
    data = v2(0x21, 0x11, V4)
    assert "29 bytes are not exactly one header of 28 bytes" in rejection(parse, data + b"x")
    assert "27 bytes are not exactly one header of 28 bytes" in rejection(parse, data[:-1])
    assert "15 bytes are not a whole header" in rejection(parse, data[:15])
    assert "0 bytes are not a whole header" in rejection(parse, b"")


# The checksum


@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        (b"123456789", 0xE3069283),  # the check value of CRC-32C
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"", 0),
    ],
)
def test_crc32c(data: bytes, checksum: int) -> None:
    assert proxy_protocol._crc32c(data) == checksum.to_bytes(4, "big")


@pytest.mark.parametrize("data", [HAPROXY_V2, HAPROXY_TLS, HAPROXY_CHECK])
def test_checksums_made_by_haproxy(data: bytes) -> None:
    parse(data)
    at = data.index(b"\x03\x00\x04") + 3
    for wrong in (bytes(4), data[at : at + 4][::-1]):
        assert "does not match" in rejection(parse, data[:at] + wrong + data[at + 4 :])


# Description


def test_describe_a_header_of_a_tls_proxy() -> None:
    described = describe(parse(HAPROXY_TLS))
    assert json.loads(json.dumps(described)) == described
    assert described == {
        "version": 2,
        "command": "PROXY",
        "family": "TCP4",
        "source": "127.0.0.1:57718",
        "destination": "127.0.0.1:19103",
        "tlvs": [
            {"type": "CRC32C", "hex": "8bfe32f6"},
            {"type": "ALPN", "text": "h2"},
            {"type": "AUTHORITY", "text": "www.example.org"},
            {"type": "UNIQUE_ID", "hex": b"7F000001:E176".hex()},
            {
                "type": "SSL",
                "client": ["SSL", "CERT_CONN", "CERT_SESS"],
                "verify": 0,
                "tlvs": [
                    {"type": "VERSION", "text": "TLSv1.3"},
                    {"type": "CN", "text": "client.example"},
                    {"type": "KEY_ALG", "text": "RSA2048"},
                    {"type": "SIG_ALG", "text": "RSA-SHA256"},
                    {"type": "CIPHER", "text": "TLS_AES_256_GCM_SHA384"},
                ],
            },
        ],
    }


@pytest.mark.parametrize(
    ("data", "family", "source"),
    [
        (HAPROXY_V1_MAPPED, "TCP6", "[::ffff:127.0.0.1]:44736"),
        (b"PROXY UNKNOWN\r\n", "UNKNOWN", None),
        (v2(0x21, 0x31, unix(b"\0n", b"")), "UNIX", "unix:@n"),
    ],
)
def test_describe_endpoints(data: bytes, family: str, source: str | None) -> None:
    described = describe(parse(data))
    assert (described["family"], described["source"]) == (family, source)
    assert described["tlvs"] == []


def test_describe_a_health_check() -> None:
    assert describe(parse(HAPROXY_CHECK)) == {
        "version": 2,
        "command": "LOCAL",
        "family": "UNKNOWN",
        "source": None,
        "destination": None,
        "tlvs": [{"type": "CRC32C", "hex": "a9b87e8f"}],
    }


@pytest.mark.parametrize(
    ("kind", "value", "described"),
    [
        (0x01, b"\x0a\x0a", {"type": "ALPN", "hex": "0a0a"}),  # GREASE
        (0x01, "ü".encode(), {"type": "ALPN", "hex": "c3bc"}),
        (0x02, "bücher.example".encode(), {"type": "AUTHORITY", "text": "bücher.example"}),
        (0x02, b"a\xff", {"type": "AUTHORITY", "hex": "61ff"}),
        (0x02, "\ufffd".encode(), {"type": "AUTHORITY", "text": "\ufffd"}),
        (0x02, b"a\nb", {"type": "AUTHORITY", "hex": "610a62"}),
        (0x02, b"", {"type": "AUTHORITY", "text": ""}),
        (0x04, b"\0\0", {"type": "NOOP", "hex": "0000"}),
        (0x05, b"abc", {"type": "UNIQUE_ID", "hex": "616263"}),
        (0x30, b"blue", {"type": "NETNS", "text": "blue"}),
        (0x30, b"\xe9", {"type": "NETNS", "hex": "e9"}),
        (0x21, b"TLSv1.3", {"type": 0x21, "hex": b"TLSv1.3".hex()}),  # a type that only the SSL TLV has
        (0xEA, b"\x01vpce", {"type": 234, "hex": "0176706365"}),
        (0x20, b"\0\0\0\0\x01", {"type": "SSL", "client": [], "verify": 1, "tlvs": []}),
        (
            0x20,
            b"\x89\xff\xff\xff\xff" + tlv(0x02, b"x") + tlv(0x26, b"x25519") + tlv(0x27, b"ed25519") + tlv(0x28, b"\x30"),
            {
                "type": "SSL",
                "client": ["SSL", "0x08", "0x80"],
                "verify": 0xFFFFFFFF,
                "tlvs": [
                    {"type": 2, "hex": "78"},
                    {"type": "GROUP", "text": "x25519"},
                    {"type": "SIG_SCHEME", "text": "ed25519"},
                    {"type": "CLIENT_CERT", "hex": "30"},
                ],
            },
        ),
    ],
)  # fmt: skip
def test_describe_tlvs(kind: int, value: bytes, described: dict[str, object]) -> None:
    assert describe(parse(v2(0x21, 0x11, V4 + tlv(kind, value))))["tlvs"] == [described]


# Building


def test_encode_v1() -> None:
    assert encode_v1(None, None) == b"PROXY UNKNOWN\r\n"
    assert encode_v1(V4_SOURCE, V4_DESTINATION) == b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n"
    zoned = TcpAddress("FE80:0::1%eth0", 1)
    assert encode_v1(zoned, TcpAddress("::ffff:192.0.2.1", 2)) == b"PROXY TCP6 fe80::1 ::ffff:192.0.2.1 1 2\r\n"


def test_encode_v2() -> None:
    assert encode_v2(None, None) == v2(0x20, 0x00)
    assert encode_v2(None, None, checksum=True) == HAPROXY_CHECK
    assert encode_v2(V4_SOURCE, V4_DESTINATION, [Tlv(4, b"x")]) == v2(0x21, 0x11, V4 + tlv(4, b"x"))
    assert encode_v2(V6_SOURCE, V6_DESTINATION) == v2(0x21, 0x21, V6)
    assert encode_v2(UnixAddress("@a"), UnixAddress("/\udcff")) == v2(0x21, 0x31, unix(b"\0a", b"/\xff"))
    assert encode_v2(UnixAddress(""), UnixAddress("/" + "x" * 107)) == v2(0x21, 0x31, unix(b"", b"/" + b"x" * 107))
    local = TcpAddress("127.0.0.1", 0xB4A6), TcpAddress("127.0.0.1", 0x4A9E)
    assert encode_v2(*local, [Tlv(5, b"7F000001:B4A6")], checksum=True) == HAPROXY_V2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: encode_v1(V4_SOURCE, V6_DESTINATION), "must be both IPv4, both IPv6, both unix or both None"),
        (lambda: encode_v1(V4_SOURCE, None), "must be both"),
        (lambda: encode_v1(None, V4_SOURCE), "must be both"),
        (lambda: encode_v1(TcpAddress("localhost", 1), V4_SOURCE), "'localhost' is not an IPv4 or IPv6 address"),
        (lambda: encode_v1(TcpAddress("", 1), V4_SOURCE), "'' is not an IPv4"),
        (lambda: encode_v1(TcpAddress("::1", 65536), V6_SOURCE), "65536 is not a port: use 0 to 65535"),
        (lambda: encode_v1(TcpAddress("::1", -1), V6_SOURCE), "-1 is not a port"),
        (lambda: encode_v2(V4_SOURCE, V6_DESTINATION), "must be both"),
        (lambda: encode_v2(V4_SOURCE, None), "must be both"),
        (lambda: encode_v2(None, UnixAddress("/x")), "must be both"),
        (lambda: encode_v2(UnixAddress("/x"), V4_SOURCE), "must be both"),
        (lambda: encode_v2(UnixAddress("/x\0y"), UnixAddress("")), r"'/x\\x00y' is not a socket path"),
        (lambda: encode_v2(UnixAddress("@\ud800"), UnixAddress("")), r"'@\\ud800' is not a socket path"),
        (lambda: encode_v2(UnixAddress("x" * 109), UnixAddress("")), "has 109 bytes, but a unix address in a header has at most 108"),
        (lambda: encode_v2(None, None, [Tlv(3, b"1234")], checksum=True), "cannot add a checksum: the TLVs contain one already"),
        (lambda: encode_v2(None, None, [Tlv(256, b"")]), "a type from 0 to 255 and at most 65535 bytes, not 256 and 0"),
        (lambda: encode_v2(None, None, [Tlv(-1, b"")]), "not -1 and 0"),
        (lambda: encode_v2(None, None, [Tlv(4, bytes(65536))]), "not 4 and 65536"),
        (lambda: encode_v2(V4_SOURCE, V4_SOURCE, [Tlv(4, bytes(65521))]), "take 65536 bytes, more than 65535"),
        (lambda: describe(Header(2, "LOCAL", "UNKNOWN", None, None, (Tlv(0x20, b""),))), "the SSL TLV has 0 bytes"),
    ],
)  # fmt: skip
def test_encode_invalid_values(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ProxyError, match=message):
        build()
