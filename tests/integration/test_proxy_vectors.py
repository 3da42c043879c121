"""PROXY headers from the tests of other implementations have the same outcome here, or differ for a stated reason."""

from __future__ import annotations

import json
import socket
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proxy_headers import SIGNATURE

if TYPE_CHECKING:
    from harness import Daemon, Start

FOREIGN = tomllib.loads((Path(__file__).parents[1] / "foreign" / "proxy_vectors.toml").read_text())


def decode(text: str) -> bytes:
    """Return the bytes of a vector."""
    if not text.startswith("v2"):
        return text.encode()
    runs = (token.partition("x") for token in text.split()[1:])
    return SIGNATURE + b"".join(bytes.fromhex(run) * int(times or 1) for run, _, times in runs)


def outcome(daemon: Daemon, data: bytes) -> str:
    """Send a header to a listener in mode info, and return the address that it found, "none" or "rejected"."""
    with daemon.connect() as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        answer = client.makefile("rb").read()
    if not answer:
        return "rejected"
    header: dict[str, Any] = json.loads(answer)["proxy"]
    return header["source"] or "none"


@pytest.mark.parametrize("implementation", FOREIGN)
def test_headers_of_other_implementations(start: Start, implementation: str) -> None:
    vectors = FOREIGN[implementation]["vectors"]
    daemon = start(
        *("--listeners.echo.address", "127.0.0.1:0", "--listeners.echo.mode", "info", "--log.connections", "all"),
        *("--listeners.echo.proxy-protocol", "require", "--listeners.echo.proxy-trusted", "127.0.0.1"),
        listen=None,
    )
    found = {name: outcome(daemon, decode(text)) for name, text, *_ in vectors}
    assert found == {name: (here or [there])[0] for name, _, there, *here in vectors}
    daemon.wait_for("client_closed", count=len(vectors))
    reasons = [line["reason"] for line in daemon.all("client_closed")]
    assert reasons == ["proxy_header" if end == "rejected" else "info" for end in found.values()]
    assert daemon.loud() == []
