"""Take over the listening sockets that the service manager passes to the process (sd_listen_fds(3))."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from echod.net.addresses import AddressError, InheritedAddress, parse
from echod.net.listeners import ListenError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# SD_LISTEN_FDS_START of sd_listen_fds(3).
_FIRST_DESCRIPTOR = 3

# More problems than these are counted in one line.
_LISTED_PROBLEMS = 3


def inherit() -> dict[str, list[socket.socket]]:
    """Return the inherited sockets by name, as sd_listen_fds_with_names(3) does.

    The variables LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES are removed, because they apply to this process only.

    Raises:
        ListenError: a descriptor is neither a listening stream socket nor a UDP socket, or the variables contradict each
            other.

    """
    pid, count, names = (os.environ.pop(f"LISTEN_{name}", None) for name in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or count is None:
        return {}
    if not (count.isascii() and count.isdecimal() and len(count) <= 5):
        raise ListenError([f"LISTEN_FDS should be a number, not {count!r}"])
    labels = names.split(":") if names is not None else ["unknown"] * int(count)
    if len(labels) != int(count):
        raise ListenError([f"LISTEN_FDNAMES has {len(labels)} names for {count} sockets: {names}"])
    sockets: dict[str, list[socket.socket]] = {}
    problems: list[str] = []
    for descriptor, label in enumerate(labels, _FIRST_DESCRIPTOR):
        try:
            sockets.setdefault(label, []).append(_take_over(descriptor, label))
        except ListenError as error:
            problems += error.problems
    if len(problems) > _LISTED_PROBLEMS:
        first = "; ".join(problems[:_LISTED_PROBLEMS])
        problems = [f"LISTEN_FDS is {count}, and {len(problems)} of these descriptors cannot be used, first: {first}"]
    if problems:
        raise ListenError(problems)
    return sockets


def inherited_addresses(inherited: Mapping[str, Sequence[socket.socket]]) -> list[InheritedAddress]:
    """Return the addresses that name inherited sockets. A name of stream and datagram sockets has two."""
    return [
        InheritedAddress(name, datagram)
        for name, sockets in inherited.items()
        for datagram in sorted({sock.type == socket.SOCK_DGRAM for sock in sockets})
    ]


def _take_over(descriptor: int, label: str) -> socket.socket:
    """Return one inherited socket.

    Raises:
        ListenError: it is neither a listening stream socket nor a UDP socket, or its name is invalid.

    """
    place = f"inherited descriptor {descriptor}"
    try:
        parse(f"systemd:{label}")
    except AddressError:
        text = f"{place}: {label!r} is not a name: use printable ASCII characters except the colon"
        raise ListenError([text]) from None
    try:
        os.set_inheritable(descriptor, False)  # noqa: FBT003  (its parameter is positional)
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ListenError([f"{place}, {label!r}: {error.strerror}"]) from error
    if sock.type == socket.SOCK_DGRAM and sock.family in {socket.AF_INET, socket.AF_INET6}:
        return sock
    if sock.type != socket.SOCK_STREAM:
        kind = f"{sock.family.name} socket of type {sock.type.name}"
        raise ListenError([f"{place}, {label!r}, is an {kind}: use a stream socket or a UDP socket"])
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ListenError([f"{place}, {label!r}, does not listen"])
    return sock
