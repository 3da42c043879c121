"""UDP clients of a daemon."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from harness import PATIENCE

if TYPE_CHECKING:
    from harness import Daemon, Event

# Settings without a limit of the rate.
UNLIMITED = ("--limits.datagram-rate", "0")

# Settings for a stop that does not wait.
AT_ONCE = ("--shutdown.quiet-period", "0", "--shutdown.drain-timeout", "0")


def udp_address(daemon: Daemon, count: int = 1, **fields: object) -> tuple[str, int]:
    """Return the address of the `count`th listening socket, which is one of UDP."""
    address = daemon.wait_for("listening", count=count, **fields)["address"]
    assert address.startswith("udp:")
    host, _, port = address.removeprefix("udp:").rpartition(":")
    return host.strip("[]"), int(port)


def client(address: tuple[str, int], source: str = "") -> socket.socket:
    """Return a socket that receives from this address only, and blocks."""
    sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
    if source:
        sock.bind((source, 0))
    sock.connect(address)
    return sock


def ask(sock: socket.socket, data: bytes) -> bytes:
    """Send a datagram, and return the answer."""
    sock.send(data)
    return sock.recv(65536)


def name(sock: socket.socket) -> str:
    """Return the name of a client in the log."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def flow(daemon: Daemon, sock: socket.socket, **fields: Any) -> Event:
    """Wait for the line of a client's flow, and check its sums."""
    line = daemon.wait_for("flow_closed", peer=name(sock), **fields)
    assert line["received_datagrams"] == line["sent_datagrams"] + line["dropped"]
    return line
