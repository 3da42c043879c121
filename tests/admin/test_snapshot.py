"""Snapshots of the counters: each client is counted once, and no counter falls."""

from __future__ import annotations

import asyncio
import itertools
import signal
import socket
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from admin_thread import running_server
from crowd import Crowd
from echod.admin.snapshot import DaemonView, Snapshot, state_of
from echod.connection.state import Phase
from echod.loops import loop_factory
from echod.net.addresses import TcpAddress
from harness import reset
from watching import WATCHED, scrape

if TYPE_CHECKING:
    from collections.abc import Generator

    from harness import Start

pytestmark = pytest.mark.once


def run_on(steps: Generator[Any, Any, Any]) -> Any:
    """Run the rest of a coroutine that waits for no event, and return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def test_each_client_is_counted_once(loop_name: str) -> None:
    """A client that closes during the count counts with its final figures. One that connects counts next time."""
    clients = 600

    async def main() -> None:
        closed = asyncio.Event()
        log = structlog.wrap_logger(structlog.ReturnLogger()).bind()
        async with running_server(log, lambda _: closed.set()) as server:
            (address,) = server.addresses
            assert isinstance(address, TcpAddress)
            streams = [await asyncio.open_connection(address.host, address.port) for _ in range(clients)]
            for _, writer in streams:
                writer.write(b"12345")
            for reader, _ in streams:
                assert await reader.readexactly(5) == b"12345"
            snapshot = Snapshot(DaemonView({"x": server}, {}, {}, pytest.fail, bool, list, {}, int))
            steps = snapshot.take().__await__()
            next(steps)  # the first step is counted; now the last client of the last step closes, and another connects
            streams[-1][1].transport.abort()
            reader, newcomer = await asyncio.open_connection(address.host, address.port)
            newcomer.write(b"67")
            assert await reader.readexactly(2) == b"67"
            await closed.wait()
            count = run_on(steps)["x"]
            assert (count.counters.accepted, count.received, count.sent) == (clients, 5 * clients, 5 * clients)
            assert sum(count.states.values()) == clients - 1
            for _, writer in [*streams, (None, newcomer)]:
                writer.close()
            await server.shutdown()
            # If the kernel has sent less than the estimate while the connection was open, the sum does not fall.
            server.ledger.counters.sent -= 1
            count = (await snapshot.take())["x"]
            figures = count.counters.accepted, count.received, count.sent
            assert figures == (clients + 1, 5 * clients + 2, 5 * clients + 1)
            server.ledger.counters.sent -= 2
            assert (await snapshot.take())["x"].sent == count.sent
            assert not count.clients

    with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
        runner.run(main())


def test_counters_never_fall(start: Start) -> None:
    """Under load, no counter falls from one scrape to the next. The last values are those of the log."""
    daemon = start(*WATCHED, "--shutdown.delay", "60", "--limits.write-buffer", "16KiB")
    samples: list[dict[tuple[str, ...], float]] = []
    stop = threading.Event()

    def scrape_on() -> None:
        while not stop.is_set():
            samples.append(scrape(daemon))

    watcher = threading.Thread(target=scrape_on)
    watcher.start()
    try:
        with Crowd() as crowd:
            for seed in range(60):
                crowd.add(daemon.connect(), 200_000 + 10_000 * seed, seed)
            crowd.run(lambda: sum(bool(peer.end) for peer in crowd.peers) > 20)
            for peer in crowd.peers[::5]:
                if not peer.end and isinstance(peer.sock, socket.socket):
                    reset(peer.sock)
                    peer.end = "reset"
            crowd.finish()
        daemon.wait_for("client_closed", count=60)
    finally:
        stop.set()
        watcher.join()
    samples.append(scrape(daemon))
    for before, after in itertools.pairwise(samples):
        for series, value in before.items():
            if series[0].endswith(("_total", "_bucket", "_count", "_sum")):
                assert after[series] >= value, series
    daemon.send_signal()
    daemon.send_signal(signal.SIGINT)
    daemon.wait()
    totals = daemon.wait_for("stopped")
    last = samples[-1]
    for name, key in (
        ("received_bytes", "received"),
        ("acked_bytes", "acked"),
        ("connections", "connections"),
        ("discarded_bytes", "discarded_bytes"),
    ):
        assert last[f"echod_{name}_total", "127.0.0.1:0"] == totals[key]
    sent = last["echod_sent_bytes_total", "127.0.0.1:0"]
    assert totals["sent"] <= sent <= totals["received"]


@pytest.mark.parametrize(
    ("phase", "paused", "state"),
    [
        (Phase.CONNECTING, False, "open"),
        (Phase.PROXY_HEADER, False, "proxy_header"),
        (Phase.HANDSHAKE, False, "handshake"),
        (Phase.OPEN, False, "open"),
        (Phase.OPEN, True, "paused"),
        (Phase.FLUSHING, True, "closing"),
        (Phase.LINGERING, False, "closing"),
        (Phase.CLOSED, True, "closing"),
    ],
)
def test_states(phase: Phase, paused: bool, state: str) -> None:
    """A client has one state. A closing client is not paused."""
    session: Any = SimpleNamespace(phase=phase, paused=paused)
    assert state_of(session) == state
