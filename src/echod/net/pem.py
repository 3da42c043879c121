"""Load PEM data from memory, and find its blocks. The ssl module loads private keys from files only."""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import sys
import tempfile
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# OpenSSL skips a UTF-8 byte order mark at the start of the data and after each block. Labels are short, so that a key
# without line endings cannot become one.
_BEGIN = re.compile(rb"(?:^|(?:\A|(?<=-----\n))\xef\xbb\xbf)(-----BEGIN ([^\r\n]{1,40}?)-----\s*?$)", re.MULTILINE)


class Block(NamedTuple):
    """A block of PEM data."""

    label: str
    """Such as CERTIFICATE or PRIVATE KEY."""
    line: int
    """Number of its first line."""
    data: bytes
    """From its first line to the next block, with LF as line ending."""

    def __str__(self) -> str:
        """Return the block's place in its file, for messages."""
        return f"the {self.label} on line {self.line}"

    @property
    def is_private_key(self) -> bool:
        """Whether the block is a private key of any kind, encrypted or not."""
        return self.label.endswith("PRIVATE KEY")

    @property
    def is_complete(self) -> bool:
        """Whether the block ends before the next one begins."""
        return f"-----END {self.label}-----".encode("latin-1") in self.data

    def problem(self) -> str | None:
        """Return the reason why OpenSSL cannot read the block, or None.

        Raises:
            OSError: no descriptor is left, or /proc is not mounted.

        """
        if not self.is_complete:
            return f"has no line '-----END {self.label}-----'"
        try:
            with named(self.data) as name:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(name)
        except ssl.SSLError as error:
            if error.reason != "NO_CERTIFICATE_OR_CRL_FOUND":
                return "cannot be decoded"
        return None


def blocks(data: bytes) -> Iterator[Block]:
    """Yield the blocks of PEM data, complete or not."""
    data = data.replace(b"\r\n", b"\n")
    found = list(_BEGIN.finditer(data))
    ends = [*(begin.start() for begin in found), len(data)][1:]
    line, position = 1, 0
    for begin, end in zip(found, ends, strict=True):
        line += data.count(b"\n", position, begin.start())
        position = begin.start()
        yield Block(begin[2].decode("latin-1"), line, data[begin.start(1) : end])


@contextlib.contextmanager
def named(data: bytes) -> Iterator[str]:
    """Yield a file name under which OpenSSL can open the data. Nothing is written to disk, as it may be a private key.

    Raises:
        OSError: no descriptor is left, or /proc is not mounted.

    """
    if sys.platform == "linux":
        file = os.fdopen(os.memfd_create("pem"), "w+b")
        folder = "/proc/self/fd"
    else:  # pragma: no cover (memfd_create is Linux's)
        file = tempfile.TemporaryFile()  # noqa: SIM115  (closed below)
        folder = "/dev/fd"
    with file:
        file.write(data)
        file.seek(0)  # also flushes; outside Linux, opening the name shares this position
        yield f"{folder}/{file.fileno()}"


def load_pair(context: ssl.SSLContext, certificate: bytes, private_key: bytes, password: Callable[[], str]) -> None:
    """Load a certificate chain and its private key.

    Raises:
        ssl.SSLError: they are not PEM, do not match, or are too weak for OpenSSL's security level.
        OSError: no descriptor is left, or /proc is not mounted.

    """
    with named(certificate) as chain, named(private_key) as key:
        context.load_cert_chain(chain, key, password)
