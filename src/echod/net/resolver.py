"""Host names to socket addresses, by a lookup that can be given up.

getaddrinfo(3) has no timeout and does not return for a signal. It runs in a daemon thread, so neither the caller nor the
exit of the process has to wait for a name server that does not answer.
"""

from __future__ import annotations

import errno
import math
import socket
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Found = Sequence[tuple[int, int, int, str, Any]]


def resolve(
    host: str,
    port: int,
    *,
    family: int = socket.AF_UNSPEC,
    flags: int = 0,
    timeout: float = math.inf,
    stopped: Callable[[], bool] = lambda: False,
) -> Found:
    """Return the addresses of a host for a stream socket, as `socket.getaddrinfo` does.

    Args:
        host: a name or an IP address. If it is empty: the loopback addresses, or with AI_PASSIVE the wildcards.
        port: of the addresses.
        family: of the addresses.
        flags: AI_PASSIVE, for instance.
        timeout: seconds.
        stopped: called every 100 ms; True ends the wait.

    Raises:
        OSError: the name cannot be resolved, or not within the timeout (`socket.gaierror`).
        InterruptedError: `stopped` returned True.

    """
    name = (host.encode() if host.isascii() else host) or None  # getaddrinfo() would encode text by IDNA, a slow import

    def look_up(how: int) -> Found:
        return socket.getaddrinfo(name, port, family, socket.SOCK_STREAM, flags=how)

    try:
        return look_up(flags | socket.AI_NUMERICHOST)  # an IP address needs no name server, hence no thread
    except socket.gaierror as error:
        if error.errno != socket.EAI_NONAME:
            raise
    from echod import threads  # noqa: PLC0415  (an IP address does not need it)

    try:
        return threads.wait(lambda: look_up(flags), "resolver", stopped, timeout=timeout)
    except TimeoutError as error:
        raise socket.gaierror(socket.EAI_AGAIN, "timed out") from error
    except threads.ThreadError as error:
        msg = f"the name cannot be resolved: {error}"
        raise OSError(errno.EAGAIN, msg) from error
