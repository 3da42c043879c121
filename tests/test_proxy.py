"""PROXY protocol headers: each rule of the specification by hand-made bytes, then properties over all of them."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from echod import proxy
from echod.addresses import TcpAddress, UnixAddress
from echod.proxy import Header, ProxyError, Tlv, describe, encode_v1, encode_v2, parse, size

if TYPE_CHECKING:
    from collections.abc import Callable

    Address = TcpAddress | UnixAddress | None

# The same examples each time, so that a red run is red again; and a slow machine is no failure.
settings.register_profile(
    "echod", derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck)
)
settings.load_profile("echod")

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
V4 = bytes.fromhex("c0000201 c6336402 dc04 01bb")  # 192.0.2.1:56324 to 198.51.100.2:443
V4_SOURCE, V4_DESTINATION = TcpAddress("192.0.2.1", 56324), TcpAddress("198.51.100.2", 443)
V6 = bytes.fromhex("20010db8000000000000000000000001 20010db8000000000000000000000002 dc04 01bb")
V6_SOURCE, V6_DESTINATION = TcpAddress("2001:db8::1", 56324), TcpAddress("2001:db8::2", 443)

# What HAProxy 2.6 sends, as received from it.
HAPROXY_V1_MAPPED = b"PROXY TCP6 ::ffff:127.0.0.1 ::ffff:127.0.0.1 44736 19101\r\n"
HAPROXY_V2 = bytes.fromhex(
    "0d0a0d0a000d0a515549540a 21 11 0023 7f000001 7f000001 b4a6 4a9e030004 2949ceb1 05000d 37463030303030313a42344136"
)
HAPROXY_TLS = bytes.fromhex(
    "0d0a0d0a000d0a515549540a 21 11 008d 7f000001 7f000001 e176 4a9f"
    "030004 8bfe32f6 010002 6832 02000f 7777772e6578616d706c652e6f7267 05000d 37463030303030313a45313736"
    "200050 07 00000000 210007 544c5376312e33 22000e 636c69656e742e6578616d706c65 250007 52534132303438"
    "24000a 5253412d534841323536 230016 544c535f4145535f3235365f47434d5f534841333834"
)
HAPROXY_CHECK = bytes.fromhex("0d0a0d0a000d0a515549540a 20 00 0007 030004 a9b87e8f")


def v2(command: int, family: int, block: bytes = b"", length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(block) if length is None else length) + block


def tlv(kind: int, value: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("!BH", kind, len(value) if length is None else length) + value


def unix(source: bytes, destination: bytes) -> bytes:
    return source.ljust(108, b"\0") + destination.ljust(108, b"\0")


def refusal(read: Callable[[bytes], object], data: bytes) -> str:
    with pytest.raises(ProxyError) as caught:
        read(data)
    message = str(caught.value)
    assert message.isprintable()
    return message


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
        b"UNKNOWN \xff\x00\r \n\r\r",  # anything but CR LF
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
def test_what_begins_no_header(data: bytes) -> None:
    assert refusal(size, data).startswith("no PROXY header")
    assert refusal(parse, data).startswith("no PROXY header")


@pytest.mark.parametrize("family", ["X", " ", "TCP4\t", "TCP4\r\n", "TCP5", "UDP4 ", "tcp4", "UNKNOWNS", "UNKNOWN\n", "UNKNOWN\rX"])  # fmt: skip
def test_v1_of_no_family(family: str) -> None:
    assert "not followed by TCP4, TCP6 or UNKNOWN" in refusal(size, b"PROXY " + family.encode())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("TCP4 01.2.3.4 5.6.7.8 1 2", "the source is no IPv4 address"),
        ("TCP4 1.2.3 5.6.7.8 1 2", "the source is no IPv4 address"),
        ("TCP4 1.2.3.256 5.6.7.8 1 2", "the source is no IPv4 address"),
        ("TCP4 1.2.3.4.5 5.6.7.8 1 2", "the source is no IPv4 address"),
        ("TCP4 16909060 5.6.7.8 1 2", "the source is no IPv4 address"),
        ("TCP4 ::1 ::1 1 2", "the source is no IPv4 address"),
        ("TCP4 1.2.3.4 5.6.7.08 1 2", "the destination is no IPv4 address"),
        ("TCP6 1.2.3.4 5.6.7.8 1 2", "the source is no IPv6 address"),
        ("TCP6 ::1 1:2:3:4:5:6:7 1 2", "the destination is no IPv6 address"),
        ("TCP6 ::1 1:2:3:4:5:6:7:8:9 1 2", "the destination is no IPv6 address"),
        ("TCP6 ::1 1::2::3 1 2", "the destination is no IPv6 address"),
        ("TCP6 ::1 12345:: 1 2", "the destination is no IPv6 address"),
        ("TCP6 ::1 ::ffff:1.2.3.04 1 2", "the destination is no IPv6 address"),
        ("TCP4 1.2.3.4 5.6.7.8 01 2", "the source port is no number from 0 to 65535 without leading zeros"),
        ("TCP4 1.2.3.4 5.6.7.8 00 2", "the source port is no number"),
        ("TCP4 1.2.3.4 5.6.7.8 65536 2", "the source port is no number"),
        ("TCP4 1.2.3.4 5.6.7.8 1 99999999999999999999", "the destination port is no number"),
        ("TCP4 1.2.3.4 5.6.7.8 1 a", "the destination port is no number"),
        ("TCP4 1.2.3.4 5.6.7.8 1 ", "the destination port is no number"),
        ("TCP4 1.2.3.4 5.6.7.8 1", "not two addresses and two ports"),
        ("TCP4 1.2.3.4  5.6.7.8 1 2", "not two addresses and two ports"),
        ("TCP4  1.2.3.4 5.6.7.8 1 2", "not two addresses and two ports"),
        ("TCP4 1.2.3.4 5.6.7.8 1 2 ", "not two addresses and two ports"),
        ("TCP4 1.2.3.4 5.6.7.8 1 2 3", "not two addresses and two ports"),
        ("TCP4 ", "not two addresses and two ports"),
    ],
)
def test_v1_wrong_in_itself(line: str, message: str) -> None:
    data = f"PROXY {line}\r\n".encode()
    assert size(data) == len(data)
    assert message in refusal(parse, data)


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
def test_v1_is_refused_before_its_end(begun: bytes, then: bytes) -> None:
    assert size(b"PROXY " + begun) is None
    assert "CR or LF alone" in refusal(size, b"PROXY " + begun + then)
    assert "CR or LF alone" in refusal(size, b"PROXY " + begun + then + b"\r\n")


@pytest.mark.parametrize("start", [b"PROXY UNKNOWN ", b"PROXY TCP6 "])
def test_v1_has_107_bytes_at_most(start: bytes) -> None:
    assert size(start.ljust(105, b"1") + b"\r\n") == 107
    assert size(start.ljust(106, b"1")) is None
    assert size(start.ljust(105, b"1") + b"\r") is None
    assert "no CR LF in the first 107 bytes" in refusal(size, start.ljust(107, b"1"))
    assert "no CR LF in the first 107 bytes" in refusal(size, start.ljust(106, b"1") + b"\r\n")


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

    # What is beyond the addresses is TLVs.
    assert parse(v2(0x21, family, block + tlv(0xE0, b"x") + tlv(0xE0))).tlvs == (Tlv(0xE0, b"x"), Tlv(0xE0, b""))

    message = refusal(size, v2(0x21, family, block[:-1]))
    assert f"{len(block) - 1} bytes, but addresses of {name} take {len(block)}" in message
    assert f"0 bytes, but addresses of {name} take" in refusal(size, v2(0x21, family))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"", ""),
        (b"/run/x", "/run/x"),
        (b"/" + b"x" * 107, "/" + "x" * 107),
        (b"/a\0/b", "/a"),  # a path ends at its NUL
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
def test_v2_of_another_version_or_command(command: int) -> None:
    assert f"byte 13 is 0x{command:02x}" in refusal(size, SIGNATURE + bytes([command]))


@pytest.mark.parametrize("family", [0x03, 0x13, 0x1F, 0x40, 0x41, 0xF1])
def test_v2_of_no_family(family: int) -> None:
    assert f"byte 14 is 0x{family:02x}" in refusal(size, SIGNATURE + bytes([0x21, family]))


@pytest.mark.parametrize("at", range(12))
def test_v2_with_another_signature(at: int) -> None:
    assert "no PROXY header" in refusal(size, SIGNATURE[:at] + b"\x01")


@pytest.mark.parametrize("family", [0x00, 0x01, 0x02, 0x10, 0x20, 0x30])
def test_v2_of_an_unspecified_family(family: int) -> None:
    """The addresses are to be ignored, however long they are."""
    for block in (b"", b"\xff" * 5, b"\xff" * 500):
        assert parse(v2(0x21, family, block)) == Header(2, "PROXY", "UNKNOWN", None, None, ())


@pytest.mark.parametrize("family", [0x00, 0x11, 0x21, 0x31, 0x10, 0xFF, 0x44])
def test_v2_local(family: int) -> None:
    """The family and the block are to be discarded, even wrong ones."""
    for block in (b"", b"\xff", b"\xff" * 12, tlv(0x20), V4 + tlv(0x03, b"x")):
        assert parse(v2(0x20, family, block)) == Header(2, "LOCAL", "UNKNOWN", None, None, ())


def test_tlvs_where_addresses_are_ignored() -> None:
    assert parse(v2(0x20, 0x00, tlv(0x05, b"id"))).tlvs == (Tlv(0x05, b"id"),)
    assert parse(v2(0x20, 0x11, V4 + tlv(0x05, b"id"))).tlvs == (Tlv(0x05, b"id"),)
    assert parse(v2(0x21, 0x20, V6 + tlv(0x05, b"id"))).tlvs == (Tlv(0x05, b"id"),)
    assert parse(v2(0x21, 0x00, tlv(0x05, b"id"))).tlvs == (Tlv(0x05, b"id"),)
    for command in (0x20, 0x21):
        assert "does not match" in refusal(parse, v2(command, 0x00, tlv(0x03, b"wron")))


@pytest.mark.parametrize(
    ("tlvs", "message"),
    [
        (b"\x04", "1 bytes are left at the end of the header, and a TLV takes 3"),
        (b"\x04\x00", "2 bytes are left at the end of the header"),
        (tlv(0x04, b"x") + b"\x04", "1 bytes are left"),
        (tlv(0xE1, b"xy", 3), "a TLV of type 0xe1 has a length of 3 bytes, but the header only 2 more"),
        (tlv(0xE1, b"", 0xFFFF), "a length of 65535 bytes, but the header only 0 more"),
        (tlv(0x20), "the SSL TLV has 0 bytes, less than 5"),
        (tlv(0x20, b"\x01\0\0\0"), "the SSL TLV has 4 bytes, less than 5"),
        (tlv(0x20, b"\x01\0\0\0\0" + tlv(0x21, b"x", 2)), "a length of 2 bytes, but the SSL TLV only 1 more"),
        (tlv(0x20, b"\x01\0\0\0\0\x21") + tlv(4), "1 bytes are left at the end of the SSL TLV"),
        (tlv(0x03, b"123"), "the checksum has 3 bytes, not 4"),
        (tlv(0x03, b"12345"), "the checksum has 5 bytes, not 4"),
        (tlv(0x03, b"1234") * 2, "2 checksums, where one can hold"),
        (tlv(0x03, b"1234"), "the checksum does not match"),
        (tlv(0x05, b"x" * 129), "the unique ID has 129 bytes, more than 128"),
    ],
)
def test_tlvs_that_are_wrong(tlvs: bytes, message: str) -> None:
    data = v2(0x21, 0x11, V4 + tlvs)
    assert size(data) == len(data)
    assert message in refusal(parse, data)


def test_the_longest_header() -> None:
    data = v2(0x21, 0x11, V4 + tlv(0x04, b"x" * (0xFFFF - 12 - 3)))
    assert len(data) == 16 + 0xFFFF
    assert size(data) == len(data)
    assert parse(data).tlvs[0].type == 0x04


def test_parse_takes_exactly_one_header() -> None:
    data = v2(0x21, 0x11, V4)
    assert "29 bytes are not exactly one header, which has 28" in refusal(parse, data + b"x")
    assert "27 bytes are not exactly one header, which has 28" in refusal(parse, data[:-1])
    assert "15 bytes are not exactly one header, which has more" in refusal(parse, data[:15])
    assert "0 bytes are not exactly one header, which has more" in refusal(parse, b"")


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
    assert proxy._crc32c(data) == checksum.to_bytes(4, "big")


@pytest.mark.parametrize("data", [HAPROXY_V2, HAPROXY_TLS, HAPROXY_CHECK])
def test_a_checksum_of_another_sender(data: bytes) -> None:
    parse(data)
    at = data.index(b"\x03\x00\x04") + 3
    for wrong in (bytes(4), data[at : at + 4][::-1]):
        assert "does not match" in refusal(parse, data[:at] + wrong + data[at + 4 :])


# Description


def test_describe_what_a_tls_proxy_sends() -> None:
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
        (0x21, b"TLSv1.3", {"type": 0x21, "hex": b"TLSv1.3".hex()}),  # of SSL alone
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
        (lambda: encode_v1(V4_SOURCE, V6_DESTINATION), "not both IPv4, both IPv6, both unix or both None"),
        (lambda: encode_v1(V4_SOURCE, None), "not both"),
        (lambda: encode_v1(None, V4_SOURCE), "not both"),
        (lambda: encode_v1(TcpAddress("localhost", 1), V4_SOURCE), "'localhost' is no IPv4 or IPv6 address"),
        (lambda: encode_v1(TcpAddress("", 1), V4_SOURCE), "'' is no IPv4"),
        (lambda: encode_v1(TcpAddress("::1", 65536), V6_SOURCE), "65536 is no port"),
        (lambda: encode_v1(TcpAddress("::1", -1), V6_SOURCE), "-1 is no port"),
        (lambda: encode_v2(V4_SOURCE, V6_DESTINATION), "not both"),
        (lambda: encode_v2(V4_SOURCE, None), "not both"),
        (lambda: encode_v2(None, UnixAddress("/x")), "not both"),
        (lambda: encode_v2(UnixAddress("/x"), V4_SOURCE), "not both"),
        (lambda: encode_v2(UnixAddress("/x\0y"), UnixAddress("")), r"'/x\\x00y' is no path"),
        (lambda: encode_v2(UnixAddress("@\ud800"), UnixAddress("")), r"'@\\ud800' is no path"),
        (lambda: encode_v2(UnixAddress("x" * 109), UnixAddress("")), "has 109 bytes, and a header's unix address 108"),
        (lambda: encode_v2(None, None, [Tlv(3, b"1234")], checksum=True), "a checksum is to be added, and one is there"),
        (lambda: encode_v2(None, None, [Tlv(256, b"")]), "a type from 0 to 255 and up to 65535 bytes, not 256 and 0"),
        (lambda: encode_v2(None, None, [Tlv(-1, b"")]), "not -1 and 0"),
        (lambda: encode_v2(None, None, [Tlv(4, bytes(65536))]), "not 4 and 65536"),
        (lambda: encode_v2(V4_SOURCE, V4_SOURCE, [Tlv(4, bytes(65521))]), "have 65536 bytes, more than 65535"),
        (lambda: describe(Header(2, "LOCAL", "UNKNOWN", None, None, (Tlv(0x20, b""),))), "the SSL TLV has 0 bytes"),
    ],
)  # fmt: skip
def test_values_that_make_no_header(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ProxyError, match=message):
        build()


# Properties

PORTS = st.integers(0, 65535)
V4_ADDRESSES = st.builds(TcpAddress, st.ip_addresses(v=4).map(str), PORTS)
V6_ADDRESSES = st.builds(TcpAddress, st.binary(min_size=16, max_size=16).map(proxy._text), PORTS)
UNIX_ADDRESSES = st.builds(
    lambda first, rest: UnixAddress(first and first + rest),
    st.sampled_from(["", "/", "@"]),
    st.text("ab/.@ -äö\N{SNOWMAN}", min_size=1, max_size=30),
)
PAIRS = st.tuples(V4_ADDRESSES, V4_ADDRESSES) | st.tuples(V6_ADDRESSES, V6_ADDRESSES)
V2_PAIRS = PAIRS | st.tuples(UNIX_ADDRESSES, UNIX_ADDRESSES) | st.just((None, None))


def tlv_lists(kinds: st.SearchStrategy[int], *more: st.SearchStrategy[Tlv]) -> st.SearchStrategy[list[Tlv]]:
    return st.lists(st.one_of(st.builds(Tlv, kinds, st.binary(max_size=20)), *more), max_size=4)


SSL = st.builds(
    lambda front, inner: Tlv(0x20, front + b"".join(tlv(*each) for each in inner)),
    st.binary(min_size=5, max_size=5),
    tlv_lists(st.integers(0, 255)),
)
TLVS = tlv_lists(st.integers(0, 255).filter(lambda kind: kind not in {0x03, 0x20}), SSL)
V1_HEADERS = (
    PAIRS.map(lambda pair: encode_v1(*pair))
    | st.binary(max_size=91).filter(lambda rest: b"\r\n" not in rest).map(lambda rest: b"PROXY UNKNOWN " + rest + b"\r\n")
    | st.just(b"PROXY UNKNOWN\r\n")
)  # fmt: skip
V2_HEADERS = st.builds(
    lambda pair, tlvs, checksum: encode_v2(pair[0], pair[1], tlvs, checksum=checksum), V2_PAIRS, TLVS, st.booleans()
)
RECEIVED = st.sampled_from([HAPROXY_V1_MAPPED, HAPROXY_V2, HAPROXY_TLS, HAPROXY_CHECK])
HEADERS = V1_HEADERS | V2_HEADERS | RECEIVED
# Bytes that get further than others do: by a true beginning, and by lengths that are small.
NEARLY = st.one_of(
    st.binary(max_size=300),
    st.builds(bytes.__add__, st.sampled_from([SIGNATURE, b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 "]), st.binary(max_size=300)),
    st.builds(v2, st.sampled_from([0x20, 0x21]), st.sampled_from([*range(0x34)]), st.binary(max_size=300)),
    st.builds(lambda fields: f"PROXY TCP{' '.join(fields)}\r\n".encode(), st.lists(st.text("0123456789abcf:. 46%", max_size=12))),
)  # fmt: skip


def outcome(data: bytes) -> Header | None:
    """Return what the bytes are read as, or None for a refusal; anything else raised fails the test."""
    try:
        whole = size(data)
        header = parse(data)
    except ProxyError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 150  # noqa: PT018  (it is any of them)
        return None
    assert whole == len(data)
    described = describe(header)
    assert json.loads(json.dumps(described)) == described
    for address in (header.source, header.destination):
        assert str(address).isprintable()
    assert (header.source is None) == (header.destination is None) == (header.family == "UNKNOWN")
    return header


@given(PAIRS)
def test_round_trip_v1(pair: tuple[TcpAddress, TcpAddress]) -> None:
    data = encode_v1(*pair)
    header = parse(data)
    assert (header.family, header.source, header.destination) == ("TCP6" if ":" in pair[0].host else "TCP4", *pair)
    assert len(data) <= 107


@given(V2_PAIRS, TLVS, st.booleans())
def test_round_trip_v2(pair: tuple[Address, Address], tlvs: list[Tlv], checksum: bool) -> None:
    header = parse(encode_v2(*pair, tlvs, checksum=checksum))
    assert (header.source, header.destination) == pair
    assert header.command == ("LOCAL" if pair[0] is None else "PROXY")
    assert header.tlvs[checksum:] == tuple(tlvs)
    assert [kind for kind, _ in header.tlvs].count(0x03) == checksum
    assert encode_v2(*pair, header.tlvs) == encode_v2(*pair, tlvs, checksum=checksum)


@given(HEADERS, st.binary(max_size=40))
@example(b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n", b"\r\n")
@example(b"PROXY UNKNOWN \r\r\n", b"")
def test_size_at_any_split(data: bytes, after: bytes) -> None:
    told = [size(data[:end]) for end in range(len(data) + 1)]
    assert told[-1] == len(data)
    first = told.index(len(data))
    assert told == [None] * first + [len(data)] * (len(told) - first)
    assert first == (16 if data.startswith(SIGNATURE) else len(data))
    assert size(data + after) == len(data)


@given(NEARLY)
def test_what_is_refused_stays_refused(data: bytes) -> None:
    """And what is known to be the size stays so, however many bytes more there are."""
    known: int | None = None
    for end in range(len(data) + 1):
        try:
            told = size(data[:end])
        except ProxyError:
            for more in (data, data + b"\r\n"):
                refusal(size, more)
            assert known is None
            return
        assert known in {None, told}
        known = told


@given(NEARLY | HEADERS)
def test_any_bytes(data: bytes) -> None:
    outcome(data)


@given(HEADERS, st.data())
def test_a_corrupted_byte(data: bytes, choose: st.DataObject) -> None:
    at = choose.draw(st.integers(0, len(data) - 1))
    outcome(data[:at] + bytes([data[at] ^ choose.draw(st.integers(1, 255))]) + data[at + 1 :])


def flips(data: bytes) -> list[tuple[int, bytes]]:
    """Return each header with one bit other than in `data`, and which byte that bit is in."""
    number = int.from_bytes(data, "big")
    size_bits = len(data) * 8
    return [(bit // 8, (number ^ 1 << size_bits - 1 - bit).to_bytes(len(data), "big")) for bit in range(size_bits)]


@settings(max_examples=15)
@given(V2_PAIRS, tlv_lists(st.integers(0x04, 0x1F)))
def test_a_flipped_bit_is_refused_by_the_checksum(pair: tuple[Address, Address], tlvs: list[Tlv]) -> None:
    """But for one that makes the checksum itself disappear; and the endpoints are true even then."""
    data = encode_v2(*pair, tlvs, checksum=True)
    addresses = len(encode_v2(*pair)) - 16
    for at, flipped in flips(data):
        header = outcome(flipped)
        if header is not None:
            assert 0x03 not in [tlv.type for tlv in header.tlvs]
            assert header.family == "UNKNOWN" or (header.source, header.destination) == pair
            # Of the family, whose addresses have another length then, and of the type of the checksum's TLV. LOCAL is
            # to be accepted with any block, one that is no TLVs too.
            assert at in {13, 16 + addresses} or (pair == (None, None) and header.tlvs == ())
