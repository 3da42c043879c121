"""Errors of connected sockets: which of them the network caused, and their text in the log."""

from __future__ import annotations

import errno
import ssl

# These errors report a reset, a timeout or an ICMP message (tcp(7), ip(7)). All other errors report this host.
_NETWORK_ERRORS = frozenset(
    {
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.EPIPE,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EMSGSIZE,
        errno.EACCES,
    }
)


def is_defect(error: Exception) -> bool:
    """Return whether an error is neither a failed system call nor a lack of memory."""
    # OpenSSL's errors are OSErrors too. Here they are defects, as TlsLayer handles those of the client.
    return not isinstance(error, OSError | MemoryError) or isinstance(error, ssl.SSLError)


def is_from_network(error: Exception) -> bool:
    """Return whether the network or the peer caused this error."""
    return isinstance(error, ConnectionError) or (isinstance(error, OSError) and error.errno in _NETWORK_ERRORS)


def describe(call: str, error: Exception) -> str:
    """Return the failed system call and the name of its error."""
    if not isinstance(error, OSError):
        return "out of memory"
    return f"{call}: {errno.errorcode.get(error.errno or 0, str(error))}"
