"""Run `echod probe` in tests, and create certificates for it."""

from __future__ import annotations

import json
import re
import socket
import ssl
from typing import TYPE_CHECKING, Any

import trustme

from harness import run

if TYPE_CHECKING:
    from pathlib import Path


CHECK = re.compile(r"\S+: 64 bytes came back right in [0-9.]+ ms \(connected in [0-9.]+ ms\)\n")


REFUSED = "127.0.0.1:1"  # no server listens on port 1

# The advice if a server ends the connection without an answer.
UNANSWERED = "if the server uses TLS, add --tls; if it expects a PROXY header, add --proxy-v2 SRC:PORT"


def measure(*arguments: str, code: int = 0) -> dict[str, Any]:
    """Run a probe with --json, and return its report."""
    result = run("probe", "--json", *arguments)
    assert result.returncode == code, result.stderr
    assert bool(result.stderr) == bool(code)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def check(target: str, *arguments: str, code: int) -> str:
    """Run a quick check that fails, and return its error without the target."""
    result = run("probe", target, *arguments)
    assert (result.returncode, result.stdout) == (code, "")
    start = f"echod: {target}: "
    assert result.stderr.startswith(start)
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix(start).rstrip("\n")


def narrow() -> socket.socket:
    """Return a listening socket with small buffers."""
    sock = socket.socket()
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 4096)
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


class Authority:
    """The files and contexts of an authority with a server's and a client's certificate."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca)
        server = authority.issue_cert("localhost", "127.0.0.1")
        client = authority.issue_cert("client@example.org")
        self.both = str(folder / "both.pem")
        client.private_key_and_cert_chain_pem.write_to_path(self.both)
        self.certificate, self.key = str(folder / "client.pem"), str(folder / "client.key")
        client.cert_chain_pems[0].write_to_path(self.certificate)
        client.private_key_pem.write_to_path(self.key)
        self.server = str(folder / "server.pem")
        server.private_key_and_cert_chain_pem.write_to_path(self.server)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.configure_cert(self.context)
        self.demanding = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.configure_cert(self.demanding)
        authority.configure_trust(self.demanding)
        self.demanding.verify_mode = ssl.CERT_REQUIRED
