"""The targets of a probe that are UDP ports."""

from __future__ import annotations

from typing import NamedTuple

from echod.net import addresses
from echod.net.addresses import TcpAddress

_PREFIX = "udp:"
_FORMS = "udp:HOST:PORT, udp:[V6]:PORT or udp::PORT"


class UdpAddress(NamedTuple):
    """A UDP port of a host. An empty host means localhost."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return the text that `parse_udp` reads back."""
        return f"{_PREFIX}{addresses.join_host_port(self.host, self.port)}"


def parse_udp(text: str) -> UdpAddress | None:
    """Read `udp:HOST:PORT`. Return None for a text without that prefix.

    Raises:
        AddressError: the text after the prefix is not a host and a port.

    """
    if not text.startswith(_PREFIX):
        return None
    rest = text.removeprefix(_PREFIX)
    if rest.isascii() and rest.isdecimal():
        rest = f":{rest}"
    try:
        address = addresses.parse(rest)
    except addresses.AddressError as error:
        reason = str(error).removeprefix(repr(rest)).replace(addresses.FORMS, _FORMS)
        msg = f"{text!r}{reason.replace('write [V6]', 'write udp:[V6]')}"
        raise addresses.AddressError(msg) from None
    if not isinstance(address, TcpAddress):
        msg = f"{text!r} is not a UDP port: write {_FORMS}"
        raise addresses.AddressError(msg)
    return UdpAddress(address.host, address.port)
