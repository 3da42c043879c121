"""The errors of a probe, and how each is counted and described."""

from __future__ import annotations

import errno
import socket
from typing import NamedTuple, Self


class TlsError(OSError):
    """The peer broke the TLS protocol, or its certificate is not accepted. The message is OpenSSL's reason."""


class TlsFileError(ValueError):
    """A certificate, key or CA file cannot be used.

    Args:
        option: the option that names the file, such as "--ca".
        message: the problem with the file.

    """

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class EarlyEofError(Exception):
    """The server ended the connection before it had sent the whole echo."""


class Mismatch(NamedTuple):
    """The first wrong byte of an echo."""

    offset: int
    """Its offset in the data received on the connection."""
    expected: int | None
    """The byte sent, or None if the server sent more bytes than it had received."""
    got: int

    @classmethod
    def find(cls, sent: bytes, received: bytes, offset: int = 0) -> Self:
        """Return the first difference. Received data that starts with `sent` differs in the byte after it.

        Args:
            sent: the expected data.
            received: data that differs from `sent` or is longer.
            offset: the offset of both in the connection.

        """
        place = next((i for i, pair in enumerate(zip(sent, received, strict=False)) if pair[0] != pair[1]), len(sent))
        return cls(offset + place, sent[place] if place < len(sent) else None, received[place])

    def __str__(self) -> str:
        """Describe the mismatch."""
        expected = "nothing, as no more had been sent" if self.expected is None else f"0x{self.expected:02x}"
        return f"wrong echo at offset {self.offset}: expected {expected}, got 0x{self.got:02x}"


class WrongEchoError(Exception):
    """The server sent a byte that is not the echo."""

    def __init__(self, mismatch: Mismatch) -> None:
        super().__init__(str(mismatch))
        self.mismatch = mismatch


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
    for category, word in _KINDS.items():
        if isinstance(error, category):
            return word
    return errno.errorcode.get(getattr(error, "errno", None) or 0, "other").lower()


def reason(error: ProbeError) -> str:
    """Describe an error to the user."""
    match error:
        case TimeoutError(errno=int()):
            return "timed out"
        case socket.gaierror():
            return f"the name cannot be resolved ({error.strerror})"
        case OSError(strerror=str(text)):
            return text
        case _:
            return str(error)
