"""The state of a connection, as the status page, the timeouts and the drain read it."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Phase(IntEnum):
    """The phases of a connection, in their order. A connection may skip some of them."""

    CONNECTING = 0
    """Accepted; the loop has not made a transport yet."""
    PROXY_HEADER = 1
    HANDSHAKE = 2
    OPEN = 3
    FLUSHING = 4
    """Closing: the session reads nothing more, writes the rest of the echo and then sends FIN."""
    LINGERING = 5
    """Closing, after our FIN: input is discarded until the client has all of its echo."""
    CLOSED = 6
    """Closed or reset. The transport may still have to report it."""


class Delivery(NamedTuple):
    """How much of one client's echo arrived, in bytes. Over TLS these are plaintext, except for `discarded`."""

    received: int
    """Read from the client, to be echoed."""
    sent: int
    """Taken by the kernel for sending."""
    acked: int
    """Acknowledged by the client's kernel."""
    discarded: int
    """Read after our FIN, and not echoed."""


class TlsFacts(NamedTuple):
    """The result of a TLS handshake."""

    version: str
    cipher: str
    server_name: str | None
    """The name that the client asked for (SNI, RFC 6066)."""
    subject: str | None
    """The subject of the client's certificate in RFC 4514 form, or an alternative name if the subject is empty.

    None if the server asked for no certificate.
    """
