"""PROXY headers captured from HAProxy, and helpers to build others by hand."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from echod.net.proxy_protocol import ProxyError

if TYPE_CHECKING:
    from collections.abc import Callable

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")

# Captured from HAProxy 2.6.
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


def rejection(read: Callable[[bytes], object], data: bytes) -> str:
    with pytest.raises(ProxyError) as caught:
        read(data)
    message = str(caught.value)
    assert message.isprintable()
    return message
