"""Test inherited Multipath TCP sockets (RFC 8684). Their figures are never negative, whatever the kernel reports."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from echod.connection.echo import EchoSession
from echod.loops import loop_factory
from echod.net import kernel
from echod.settings.model import LimitsSettings, ShutdownSettings
from harness import PATIENCE, receive, reset
from inheriting import hand_over

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.once

MPTCP = 262


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """Yield a listening MPTCP socket for the daemon to inherit."""
    try:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, MPTCP)
    except OSError as error:
        pytest.skip(f"the kernel has no MPTCP: {error}")
    with sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock


@pytest.mark.parametrize("protocol", [MPTCP, socket.IPPROTO_TCP])
def test_figures(loop_name: str, listening: socket.socket, protocol: int) -> None:
    """Report the bytes of the whole connection, with MPTCP or TCP clients. The totals are the sums."""
    size = 300_000
    with hand_over([listening], "web", loop_name=loop_name) as daemon:
        for end in ("half-close", "reset", "reset after our FIN"):
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as client:
                client.settimeout(PATIENCE)
                client.connect(listening.getsockname())
                client.sendall(bytes(size))
                assert len(receive(client, size)) == size
                if end == "half-close":
                    client.shutdown(socket.SHUT_WR)
                    assert client.recv(1) == b""
                elif end == "reset":
                    reset(client)
                else:
                    client.shutdown(socket.SHUT_WR)
                    assert client.recv(1) == b""
                    reset(client)
        for count in (1, 2, 3):
            line = daemon.wait_for("client_closed", count=count)
            # A client that resets may not have acknowledged the last bytes yet.
            assert (line["received"], line["sent"]) == (size, size)
            assert line["acked"] == size or (line["reason"] == "reset" and 0 <= line["acked"] <= size)
        assert daemon.stop() == 0
        totals = daemon.wait_for("stopped")
        assert (totals["received"], totals["sent"]) == (3 * size,) * 2


def mptcp_info(acked: int, *, fallback: bool = False) -> bytes:
    """Build a struct mptcp_info with a count of acknowledged bytes."""
    return struct.pack("=8xI60xQ16x", 2 | fallback, acked)


class Kernel(socket.socket):
    """A socket with fixed answers to getsockopt(2)."""

    def __init__(self, protocol: int, tcp_acked: int, mptcp: bytes | int) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self._protocol = protocol
        self._tcp_info = struct.pack("=68xI28xI16xQ", 1500, 3, tcp_acked)
        self._mptcp = mptcp

    @property
    def proto(self) -> int:
        return self._protocol

    def getsockopt(self, level: int, option: int, size: int = 0) -> bytes:  # type: ignore[override]
        if (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO):
            return self._tcp_info[:size]
        assert (level, option) == (284, 1)
        if isinstance(self._mptcp, int):
            raise OSError(self._mptcp, "failed")
        return self._mptcp[:size]


@pytest.mark.parametrize(
    ("protocol", "mptcp", "acked"),
    [
        (socket.IPPROTO_TCP, mptcp_info(7), 5),
        (MPTCP, mptcp_info(7), 7),
        (MPTCP, mptcp_info(7, fallback=True), 5),
        (MPTCP, errno.EOPNOTSUPP, 5),
    ],
    ids=["TCP", "MPTCP", "fallback of a connection", "client without MPTCP"],
)
def test_acknowledged_bytes(protocol: int, mptcp: bytes | int, acked: int) -> None:
    """Use the count of TCP_INFO for a plain or fallback connection, and that of MPTCP_INFO otherwise."""
    with Kernel(protocol, 5, mptcp) as sock:
        assert kernel.tcp_info(sock) == kernel.TcpInfo(1.5, 3, acked)


def test_kernel_that_does_not_count() -> None:
    """Report no figures if struct mptcp_info is too short for them, as before Linux 6.5."""
    with Kernel(MPTCP, 5, mptcp_info(7)[:72]) as sock:
        assert kernel.tcp_info(sock) is None


def test_other_failures() -> None:
    with Kernel(MPTCP, 5, errno.ENOBUFS) as sock, pytest.raises(OSError, match="failed"):
        kernel.tcp_info(sock)


@pytest.mark.parametrize("acked", [0, 3])
def test_figures_are_never_negative(loop_name: str, monkeypatch: pytest.MonkeyPatch, acked: int) -> None:
    """Keep `sent` and `acked` at 0 or more after our FIN, whatever the kernel reports."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname(), PATIENCE)
            sock, _ = server.accept()
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        session = EchoSession(sock, LimitsSettings(), ShutdownSettings(), loop.create_future())
        await loop.connect_accepted_socket(lambda: session, sock)
        monkeypatch.setattr(kernel, "tcp_info", lambda _: kernel.TcpInfo(0, 0, acked))
        session.close("idle")
        client.close()
        await asyncio.wait_for(session.ended, PATIENCE)
        assert session.delivery is not None
        assert session.delivery.sent == max(0, acked - 1)
        assert session.delivery.acked == max(0, acked - 1)

    with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
        runner.run(main())
