"""The errors of a probe, and how each is counted and described."""

from __future__ import annotations

import errno
import itertools
import socket
from typing import NamedTuple, Self

# A difference within these first bytes means that the answer may be of another protocol.
_GREETING = 12
# The bytes of a received text that are shown at most, and the fewest that count as a text.
_LONGEST_TEXT = 60
_SHORTEST_TEXT = 4

_PROXY_V2 = b"\r\n\r\n\0\r\nQUIT\n"


class TlsError(OSError):
    """The server does not use TLS, broke its protocol, or has a certificate that is not accepted."""


class IcmpError(OSError):
    """The network or the kernel reports that a datagram was not delivered.

    Args:
        number: the errno of the kernel.
        word: the word under which the error is counted, such as "port_unreachable".
        sender: the address of the host that sent the ICMP message, or nothing if there was none.

    """

    def __init__(self, number: int, word: str, sender: str = "") -> None:
        text = word.replace("_", " ")
        super().__init__(number, f"{text} (ICMP from {sender})" if sender else text)
        self.word = word


class EarlyEofError(Exception):
    """The server ended the connection before it had sent the whole echo."""


class Mismatch(NamedTuple):
    """The first wrong byte of an echo."""

    offset: int
    """Its offset in the data received on the connection."""
    expected: int | None
    """The byte sent, or None if the server sent more bytes than it had received."""
    got: int | None
    """The byte received, or None if a datagram ended before it."""

    @classmethod
    def find(cls, sent: bytes, received: bytes, offset: int = 0) -> Self:
        """Return the first difference. If one starts with the other, they differ in the byte after that.

        Args:
            sent: the expected data.
            received: data that differs from `sent`.
            offset: the offset of both in the connection.

        """
        pairs = itertools.zip_longest(sent, received)
        place, pair = next((place, pair) for place, pair in enumerate(pairs) if pair[0] != pair[1])
        return cls(offset + place, *pair)

    def __str__(self) -> str:
        """Describe the mismatch."""
        expected = "nothing, as no more had been sent" if self.expected is None else f"0x{self.expected:02x}"
        got = "the end of the datagram" if self.got is None else f"0x{self.got:02x}"
        return f"wrong echo at offset {self.offset}: expected {expected}, got {got}"


class WrongEchoError(Exception):
    """The server sent a byte that is not the echo.

    Args:
        mismatch: the first wrong byte.
        received: the data received on the connection so far, or its first bytes.

    """

    def __init__(self, mismatch: Mismatch, received: bytes) -> None:
        answer = identify(received) if mismatch.offset < _GREETING else ""
        super().__init__(f"wrong echo: the server {answer}" if answer else str(mismatch))
        self.mismatch = mismatch


def identify(received: bytes) -> str:
    """Describe the answer of a server that is not an echo server. Return an empty text if it is not recognised.

    Args:
        received: the first bytes of its answer.

    """
    if received.startswith(b"\x15\x03"):  # the alert record of TLS (RFC 8446, section 5.1)
        return "sent a TLS alert, so it uses TLS; add --tls"
    for start, option in ((b"PROXY ", "--proxy-v1"), (_PROXY_V2, "--proxy-v2")):
        if received.startswith(start):
            return f"sent the PROXY header back, so it does not use the PROXY protocol; remove {option}"
    line = next(iter(received.strip().splitlines()), b"")
    text = line.decode("ascii", "replace")
    if len(line) < _SHORTEST_TEXT or not (line.isascii() and text.isprintable()):
        return ""
    return f"sent {text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + '...'!r}"


ProbeError = OSError | EarlyEofError | WrongEchoError


_KINDS: dict[type[Exception], str] = {
    WrongEchoError: "wrong_echo",
    EarlyEofError: "early_eof",
    TlsError: "tls",
    TimeoutError: "timeout",
    ConnectionRefusedError: "refused",
    ConnectionResetError: "reset",
    BrokenPipeError: "reset",
    socket.gaierror: "name",
}


def kind(error: ProbeError) -> str:
    """Return the word under which an error is counted: one of echod's, or the name of the errno."""
    if isinstance(error, IcmpError):
        return error.word
    for category, word in _KINDS.items():
        if isinstance(error, category):
            return word
    return errno.errorcode.get(getattr(error, "errno", None) or 0, "other").lower()


def reason(error: ProbeError) -> str:
    """Describe an error to the user, followed by its notes."""
    match error:
        case TimeoutError(errno=int()):
            text = "timed out"
        case socket.gaierror():
            text = f"the name cannot be resolved ({error.strerror})"
        case OSError(strerror=str(text)):
            pass
        case _:
            text = str(error)
    return "; ".join([text, *getattr(error, "__notes__", ())])


def unreachable(error: OSError) -> str:
    """Describe the error of a connection that could not be opened."""
    return f"{'no TLS' if isinstance(error, TlsError) else 'no connection'}: {reason(error)}"


def ended(error: ProbeError) -> bool:
    """Tell whether the server ended the connection."""
    return isinstance(error, EarlyEofError | ConnectionError)
