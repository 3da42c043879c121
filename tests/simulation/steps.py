"""The steps of a simulation: each is data, and can be left out.

A step of a client that does not exist, or has ended, does nothing. So any part of a script is a script, which the
search for the shortest failing one relies on.
"""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from client import Client
from proxy_headers import v2

if TYPE_CHECKING:
    from collections.abc import Mapping

    from client import Ending
    from world import World

Header = Literal["v1", "v2", "garbage", "unfinished"]
Hello = Literal["tls", "garbage", "unfinished"]
Fault = Literal["syntax", "value", "certificate"]

# The file that a fault is in, and the text that replaces a certificate or follows the settings.
_BREAKS: Mapping[Fault, tuple[str, str]] = {
    "syntax": ("echod.toml", "\n[[["),
    "value": ("echod.toml", "\n[limits.x]\ny = 1\n"),
    "certificate": ("server.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
}

_LOCAL = bytes((127, 0, 0, 1))


def proxy_header(header: Header | None, who: int) -> tuple[bytes, str]:
    """Return the bytes of a PROXY header, and the source that it names. `who` is the last byte of its address."""
    host, port = f"192.0.2.{who}", 40000 + who
    if header == "v1":
        return f"PROXY TCP4 {host} 127.0.0.1 {port} 7\r\n".encode(), f"{host}:{port}"
    if header == "v2":
        block = bytes((192, 0, 2, who)) + _LOCAL + port.to_bytes(2, "big") + (7).to_bytes(2, "big")
        return v2(0x21, 0x11, block), f"{host}:{port}"
    return {None: b"", "garbage": b"PROXY of nothing\r\n", "unfinished": b"PROXY TCP4 "}[header], ""


def _noise(number: int) -> bytes:
    """Return bytes that are neither a record of TLS nor its beginning."""
    return b"\xee" + random.Random(number).randbytes(99)


@dataclass(frozen=True)
class Connect:
    """Connect a client, and let it send its PROXY header and begin its TLS handshake."""

    client: int
    listener: str
    receive_buffer: int | None = None
    read_size: int = 65536
    header: Header | None = None
    who: int = 1
    hello: Hello = "tls"
    certificate: bool = True

    def apply(self, world: World) -> None:
        listener = world.listeners[self.listener]
        if self.client in world.clients or (sock := world.connect(self.client, listener, self.receive_buffer)) is None:
            return
        preamble, source = proxy_header(self.header, self.who)
        context = None
        if listener.tls:
            match self.hello:
                case "tls":
                    context = world.identity.context(client=listener.tls == "mutual" and self.certificate)
                case "garbage":
                    preamble += _noise(self.client)
                case _:
                    preamble += b"\x16\x03\x01"
        client = Client(self.client, listener, sock, context, preamble, self.read_size)
        client.source = source
        client.late = world.stopping
        client.misbehaves = (
            self.header in {"garbage", "unfinished"}
            or bool(listener.tls) > (context is not None)
            or (listener.tls == "mutual" and not self.certificate)
        )
        world.add(client)


@dataclass(frozen=True)
class Send:
    """Queue payload; it is sent while the clients are served."""

    client: int
    size: int
    chunk: int

    def apply(self, world: World) -> None:
        for client in world.open(self.client):
            client.send(self.size, self.chunk)


@dataclass(frozen=True)
class SendEndlessly:
    """Send until the daemon ends the connection."""

    client: int
    chunk: int

    def apply(self, world: World) -> None:
        for client in world.open(self.client):
            client.send(0, self.chunk)
            client.endless = client.finishing is None


@dataclass(frozen=True)
class SendUrgent:
    """Send a byte as urgent data."""

    client: int

    def apply(self, world: World) -> None:
        for client in world.open(self.client):
            client.send_urgent()


@dataclass(frozen=True)
class SendGarbage:
    """Send bytes that are no record of TLS."""

    client: int

    def apply(self, world: World) -> None:
        for client in world.open(self.client):
            client.send_garbage(_noise(self.client))


@dataclass(frozen=True)
class StopReading:
    """Leave the echo in the kernel."""

    client: int

    def apply(self, world: World) -> None:
        for client in world.open(self.client):
            client.reading = False


@dataclass(frozen=True)
class Read:
    """Read again."""

    client: int

    def apply(self, world: World) -> None:
        for client in world.open(self.client):
            client.reading = True


@dataclass(frozen=True)
class Finish:
    """Close the own direction after the payload, and read until the end."""

    client: int
    ending: Ending = "notify_fin"

    def apply(self, world: World) -> None:
        for client in world.open(self.client):
            client.finish(self.ending)


@dataclass(frozen=True)
class Leave:
    """Close the socket, or reset the connection, whatever is unsent or unread."""

    client: int
    by_reset: bool

    def apply(self, world: World) -> None:
        for client in world.open(self.client):
            client.leave(by_reset=self.by_reset)


@dataclass(frozen=True)
class Await:
    """Serve all clients until these have their echo, or until nothing moves any more."""

    clients: tuple[int, ...]

    def apply(self, world: World) -> None:
        waiting = [client for number in self.clients for client in world.open(number)]
        world.serve(lambda: all(client.is_satisfied for client in waiting), or_idle=True)


@dataclass(frozen=True)
class AwaitEnd:
    """Serve all clients until the daemon has closed this one for a timeout."""

    client: int

    def apply(self, world: World) -> None:
        for client in world.open(self.client):
            if not client.misbehaves and client.reading and world.expires(client):
                world.serve(lambda client=client: bool(client.end))  # type: ignore[misc]


@dataclass(frozen=True)
class Reload:
    """Change a setting, and send SIGHUP."""

    section: str
    key: str
    value: str | int

    def apply(self, world: World) -> None:
        world.settings[self.section][self.key] = self.value
        world.write_settings()
        world.hang_up()


@dataclass(frozen=True)
class ReloadBroken:
    """Break the settings or the certificate, send SIGHUP, and mend them after the reload."""

    fault: Fault

    def apply(self, world: World) -> None:
        if world.frozen or world.stopping:
            return  # it might be mended before it is read
        name, text = _BREAKS[self.fault]
        path = world.folder / name
        right = path.read_text()
        path.write_text(right + text if name == "echod.toml" else text)
        # Without TLS, the certificate is not read.
        has_tls = any(listener.tls for listener in world.listeners.values())
        world.hang_up(breaks=self.fault != "certificate" or has_tls)
        path.write_text(right)


@dataclass(frozen=True)
class SwapCertificate:
    """Replace the server's certificate and key, and send SIGHUP. Later clients see the new one."""

    def apply(self, world: World) -> None:
        if not (world.frozen or world.stopping):
            world.swap_certificate()
            world.hang_up()


@dataclass(frozen=True)
class Rotate:
    """Rename the log file and send SIGHUP. The first time, log to a file from now on."""

    def apply(self, world: World) -> None:
        if not (world.frozen or world.stopping):
            world.rotate_log()


@dataclass(frozen=True)
class HangUp:
    """Send SIGHUP without a change, also to a process that is stopped."""

    def apply(self, world: World) -> None:
        world.hang_up()


@dataclass(frozen=True)
class Freeze:
    """Send SIGSTOP."""

    def apply(self, world: World) -> None:
        world.freeze()


@dataclass(frozen=True)
class Continue:
    """Send SIGCONT."""

    def apply(self, world: World) -> None:
        world.resume()


@dataclass(frozen=True)
class Calm:
    """Let every client finish. Then the daemon must have as many descriptors and threads as at its start."""

    def apply(self, world: World) -> None:
        world.calm()


@dataclass(frozen=True)
class Terminate:
    """Send the first signal of a stop."""

    number: int = signal.SIGTERM

    def apply(self, world: World) -> None:
        world.terminate(self.number)


Step = (
    Connect
    | Send
    | SendEndlessly
    | SendUrgent
    | SendGarbage
    | StopReading
    | Read
    | Finish
    | Leave
    | Await
    | AwaitEnd
    | Reload
    | ReloadBroken
    | SwapCertificate
    | Rotate
    | HangUp
    | Freeze
    | Continue
    | Calm
    | Terminate
)
