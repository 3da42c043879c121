"""Load PEM data from memory. The ssl module loads private keys from files only."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator


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
