"""A daemon with faulty listeners, and clients that observe the faults."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from typing import TYPE_CHECKING, Any

import pytest

from harness import PATIENCE, Daemon

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from certificates import Certificates
    from harness import Event

KINDS = ("stream", "line", "tls", "unix")

_BRIEFLY = ("--limits.max-connections=50", "--shutdown.quiet-period=0.2", "--shutdown.drain-timeout=1")


class Lab:
    """A daemon with four listeners for each fault: in mode stream, in mode line, with TLS, and on a unix socket.

    Args:
        faults: the faults by name.
        plain: the names of the faults that need no listener with TLS and none on a unix socket.
        folder: the folder for the settings and the unix sockets.
        certificates: the certificates of the test run.
        loop: the event loop of the daemon.

    """

    def __init__(
        self,
        faults: Mapping[str, Mapping[str, Any]],
        plain: Mapping[str, object],
        folder: Path,
        certificates: Certificates,
        loop: str,
    ) -> None:
        self._folder = folder
        self._certificates = certificates
        self._connections: dict[str, int] = {}
        sections: list[str] = []
        for name, fault in faults.items():
            keys = (f"{key} = {json.dumps(value)}\n" for key, value in fault.items())
            sections.append(f"[faults.{name}]\n" + "".join(keys))
            for kind in KINDS:
                if kind in {"tls", "unix"} and name in plain:
                    continue
                if kind == "unix" and fault.get("action") == "reset":
                    continue
                sections.append(self._listener(name, kind))
        path = folder / "lab.toml"
        path.write_text("\n".join(sections))
        self.daemon = Daemon("--loop", loop, "--config", str(path), *_BRIEFLY, listen=None)

    def _listener(self, name: str, kind: str) -> str:
        address = f"unix:{self._folder}/{name}" if kind == "unix" else "127.0.0.1:0"
        lines = [f'[listeners."{name} {kind}"]', f'address = "{address}"', f'fault = "{name}"']
        if kind == "line":
            lines.append('mode = "line"')
        if kind == "tls":
            files = self._certificates
            lines.append(f'tls = {{certificate = "{files.certificate}", private_key = "{files.key}"}}')
        return "\n".join(lines)

    def connect(self, name: str, kind: str, **options: int) -> socket.socket:
        """Return a client of a fault."""
        self._connections[f"{name} {kind}"] = self._connections.get(f"{name} {kind}", 0) + 1
        if kind == "unix":
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(PATIENCE)
            sock.connect(f"{self._folder}/{name}")
            return sock
        sock = connect(self.daemon, f"{name} {kind}", **options)
        if kind != "tls":
            return sock
        return self._certificates.context().wrap_socket(sock, server_hostname="localhost")

    def entry(self, name: str, kind: str) -> Event:
        """Return the log line of the latest client of a fault, after checking that it names the fault."""
        count = self._connections[f"{name} {kind}"]
        line = self.daemon.wait_for("client_closed", listener=f"{name} {kind}", count=count)
        assert line["fault"] == name
        return line


def connect(daemon: Daemon, listener: str, **options: int) -> socket.socket:
    """Return a client of one of several listeners.

    Args:
        daemon: the daemon.
        listener: the listener's name.
        options: socket options that are set before the client connects.

    """
    port = int(daemon.wait_for("listening", listener=listener)["address"].rpartition(":")[2])
    sock = socket.socket()
    for option, value in options.items():
        sock.setsockopt(socket.SOL_SOCKET, getattr(socket, option), value)
    sock.settimeout(PATIENCE)
    try:
        sock.connect(("127.0.0.1", port))
    except OSError:
        sock.close()
        raise
    return sock


def drain(client: socket.socket) -> bytes:
    """Receive until EOF."""
    data = bytearray()
    while more := client.recv(65536):
        data += more
    return bytes(data)


def is_silent(daemon: Daemon, client: socket.socket) -> bool:
    """Tell whether an idle daemon has sent the client neither data nor EOF."""
    daemon.settle()
    client.setblocking(False)
    try:
        client.recv(1)
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    finally:
        client.settimeout(PATIENCE)
    return False


def send_until_stuck(daemon: Daemon, client: socket.socket, data: bytes) -> int:
    """Send until all buffers are full and the daemon is idle. Return the number of bytes sent."""
    sent, stuck = 0, False
    view = memoryview(data)
    client.setblocking(False)
    while sent < len(data):
        try:
            sent += client.send(view[sent : sent + 65536])
            stuck = False
        except (BlockingIOError, ssl.SSLWantWriteError):
            if stuck:
                break
            daemon.settle()
            stuck = True
    client.settimeout(PATIENCE)
    return sent


def see_reset(client: socket.socket) -> None:
    """Receive until the connection is reset, and check its state in the kernel."""
    if isinstance(client, ssl.SSLSocket):
        with contextlib.suppress(ConnectionResetError):  # the TLS of some Python versions reports EOF instead
            drain(client)
    else:
        with pytest.raises(ConnectionResetError):
            drain(client)
    closed = b"\7"
    assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == closed
