"""Query the admin listener, and parse its metrics."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from admin_thread import AdminThread
from harness import PATIENCE

if TYPE_CHECKING:
    from harness import Daemon

WATCHED = ("--admin.address", "127.0.0.1:0")

Samples = dict[tuple[str, ...], float]


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self._path)


def place(daemon: Daemon | AdminThread) -> tuple[str, int]:
    """Return the address of the admin listener."""
    if isinstance(daemon, AdminThread):
        return daemon.address
    host, _, port = daemon.wait_for("listening", listener="admin")["address"].rpartition(":")
    return host, int(port)


def ask(connection: http.client.HTTPConnection, path: str, method: str = "GET", **headers: str) -> Answer:
    """Send a request on a connection that stays open."""
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    return Answer(response.status, response.headers, response.read())


def get(daemon: Daemon | AdminThread, path: str, method: str = "GET", **headers: str) -> Answer:
    """Send a request on a connection of its own."""
    with contextlib.closing(http.client.HTTPConnection(*place(daemon), timeout=PATIENCE)) as connection:
        return ask(connection, path, method, **headers)


def status(daemon: Daemon) -> dict[str, Any]:
    answer = get(daemon, "/status")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    report: dict[str, Any] = json.loads(answer.body)
    return report


def caller(daemon: Daemon | AdminThread) -> socket.socket:
    """Return a plain socket connected to the admin listener."""
    return socket.create_connection(place(daemon), PATIENCE)


def received(sock: socket.socket) -> bytes:
    """Receive until the server closes or resets the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while more := sock.recv(65536):
            data += more
    return data


def parse(text: str) -> Samples:
    """Return the values of a metrics page. A key has the sample's name, then its label values ordered by label name."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, *(value for _, value in sorted(sample.labels.items())))
            assert key not in samples, f"duplicate series: {key}"
            samples[key] = sample.value
    return samples


def scrape(daemon: Daemon | AdminThread) -> Samples:
    """Return the current metrics."""
    answer = get(daemon, "/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parse(answer.body.decode())
