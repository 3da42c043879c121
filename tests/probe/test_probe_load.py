"""The load generator in this process: in simulated time, and in states that a server cannot cause reliably."""

from __future__ import annotations

import contextlib
import select
import socket
from typing import TYPE_CHECKING

import pytest

from echod.probe import arguments, progress
from echod.probe.load import Interrupt, LoadGenerator
from echod.probe.timing import Timer
from harness import PATIENCE, receive, reset
from peers import Peer, echo, messages
from probing import UNANSWERED, narrow
from simulated_time import SimulatedTime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from echod.probe.load import Results

pytestmark = pytest.mark.once


@contextlib.contextmanager
def connected(target: str, *options: str, time: SimulatedTime | None = None) -> Iterator[LoadGenerator]:
    """Yield a load generator that is connected and has not sent anything."""
    parsed = arguments.parse([target, *options])
    with progress.Display(parsed) as display:
        generator = LoadGenerator(parsed, Interrupt(), display, time.timer if time else Timer)
        generator.connect()
        yield generator


@contextlib.contextmanager
def idle_connections(*options: str, connections: int = 1) -> Iterator[tuple[LoadGenerator, list[socket.socket]]]:
    """Yield a connected load generator, and the server's ends of its connections."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        target = f"127.0.0.1:{listening.getsockname()[1]}"
        generator = stack.enter_context(connected(target, "--connections", str(connections), *options))
        yield generator, [stack.enter_context(listening.accept()[0]) for _ in range(connections)]


def run(peer: Peer, *options: str, time: SimulatedTime) -> Results:
    """Measure a server in simulated time."""
    with connected(peer.target, *options, time=time) as generator:
        return generator.run()


def reset_all(ends: list[socket.socket], generator: LoadGenerator) -> None:
    """Reset connections, and wait until the kernel has received the resets."""
    for end in ends:
        reset(end)
    for connection in generator.connections:
        assert select.select([connection], [], [], PATIENCE)[0]


@pytest.mark.parametrize("options", [(), ("--rate", "1"), ("--rate", "10000000")])
def test_reset_before_the_first_message(options: tuple[str, ...]) -> None:
    """The first send fails, and no connection is left for the other messages."""
    with idle_connections("--count", "3", *options) as (generator, ends):
        reset_all(ends, generator)
        results = generator.run()
    assert results.errors == {"reset": 1}
    assert (results.latencies.count, results.sent, results.unanswered) == (0, 0, 1)
    assert results.problem == f"connection 0: Connection reset by peer; {UNANSWERED}"


def test_reset_of_a_connection_without_messages() -> None:
    """The half-close fails."""
    with idle_connections("--count", "1", "--half-close", connections=2) as (generator, ends):
        reset_all(ends, generator)
        results = generator.run()
    assert results.errors.total() == 2
    assert results.unanswered == 1


def test_message_that_takes_longer_than_the_timeout() -> None:
    """The timeout applies to a connection without progress only."""
    time = SimulatedTime()
    size = 20_000_000

    def handler(sock: socket.socket) -> None:
        data = b""
        while len(data) < size:
            data += receive(sock, 500_000)
            time.advance(50_000_000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1_000_000)
        sock.sendall(data)

    with Peer(handler, narrow()) as peer:
        results = run(peer, "--count", "1", "--size", str(size), "--timeout", "1", time=time)
    assert results.errors == {}
    assert results.latencies.most > 2


def test_duration() -> None:
    """Messages are sent until the duration is over."""
    with Peer(echo) as peer:
        results = run(peer, "--duration", "1.3", time=SimulatedTime())
    assert 1.3 <= results.seconds < 1.4
    assert results.latencies.count > 100
    assert len(results.throughput) in {1, 2}  # the rest may be too short for a value of its own
    assert sum(results.throughput) > 0


def pausing(at: int, pause: Callable[[], object]) -> Peer:
    """Return a server that pauses once, before it answers the message with the given number."""

    def act(sock: socket.socket, number: int, message: bytes) -> None:
        if number == at:
            pause()
        sock.sendall(message)

    return Peer(messages(64, act))


def test_closed_loop_hides_a_stall_of_the_server() -> None:
    """Nothing is sent during the stall, so only one message is slow."""
    time = SimulatedTime()
    with pausing(50, lambda: time.advance(600_000_000)) as peer:
        results = run(peer, "--count", "200", time=time)
    assert results.latencies.most >= 0.6
    assert results.latencies.percentiles([90])[90] < 0.2


def test_rate_shows_a_stall_of_the_server() -> None:
    """The latency of a message counts from the time at which it was due."""
    time = SimulatedTime()
    with pausing(50, lambda: time.pause(0.6)) as peer:
        results = run(peer, "--count", "200", "--rate", "200", time=time)
    assert results.latencies.count == 200
    assert results.latencies.most >= 0.599
    # The slowest tenth are the first 20 messages that were due during the stall. They waited for 0.5 s or longer.
    assert results.latencies.percentiles([90])[90] > 0.4
    assert results.seconds > 0.99
    assert 0 < results.lag < 0.5


def test_rate_shows_a_stall_of_the_probe() -> None:
    """A message that the probe sent late has a high latency, and the report says how late it was sent."""
    time = SimulatedTime()
    with pausing(50, lambda: time.advance(600_000_000)) as peer:
        results = run(peer, "--count", "200", "--rate", "200", time=time)
    assert results.latencies.count == 200
    assert results.latencies.percentiles([90])[90] > 0.4
    assert results.lag > 0.5


def test_rate_is_kept() -> None:
    """Every message of the schedule is sent, and none before it is due."""
    options = ("--rate", "500", "--duration", "1", "--connections", "3", "--half-close")
    with Peer(echo) as peer:
        results = run(peer, *options, time=SimulatedTime())
    assert (results.latencies.count, results.unanswered, results.errors) == (500, 0, {})
    assert 0.99 < results.seconds < 1.5


def test_rate_that_is_too_high() -> None:
    """All messages are sent late, and the report says how late."""
    with Peer(echo) as peer:
        results = run(peer, "--rate", "10000000", "--count", "5000", "--size", "2KiB", time=SimulatedTime())
    assert results.latencies.count == 5000
    assert results.lag > 0.0001
    assert results.latencies.most >= results.lag - 1e-7
