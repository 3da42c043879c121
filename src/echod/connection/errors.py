"""Errors of connected sockets: which of them the network caused, and their text in the log."""

from __future__ import annotations

import errno

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


def is_from_network(error: OSError) -> bool:
    """Return whether the network or the peer caused this error."""
    return isinstance(error, ConnectionError) or error.errno in _NETWORK_ERRORS


def describe(call: str, error: OSError) -> str:
    """Return the failed system call and the name of its error."""
    return f"{call}: {errno.errorcode.get(error.errno or 0, str(error))}"
