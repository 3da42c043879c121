"""Parse and build PROXY protocol headers, versions 1 and 2, without I/O.

A receiver reads until `size` returns the header's length and passes exactly that many bytes to `parse`. Any bytes after
the header are payload. Both functions raise only `ProxyError`, whatever the input.

Sources: the PROXY protocol specification (haproxy.org, doc/proxy-protocol.txt) and CRC32c (RFC 9260, appendix A).
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import TYPE_CHECKING, Literal, NamedTuple

from echod.net.addresses import HIGHEST_PORT, TcpAddress, UnixAddress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Family = Literal["TCP4", "TCP6", "UDP4", "UDP6", "UNIX", "UNIX_DGRAM", "UNKNOWN"]

_V1_START = b"PROXY "
_V1_LONGEST = 107  # including CR LF
_V1_FAMILIES = (b"TCP4 ", b"TCP6 ", b"UNKNOWN ", b"UNKNOWN\r\n")
_V1_CHARACTERS = b"0123456789abcdefABCDEF:. "  # allowed in addresses and ports

_V2_START = b"\r\n\r\n\0\r\nQUIT\n"
_V2_REST = struct.Struct("!BBH")  # version and command, family and transport, length of the rest
_V2_FIXED = len(_V2_START) + _V2_REST.size
_V2_LONGEST_BLOCK = 0xFFFF
_LOCAL = 0x20
_PROXY = 0x21

_V2_FAMILIES: dict[int, Family] = {
    0x11: "TCP4",
    0x12: "UDP4",
    0x21: "TCP6",
    0x22: "UDP6",
    0x31: "UNIX",
    0x32: "UNIX_DGRAM",
}
_INET = struct.Struct("!4s4sHH")
_INET6 = struct.Struct("!16s16sHH")
_UNIX = struct.Struct("!108s108s")
_UNIX_LONGEST = 108
_ADDRESSES = {1: _INET, 2: _INET6, 3: _UNIX}  # keyed by the four bits of the address family
_UNSPECIFIED = struct.Struct("")

_TLV = struct.Struct("!BH")
_SSL = struct.Struct("!BI")
_CRC32C = struct.Struct("!I")
_TYPE_CRC32C = 0x03
_TYPE_UNIQUE_ID = 0x05
_TYPE_SSL = 0x20
_LONGEST_UNIQUE_ID = 128

# Each type's name, and its encoding if the value is text. ALPN values are bytes, but all registered ones are ASCII.
_TYPES: dict[int, tuple[str, str | None]] = {
    0x01: ("ALPN", "ascii"),
    0x02: ("AUTHORITY", "utf-8"),
    _TYPE_CRC32C: ("CRC32C", None),
    0x04: ("NOOP", None),
    _TYPE_UNIQUE_ID: ("UNIQUE_ID", None),
    0x30: ("NETNS", "ascii"),
}
_SSL_TYPES: dict[int, tuple[str, str | None]] = {
    0x21: ("VERSION", "ascii"),
    0x22: ("CN", "utf-8"),
    0x23: ("CIPHER", "ascii"),
    0x24: ("SIG_ALG", "ascii"),
    0x25: ("KEY_ALG", "ascii"),
    0x26: ("GROUP", "ascii"),
    0x27: ("SIG_SCHEME", "ascii"),
    0x28: ("CLIENT_CERT", None),
}
_SSL_CLIENT = {0x01: "SSL", 0x02: "CERT_CONN", 0x04: "CERT_SESS"}

_MISMATCH = "source and destination must be both IPv4, both IPv6, both unix or both None"


class ProxyError(ValueError):
    """Raised if bytes are not a PROXY header, or if values cannot form one. The message is one printable line."""


class Tlv(NamedTuple):
    """One type-length-value vector of version 2."""

    type: int
    value: bytes


class Header(NamedTuple):
    """The contents of a PROXY header, which describes the connection that it precedes."""

    version: int
    """1 or 2."""
    command: Literal["PROXY", "LOCAL"]
    """LOCAL if the proxy itself opened the connection, for example for a health check. Version 1 has only PROXY."""
    family: Family
    """UNKNOWN for LOCAL as well."""
    source: TcpAddress | UnixAddress | None
    """The client's address. For UNKNOWN and LOCAL, source and destination are None: use the connection's own endpoints."""
    destination: TcpAddress | UnixAddress | None
    """The address that the client connected to."""
    tlvs: tuple[Tlv, ...]
    """In header order. If the addresses must be ignored and the rest is not valid TLVs, this is empty."""


def size(data: bytes) -> int | None:
    """Return the total length of the header at the start of `data`, or None if more bytes are needed.

    Raises:
        ProxyError: no header starts with these bytes.

    """
    if _V2_START.startswith(data[: len(_V2_START)]):
        return _size_v2(data)
    if _V1_START.startswith(data[: len(_V1_START)]):
        return _size_v1(data)
    msg = "no PROXY header: the first bytes are neither 'PROXY ' nor the signature of version 2"
    raise ProxyError(msg)


def _size_v1(data: bytes) -> int | None:
    rest = data[len(_V1_START) :]
    if not any(word.startswith(rest[: len(word)]) for word in _V1_FAMILIES):
        msg = "version 1: 'PROXY ' is not followed by TCP4, TCP6 or UNKNOWN, and one space"
        raise ProxyError(msg)
    end = data.find(b"\r\n", 0, _V1_LONGEST)
    if rest.startswith(b"TCP"):  # after UNKNOWN, everything up to CR LF must be ignored
        line = data[:end] if end >= 0 else data[:_V1_LONGEST].removesuffix(b"\r")
        if line[len(_V1_START + _V1_FAMILIES[0]) :].translate(None, _V1_CHARACTERS):
            msg = "version 1: the line has a bare CR or LF, or a character that no address or port contains"
            raise ProxyError(msg)
    if end >= 0:
        return end + 2
    if len(data) >= _V1_LONGEST:
        msg = f"version 1: no CR LF in the first {_V1_LONGEST} bytes"
        raise ProxyError(msg)
    return None


def _size_v2(data: bytes) -> int | None:
    # Check each byte as soon as it arrives, so that a peer that sends something else is rejected at once.
    if len(data) > 12 and data[12] not in {_LOCAL, _PROXY}:
        msg = f"version 2: byte 13 is 0x{data[12]:02x}, neither 0x20 (LOCAL) nor 0x21 (PROXY)"
        raise ProxyError(msg)
    proxied = len(data) > 13 and data[12] == _PROXY  # for LOCAL, even an invalid family must be ignored
    if proxied and (data[13] >> 4 > 3 or data[13] & 0xF > 2):
        msg = f"version 2: byte 14 is 0x{data[13]:02x}, but the family must be 0 to 3 and the transport 0 to 2"
        raise ProxyError(msg)
    if len(data) < _V2_FIXED:
        return None
    length = int.from_bytes(data[14:16], "big")
    if proxied and data[13] in _V2_FAMILIES and length < _addresses(data[13]).size:
        least = _addresses(data[13]).size
        msg = f"version 2: the length is {length} bytes, but {_V2_FAMILIES[data[13]]} addresses take {least}"
        raise ProxyError(msg)
    return _V2_FIXED + length


def _addresses(family: int) -> struct.Struct:
    return _ADDRESSES.get(family >> 4, _UNSPECIFIED)


def parse(data: bytes) -> Header:
    """Parse exactly one header. Its length must be the one that `size` returns.

    A checksum is verified if present. A transmission error that changes the type of its TLV therefore goes undetected.

    Raises:
        ProxyError: the bytes are not a header, or are shorter or longer than one.

    """
    whole = size(data)
    if whole != len(data):
        expected = "a whole header" if whole is None else f"exactly one header of {whole} bytes"
        msg = f"{len(data)} bytes are not {expected}"
        raise ProxyError(msg)
    return _parse_v2(data) if data.startswith(_V2_START) else _parse_v1(data)


def _parse_v1(data: bytes) -> Header:
    if data.startswith(b"UNKNOWN", len(_V1_START)):
        return Header(1, "PROXY", "UNKNOWN", None, None, ())
    fields = data[:-2].decode("ascii").split(" ")
    if len(fields) != 6:
        msg = "version 1: expected two addresses and two ports, separated by single spaces"
        raise ProxyError(msg)
    _, family, source, destination, source_port, destination_port = fields
    return Header(
        1,
        "PROXY",
        "TCP4" if family == "TCP4" else "TCP6",
        TcpAddress(_host(source, family, "source"), _port(source_port, "source")),
        TcpAddress(_host(destination, family, "destination"), _port(destination_port, "destination")),
        (),
    )


def _host(text: str, family: str, which: str) -> str:
    # The specification does not allow a dotted quad at the end of an IPv6 address. But inet_ntop writes one for an IPv4
    # client of a dual-stack socket, and proxies send it.
    try:
        address = ipaddress.IPv4Address(text) if family == "TCP4" else ipaddress.IPv6Address(text)
    except ipaddress.AddressValueError:
        msg = f"version 1: the {which} is not an IPv{family[3]} address in canonical form"
        raise ProxyError(msg) from None
    return _text(address.packed)


def _text(packed: bytes) -> str:
    # The ipaddress module formats mapped IPv4 addresses differently between versions of Python. inet_ntop also gives the
    # same text as the peer address of a direct connection.
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def _port(text: str, which: str) -> int:
    leading_zero = text.startswith("0") and text != "0"
    if not text.isdecimal() or leading_zero or int(text) > HIGHEST_PORT:
        msg = f"version 1: the {which} port is not a number from 0 to {HIGHEST_PORT} without leading zeros"
        raise ProxyError(msg)
    return int(text)


def _parse_v2(data: bytes) -> Header:
    command, family, _ = _V2_REST.unpack_from(data, len(_V2_START))
    layout = _addresses(family)
    start = _V2_FIXED + layout.size
    name = _V2_FAMILIES.get(family, "UNKNOWN") if command == _PROXY else "UNKNOWN"
    try:
        tlvs = _split(data[start:], "the header")
        _check(tlvs)
    except ProxyError:
        if name != "UNKNOWN":
            raise
        tlvs = ()  # the block must be ignored, so it may contain anything
    _verify(data[:start], tlvs)
    if name == "UNKNOWN":
        return Header(2, "LOCAL" if command == _LOCAL else "PROXY", name, None, None, tlvs)
    source: TcpAddress | UnixAddress
    destination: TcpAddress | UnixAddress
    if layout is _UNIX:
        source, destination = map(_unix, layout.unpack_from(data, _V2_FIXED))
    else:
        source_host, destination_host, source_port, destination_port = layout.unpack_from(data, _V2_FIXED)
        source = TcpAddress(_text(source_host), source_port)
        destination = TcpAddress(_text(destination_host), destination_port)
    return Header(2, "PROXY", name, source, destination, tlvs)


def _unix(padded: bytes) -> UnixAddress:
    """Return a path, "@" and an abstract name, or the empty path of an unnamed socket.

    Unprintable characters, backslashes and a leading "@" of a path are escaped, so that different addresses have
    different texts. The one exception is trailing NULs of an abstract name, which look like the field's padding.
    """
    name = padded.rstrip(b"\0")
    if name.startswith(b"\0"):
        return UnixAddress("@" + _printable(name[1:]))
    path = _printable(name.partition(b"\0")[0])
    return UnixAddress(path.replace("@", "\\x40", 1) if path.startswith("@") else path)


def _printable(name: bytes) -> str:
    text = name.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return "".join(
        char if char.isprintable() else "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8")) for char in text
    )


def _split(block: bytes, where: str) -> tuple[Tlv, ...]:
    tlvs = []
    position = 0
    while position < len(block):
        left = len(block) - position - _TLV.size
        if left < 0:
            present = left + _TLV.size
            msg = f"version 2: {where} ends after {present} of the {_TLV.size} bytes of a TLV's type and length"
            raise ProxyError(msg)
        kind, length = _TLV.unpack_from(block, position)
        if length > left:
            msg = f"version 2: a TLV of type 0x{kind:02x} has a length of {length} bytes, but {where} has only {left} left"
            raise ProxyError(msg)
        position += _TLV.size
        tlvs.append(Tlv(kind, block[position : position + length]))
        position += length
    return tuple(tlvs)


def _check(tlvs: Sequence[Tlv]) -> None:
    """Raise `ProxyError` if a value breaks the rules of its type."""
    checksums = [tlv.value for tlv in tlvs if tlv.type == _TYPE_CRC32C]
    if len(checksums) > 1:
        msg = f"version 2: {len(checksums)} checksums, but a header may have only one"
        raise ProxyError(msg)
    for tlv in tlvs:
        if tlv.type == _TYPE_CRC32C and len(tlv.value) != _CRC32C.size:
            msg = f"version 2: the checksum has {len(tlv.value)} bytes, not {_CRC32C.size}"
            raise ProxyError(msg)
        if tlv.type == _TYPE_UNIQUE_ID and len(tlv.value) > _LONGEST_UNIQUE_ID:
            msg = f"version 2: the unique ID has {len(tlv.value)} bytes, more than {_LONGEST_UNIQUE_ID}"
            raise ProxyError(msg)
        if tlv.type == _TYPE_SSL:
            _split_ssl(tlv.value)


def _split_ssl(value: bytes) -> tuple[int, int, tuple[Tlv, ...]]:
    if len(value) < _SSL.size:
        msg = f"version 2: the SSL TLV has {len(value)} bytes, fewer than {_SSL.size}"
        raise ProxyError(msg)
    client, verify = _SSL.unpack_from(value)
    return client, verify, _split(value[_SSL.size :], "the SSL TLV")


def _verify(front: bytes, tlvs: Sequence[Tlv]) -> None:
    checksums = [tlv.value for tlv in tlvs if tlv.type == _TYPE_CRC32C]
    if checksums:
        zeroed = (tlv._replace(value=bytes(_CRC32C.size)) if tlv.type == _TYPE_CRC32C else tlv for tlv in tlvs)
        if checksums != [_crc32c(front + b"".join(map(_join, zeroed)))]:
            msg = "version 2: the checksum does not match"
            raise ProxyError(msg)


def _make_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)  # the Castagnoli polynomial, bit-reversed
        table.append(crc)
    return tuple(table)


_TABLE = _make_table()


def _crc32c(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return _CRC32C.pack(crc ^ 0xFFFFFFFF)


def describe(header: Header) -> dict[str, object]:
    """Return the header as values that can be written as JSON.

    A TLV is `{"type": NAME, "text": ...}` if its type is textual and its value is printable text. Otherwise it is
    `{"type": NAME, "hex": ...}`. An unknown type has its number instead of a name. The TLV of type SSL has
    `client` with the names of the set bits, `verify`, and `tlvs`. `verify` is 0 if the client's certificate was verified.

    Raises:
        ProxyError: the header was not made by `parse`, and its SSL TLV is malformed.

    """
    return {
        "version": header.version,
        "command": header.command,
        "family": header.family,
        "source": None if header.source is None else str(header.source),
        "destination": None if header.destination is None else str(header.destination),
        "tlvs": [
            _describe_ssl(tlv.value) if tlv.type == _TYPE_SSL else _describe_tlv(tlv, _TYPES) for tlv in header.tlvs
        ],
    }


def _describe_ssl(value: bytes) -> dict[str, object]:
    client, verify, tlvs = _split_ssl(value)
    bits = [_SSL_CLIENT.get(1 << bit, f"0x{1 << bit:02x}") for bit in range(8) if client & 1 << bit]
    return {"type": "SSL", "client": bits, "verify": verify, "tlvs": [_describe_tlv(tlv, _SSL_TYPES) for tlv in tlvs]}


def _describe_tlv(tlv: Tlv, types: Mapping[int, tuple[str, str | None]]) -> dict[str, object]:
    name, encoding = types.get(tlv.type, (tlv.type, None))
    if encoding is not None:
        text = tlv.value.decode(encoding, "replace")
        if text.isprintable() and text.encode(encoding, "replace") == tlv.value:
            return {"type": name, "text": text}
    return {"type": name, "hex": tlv.value.hex()}


def encode_v1(source: TcpAddress | None, destination: TcpAddress | None) -> bytes:
    """Return a version 1 header. If both addresses are None, its family is UNKNOWN.

    Both hosts must be IPv4 addresses, or both IPv6 addresses. A zone is dropped, as it names an interface of this
    machine.

    Raises:
        ProxyError: the values cannot form a header.

    """
    if source is None and destination is None:
        return b"PROXY UNKNOWN\r\n"
    if source is None or destination is None:
        raise ProxyError(_MISMATCH)
    hosts = _packed(source), _packed(destination)
    family = "TCP4" if _layout(*hosts) is _INET else "TCP6"
    first, second = map(_text, hosts)
    return f"PROXY {family} {first} {second} {source.port} {destination.port}\r\n".encode("ascii")


def encode_v2(
    source: TcpAddress | UnixAddress | None,
    destination: TcpAddress | UnixAddress | None,
    tlvs: Sequence[Tlv] = (),
    *,
    checksum: bool = False,
) -> bytes:
    """Return a version 2 header for a stream. If both addresses are None, its command is LOCAL.

    The rules for hosts are those of `encode_v1`. The checksum's TLV precedes the others. The contents of TLVs are not
    validated.

    Raises:
        ProxyError: the values cannot form a header.

    """
    command = _PROXY
    match source, destination:
        case None, None:
            command, family, addresses = _LOCAL, 0x00, b""
        case TcpAddress(), TcpAddress():
            hosts = _packed(source), _packed(destination)
            layout = _layout(*hosts)
            family = 0x11 if layout is _INET else 0x21
            addresses = layout.pack(*hosts, source.port, destination.port)
        case UnixAddress(), UnixAddress():
            family, addresses = 0x31, _UNIX.pack(_unix_name(source), _unix_name(destination))
        case _:
            raise ProxyError(_MISMATCH)
    if checksum:
        if any(tlv.type == _TYPE_CRC32C for tlv in tlvs):
            msg = "cannot add a checksum: the TLVs contain one already"
            raise ProxyError(msg)
        tlvs = [Tlv(_TYPE_CRC32C, bytes(_CRC32C.size)), *tlvs]
    block = addresses + b"".join(map(_join, tlvs))
    if len(block) > _V2_LONGEST_BLOCK:
        msg = f"addresses and TLVs take {len(block)} bytes, more than {_V2_LONGEST_BLOCK}"
        raise ProxyError(msg)
    header = _V2_START + _V2_REST.pack(command, family, len(block)) + block
    if checksum:
        start = _V2_FIXED + len(addresses) + _TLV.size
        header = header[:start] + _crc32c(header) + header[start + _CRC32C.size :]
    return header


def _packed(address: TcpAddress) -> bytes:
    if not 0 <= address.port <= HIGHEST_PORT:
        msg = f"{address.port} is not a port: use 0 to {HIGHEST_PORT}"
        raise ProxyError(msg)
    try:
        return ipaddress.ip_address(address.host).packed  # drops the zone
    except ValueError:
        msg = f"{address.host!r} is not an IPv4 or IPv6 address"
        raise ProxyError(msg) from None


def _layout(source: bytes, destination: bytes) -> struct.Struct:
    if len(source) != len(destination):
        raise ProxyError(_MISMATCH)
    return _INET if len(source) == 4 else _INET6


def _unix_name(address: UnixAddress) -> bytes:
    abstract = address.path.startswith("@")
    try:
        name = address.path.encode("utf-8", "surrogateescape")  # as system calls expect a path
    except UnicodeEncodeError:
        name = None
    if name is None or (not abstract and 0 in name):
        msg = f"{address.path!r} is not a socket path"
        raise ProxyError(msg)
    if len(name) > _UNIX_LONGEST:
        msg = f"{address.path!r} has {len(name)} bytes, but a unix address in a header has at most {_UNIX_LONGEST}"
        raise ProxyError(msg)
    return b"\0" + name[1:] if abstract else name


def _join(tlv: Tlv) -> bytes:
    if not 0 <= tlv.type <= 0xFF or len(tlv.value) > _V2_LONGEST_BLOCK:
        msg = (
            f"a TLV has a type from 0 to 255 and at most {_V2_LONGEST_BLOCK} bytes, not {tlv.type} and {len(tlv.value)}"
        )
        raise ProxyError(msg)
    return _TLV.pack(tlv.type, len(tlv.value)) + tlv.value
