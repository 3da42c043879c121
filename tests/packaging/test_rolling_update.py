"""Replace instances behind a load balancer one by one, without an effect on any client."""

from __future__ import annotations

import shutil
import socket
import subprocess
from typing import TYPE_CHECKING, Self

import pytest

from crowd import Crowd
from harness import free_port, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from crowd import Peer
    from harness import Daemon, Start

pytestmark = pytest.mark.once

SHORT, LONG = 20, 10

# No retries and no redispatch, so that a refused connection reaches the client.
HAPROXY = """
global
  stats socket {admin} level admin
defaults
  mode tcp
  timeout connect 30s
  timeout client 60s
  timeout server 60s
  retries 0
listen echo
  bind 127.0.0.1:{port}
  balance roundrobin
  server s0 127.0.0.1:1 disabled
  server s1 127.0.0.1:1 disabled
  server s2 127.0.0.1:1 disabled
"""


class Balancer:
    """HAProxy with a list of servers that tests change, as Kubernetes changes the endpoints of a Service.

    Args:
        folder: a folder for its files.

    """

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._admin = folder / "admin"
        config = folder / "haproxy.cfg"
        config.write_text(HAPROXY.format(port=self.port, admin=self._admin))
        self._process = subprocess.Popen(["haproxy", "-db", "-f", str(config)])

    def __enter__(self) -> Self:
        until(self._admin.exists)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def add(self, slot: int, daemon: Daemon) -> None:
        host, port = daemon.address
        self._command(f"set server echo/s{slot} addr {host} port {port}")
        self._command(f"set server echo/s{slot} state ready")

    def drain(self, slot: int) -> None:
        """Stop sending new clients to a server. Its present clients stay connected."""
        self._command(f"set server echo/s{slot} state drain")

    def _command(self, line: str) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self._admin))
            sock.sendall(f"{line}\n".encode())
            while answer := sock.recv(4096):
                assert b"no need to change" in answer or not answer.strip() or b"changed from" in answer, answer


class Traffic:
    """Short-lived clients that are replaced as they end, and long-lived clients.

    Args:
        port: the port to connect to.

    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._crowd = Crowd()
        self._present: list[Peer] = []
        self.served = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._crowd.__exit__(kind, error, trace)

    def run(self, condition: Callable[[], bool]) -> None:
        """Serve the clients and replace those that end, until the condition holds."""

        def replace_and_check() -> bool:
            self._replace()
            return condition()

        self._crowd.run(replace_and_check)

    def end_long_lived(self) -> list[Peer]:
        """Let the long-lived clients end after another million bytes, to be replaced by new ones. Return them."""
        leaving = [peer for peer in self._present if peer.total is None]
        for peer in leaving:
            peer.total = peer.sent + 1_000_000
        return leaving

    def _replace(self) -> None:
        for peer in [peer for peer in self._present if peer.end]:
            assert (peer.end, peer.received, peer.wrong) == ("eof", peer.total, False)
            self._present.remove(peer)
            self._crowd.peers.remove(peer)
            self.served += 1
        long_lived = sum(peer.total is None for peer in self._present)
        short_lived = sum(peer.total == 5000 for peer in self._present)
        for _ in range(LONG - long_lived):
            self._join(None)
        for _ in range(SHORT - short_lived):
            self._join(5000)

    def _join(self, total: int | None) -> None:
        sock = socket.create_connection(("127.0.0.1", self._port))
        self._present.append(self._crowd.add(sock, total, self.served))


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="not installed: haproxy")
def test_rolling_update(start: Start, tmp_path: Path) -> None:
    """Start a new instance, then stop an old one, until all are replaced, as a Deployment does."""

    def instance() -> Daemon:
        return start("--shutdown.delay", "1", "--shutdown.drain-timeout", "20", "--log.connections", "none")

    old = [instance(), instance()]
    with Balancer(tmp_path) as balancer:
        for slot, daemon in enumerate(old):
            balancer.add(slot, daemon)
        with Traffic(balancer.port) as traffic:
            traffic.run(lambda: traffic.served > 100)
            free = 2
            new = []
            for slot, daemon in enumerate(old):
                new.append(instance())
                balancer.add(free, new[-1])
                served = traffic.served
                traffic.run(lambda served=served: traffic.served > served + 100)  # type: ignore[misc]
                daemon.send_signal()
                traffic.run(lambda daemon=daemon: bool(daemon.all("draining")))  # type: ignore[misc]
                # The cluster notices a failing readiness probe only after a while.
                served = traffic.served
                traffic.run(lambda served=served: traffic.served > served + 20)  # type: ignore[misc]
                balancer.drain(slot)
                leaving = traffic.end_long_lived()
                traffic.run(
                    lambda daemon=daemon, leaving=leaving: (  # type: ignore[misc]
                        all(peer.end for peer in leaving) and daemon.process.poll() is not None
                    )
                )
                free = slot
            for peer in traffic.end_long_lived():
                traffic.run(lambda peer=peer: bool(peer.end))  # type: ignore[misc]
            for daemon in old:
                assert daemon.wait() == 0
                receipt = daemon.receipt()
                assert receipt["clients"] == receipt["completed"] >= LONG // 4
                assert receipt["unsent_bytes"] == receipt["unacked_bytes"] == 0
    assert all(daemon.process.poll() is None for daemon in new)
