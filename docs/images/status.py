"""Take the screenshot of the status page, status.png, from a daemon under load.

    PYTHONPATH=tests/support python docs/images/status.py

It takes two minutes, and needs the Debian packages chromium, chromium-driver, pngquant, iproute2 and util-linux. The
daemon and its clients have a network namespace with addresses that are reserved for documentation.
"""

from __future__ import annotations

import base64
import contextlib
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from cryptography.x509 import DNSName, SubjectAlternativeName

from browsing import chromium, show
from harness import PATIENCE, Daemon, receive, reset
from issuing import Issued, client_context, named, write

PICTURE = Path(__file__).resolve().with_suffix(".png")
WIDTH = 1280
SECONDS = 90
NAME = "echo.example.org"
SETTINGS = """\
listen = ["192.0.2.1:7", "[2001:db8::1]:7"]

[listeners.public]
address = "192.0.2.1:8443"

[listeners.public.tls]
certificate = "public.pem"
private_key = "public.key"

[listeners.behind-proxy]
address = "192.0.2.1:8000"
proxy_protocol = "require"
proxy_trusted = ["192.0.2.0/24"]

[listeners.flaky]
address = "192.0.2.1:8001"
fault = "reset-at-64k"

[faults.reset-at-64k]
after_bytes = "64KiB"
action = "reset"

[limits]
idle_timeout = 20.0
write_timeout = 300.0

[admin]
address = "127.0.0.1:9000"
"""
NAMESPACE = 'ip link set lo up; ip addr add 192.0.2.1/24 dev lo; ip addr add 2001:db8::1/64 dev lo nodad; exec "$@"'
# Clients that stay: address, port, mean bytes per second, bytes per message.
CLIENTS = (
    *(("192.0.2.17", 7, 21e6, 65536), ("192.0.2.30", 7, 6e6, 16384), ("2001:db8::1", 7, 2e6, 8192)),
    *(("192.0.2.51", 8443, 900e3, 4096), ("192.0.2.52", 8443, 40e3, 512)),
    *(("192.0.2.80", 8000, 350e3, 2048), ("192.0.2.18", 7, 8e3, 128)),
)


# Messages of clients that end, how each ends, and their number.
ENDS = (
    (7, b"hello", "eof", 212),
    (7, b"hello", "reset", 17),
    (8443, b"GET / HTTP/1.1\r\n\r\n", "eof", 4),
    (8001, b"x", "fault", 3),
)


def connect(source: str, port: int, buffer: int = 0) -> socket.socket:
    """Connect from an address. A `buffer` limits the client's receive buffer."""
    client = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET)
    if buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.settimeout(PATIENCE)
    client.bind((source, 0))
    client.connect(("2001:db8::1" if ":" in source else "192.0.2.1", port))
    if port == 8000:
        client.sendall(b"PROXY TCP4 198.51.100.23 192.0.2.1 51442 8000\r\n")
    return client


def flow(client: socket.socket, rate: float, size: int) -> None:
    """Send and receive messages of a size, at a rate that rises and falls, until the daemon has gone."""
    with contextlib.suppress(OSError):
        while client.send(b"x" * size) and receive(client, size):
            time.sleep(size / rate / (1 + 0.35 * math.sin(time.monotonic() / 9 + size)))


def end(port: int, message: bytes, how: str) -> None:
    """Connect, send a message, and end as the page is to show it."""
    with connect("192.0.2.17", port) as client, contextlib.suppress(OSError):
        client.sendall(message * (70_000 if how == "fault" else 1))
        if how == "reset":
            reset(client)
        elif how == "eof":
            client.shutdown(socket.SHUT_WR)
        receive(client, 1_000_000)


def main() -> None:
    """Start the daemon and its clients, and take the picture."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        os.chdir(folder)
        authority = Issued(named("Example CA"), ca=True)
        server = Issued(named(NAME), authority, extensions=[SubjectAlternativeName([DNSName(NAME)])])
        write(Path("public.pem"), server.pem)
        write(Path("public.key"), server.key_pem)
        Path("echod.toml").write_text(SETTINGS, encoding="utf-8")
        daemon = stack.enter_context(Daemon("--config", "echod.toml", listen=None))
        daemon.wait_for("listening", listener="admin")
        browser = stack.enter_context(chromium(Path(folder, "profile")))
        browser.get("http://127.0.0.1:9000/")
        show(browser, WIDTH, 1000, "light")
        for source, port, rate, size in CLIENTS:
            client = connect(source, port)
            if port == 8443:
                client = client_context(authority, Path(folder)).wrap_socket(client, server_hostname=NAME)
            threading.Thread(target=flow, args=(client, rate, size), daemon=True).start()
        paused = connect("192.0.2.44", 7, 4096)
        paused.settimeout(1)
        with contextlib.suppress(TimeoutError):
            paused.sendall(bytes(50_000_000))
        idle = connect("192.0.2.45", 7)
        idle.sendall(b"hello")
        for port, message, how, number in ENDS:
            for _ in range(number):
                end(port, message, how)
        time.sleep(SECONDS)
        height = browser.execute_script("return document.querySelector('#h-settings').getBoundingClientRect().top - 24")
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        quantize = ["pngquant", "--speed=1", "256", "--force", "--output", str(PICTURE), "-"]
        subprocess.run(quantize, input=base64.b64decode(shot["data"]), check=True)


if __name__ == "__main__":
    if "inside" in sys.argv:
        main()
    else:
        namespace = ["unshare", "--map-root-user", "--net", "sh", "-c", NAMESPACE, "sh"]
        os.execvp(namespace[0], [*namespace, sys.executable, __file__, "inside"])  # noqa: S606  (a fixed command)
