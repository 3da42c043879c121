"""Errors of a connection: their cause, and their text in the log."""

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
    """Return whether the error is a defect of this program, instead of a failed system call."""
    # OpenSSL's errors are OSErrors too. Here they are defects, as TlsLayer handles those of the client.
    return not isinstance(error, OSError) or isinstance(error, ssl.SSLError)


def is_from_network(error: OSError) -> bool:
    """Return whether the network or the peer caused this error."""
    return isinstance(error, ConnectionError) or error.errno in _NETWORK_ERRORS


def describe(call: str, error: OSError) -> str:
    """Return the failed system call and the name of its error."""
    return f"{call}: {errno.errorcode.get(error.errno or 0, str(error))}"
