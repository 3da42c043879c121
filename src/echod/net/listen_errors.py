"""Explain why an address cannot be opened, and how to correct that."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import shlex
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from echod.net.addresses import TcpAddress, UdpAddress, UnixAddress, of_socket

if TYPE_CHECKING:
    from collections.abc import Iterable

    from echod.net.addresses import Address

UNPRIVILEGED_PORTS = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")

_CAPABILITY = (
    "ports below {} need CAP_NET_BIND_SERVICE: set AmbientCapabilities= as the unit in packaging/systemd does, or "
    "listen on port 8000 and map it, as in docker run -p {}"
)

_FOLDER = {
    errno.ENOENT: "create the folder {!r}",
    errno.ENOTDIR: "{!r} is not a folder",
    errno.EACCES: "the user of the daemon needs permission to read and write the folder {!r}",
}


def explain(error: OSError, address: Address, own: Iterable[tuple[str, socket.socket]]) -> str:
    """Return the reason for the failure and, if possible, what to do about it.

    Args:
        error: raised when the address was opened.
        address: as in the settings.
        own: the sockets of this process that listen already, each with a description.

    """
    reason = error.strerror or str(error)
    if isinstance(error, socket.gaierror):
        return f"the name cannot be resolved ({reason})"
    advice = _occupied(address, own) if error.errno == errno.EADDRINUSE else _advice(error, address)
    return f"{reason}: {advice}" if advice else reason


def _occupied(address: Address, own: Iterable[tuple[str, socket.socket]]) -> str:
    """Return what uses an address, or else the command that finds it. As root, it shows processes of other users too."""
    for name, sock in own:
        if _conflicts(address, sock):
            return f"{name} already uses it; choose another address"
    match address:
        case TcpAddress(port=0) | UdpAddress(port=0):  # no port is free in both families
            return ""
        case TcpAddress(port=port):
            return f"find the process with: ss -ltnp 'sport = :{port}'"
        case UdpAddress(port=port):
            return f"find the process with: ss -lunp 'sport = :{port}'"
        case _:
            return f"find the process with: ss -lxp src {shlex.quote(str(address).removeprefix('unix:'))}"


def _advice(error: OSError, address: Address) -> str:
    match address, error.errno:
        case TcpAddress(port=port) | UdpAddress(port=port), errno.EACCES if port < (
            lowest := _lowest_unprivileged_port()
        ):
            udp = "/udp" if isinstance(address, UdpAddress) else ""
            return _CAPABILITY.format(lowest, f"{port}:8000{udp}")
        case TcpAddress(port=port) | UdpAddress(port=port), errno.EADDRNOTAVAIL:
            wildcard = type(address)("", port)
            return f"this host does not have the address; `ip address` lists its own, and {wildcard} means all"
        case UnixAddress(path=path), number if number in _FOLDER:
            return _FOLDER[number].format(os.path.dirname(path) or ".")  # noqa: PTH120  (as it is written)
        case _:
            return ""


def _conflicts(address: Address, sock: socket.socket) -> bool:
    """Tell whether a socket can be the reason that an address is in use. A name may stand for any IP address."""
    match address, of_socket(sock):
        case (TcpAddress(host, port), TcpAddress(bound, bound_port)) | (
            UdpAddress(host, port),
            UdpAddress(bound, bound_port),
        ):
            return port == bound_port and _overlap(host, bound)
        case UnixAddress(path), UnixAddress(bound):
            with contextlib.suppress(OSError):  # abstract names have no file
                return path == bound or Path(path).samefile(bound)
    return False


def _overlap(host: str, bound: str) -> bool:
    try:
        one, other = ipaddress.ip_address(host or bound), ipaddress.ip_address(bound)
    except ValueError:
        return True
    return one.version == other.version and (one == other or one.is_unspecified or other.is_unspecified)


def _lowest_unprivileged_port() -> int:
    try:
        return int(UNPRIVILEGED_PORTS.read_text())
    except OSError:  # not Linux
        return 1024
