"""Measurements of `echod probe udp:HOST:PORT` against scripted servers, in simulated time."""

from __future__ import annotations

import errno
import os
import random
import socket
from typing import TYPE_CHECKING, Any

import pytest

from datagrams import UdpPeer, changing, echo
from echod.probe import arguments, progress
from echod.probe.load import Interrupt
from echod.probe.model import Outcome
from echod.probe.udp import measure as udp
from echod.probe.udp import report, sockets
from simulated_time import SimulatedTime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from echod.probe.udp.measure import Results

pytestmark = pytest.mark.once

# Of simulated time. It ends only if the script of the server says so.
TIMEOUT = 60
LATER = (TIMEOUT + 1) * 1_000_000_000
# The default receive buffer of a socket holds 277 small datagrams. No test has more in flight, so none is lost by chance.


def run(peer: UdpPeer, *options: str, time: SimulatedTime) -> Results:
    """Measure a server in simulated time."""
    parsed = arguments.parse([peer.target, "--timeout", str(TIMEOUT), *options])
    with progress.Display(parsed) as display:
        return udp.Measurement(parsed, Interrupt(), display, time.timer).run()


def counts(results: Results) -> dict[str, int]:
    """Return the counters that are not zero."""
    names = ("sent", "received", "lost", "late", "duplicated", "reordered", "corrupted", "foreign", "in_flight")
    return {name: getattr(results.tally, name) for name in names if getattr(results.tally, name)}


@pytest.mark.parametrize(
    "options", [(), ("--window", "7"), ("--rate", "1000"), ("--interval", "2ms"), ("--size", "0"), ("--size", "65507")]
)
def test_a_right_echo(options: tuple[str, ...]) -> None:
    """Every datagram is received, in order."""
    with UdpPeer(echo) as peer:
        results = run(peer, "--count", "200", *options, time=SimulatedTime())
    assert (counts(results), results.errors, results.problem) == ({"sent": 200, "received": 200}, {}, "")
    assert results.latencies.count == 200
    assert len(peer.clients) == 200
    assert results.receive_drops == 0


@pytest.mark.parametrize("seed", range(5))
def test_dropped_datagrams_are_lost(seed: int) -> None:
    """The probe reports exactly the datagrams that the server has dropped."""
    time, chance, dropped = SimulatedTime(), random.Random(seed), []

    def script(number: int, datagram: bytes) -> Iterator[bytes]:
        if chance.random() < 0.1:
            dropped.append(number)
        else:
            yield datagram
        if number == 199:
            time.advance(LATER)

    with UdpPeer(script) as peer:
        results = run(peer, "--count", "200", "--rate", "5000", time=time)
    assert 5 < len(dropped) < 45
    assert counts(results) == {"sent": 200, "received": 200 - len(dropped), "lost": len(dropped)}


def test_a_lost_datagram_makes_room_for_the_next_one() -> None:
    """In a closed loop, a datagram is sent when an earlier one is received or lost."""
    time = SimulatedTime()

    def script(number: int, _: bytes) -> list[bytes]:
        if number % 10 == 9:
            time.advance(LATER)
        return []

    with UdpPeer(script) as peer:
        results = run(peer, "--count", "40", "--window", "10", time=time)
    assert counts(results) == {"sent": 40, "lost": 40}
    assert len(peer.clients) == 40


def test_a_late_echo() -> None:
    """An echo after the timeout is late, and its datagram stays lost."""
    time, held = SimulatedTime(), list[bytes]()

    def script(number: int, datagram: bytes) -> list[bytes]:
        if number == 3:
            held.append(datagram)
            time.advance(LATER)
            return []
        return [*held, datagram] if number == 4 else [datagram]

    with UdpPeer(script) as peer:
        results = run(peer, "--count", "10", time=time)
    assert counts(results) == {"sent": 10, "received": 9, "lost": 1, "late": 1}


def test_duplicates_and_reordering() -> None:
    """A second echo is a duplicate, and an echo after that of a later datagram is reordered."""
    held: list[bytes] = []

    def script(number: int, datagram: bytes) -> list[bytes]:
        match number % 10:
            case 2:
                return [datagram, datagram, datagram]
            case 5:
                held[:] = [datagram]
                return []
            case 6:
                return [datagram, *held]
            case _:
                return [datagram]

    with UdpPeer(script) as peer:
        results = run(peer, "--count", "100", "--rate", "1000", time=SimulatedTime())
    assert counts(results) == {"sent": 100, "received": 100, "duplicated": 20, "reordered": 10}


def test_a_duplicate_of_the_last_datagram(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe listens for a while after the last echo."""
    time = SimulatedTime()
    monkeypatch.setattr(udp, "_LINGER", LATER)

    def script(_: int, datagram: bytes) -> Iterator[bytes]:
        yield datagram
        time.pause(0.05)
        yield datagram
        time.advance(LATER)

    with UdpPeer(script) as peer:
        results = run(peer, "--count", "1", time=time)
    assert counts(results) == {"sent": 1, "received": 1, "duplicated": 1}


@pytest.mark.parametrize(
    ("script", "mismatch"),
    [
        (changing(63), (63, True, True)),
        (lambda _, datagram: [datagram[:20]], (20, True, False)),
        (lambda _, datagram: [datagram + b"!"], (64, False, True)),
    ],
)
def test_corruption(script: Callable[[int, bytes], list[bytes]], mismatch: tuple[int, bool, bool]) -> None:
    """Wrong bytes and wrong lengths are found, and the exit code is 1 whatever the loss."""
    with UdpPeer(script) as peer:
        results = run(peer, "--count", "10", time=SimulatedTime())
        result = report.result(arguments.parse([peer.target, "--max-loss", "100"]), results)
    assert counts(results) == {"sent": 10, "received": 10, "corrupted": 10}
    found = results.tally.mismatch
    assert found is not None
    assert (found.offset, found.expected is not None, found.got is not None) == mismatch
    assert result.outcome is Outcome.FAILED
    assert result.problem.startswith(f"{peer.target}: 10 corrupted: wrong echo at offset {mismatch[0]}: expected ")


def test_foreign_datagrams() -> None:
    """Datagrams that are not of this session are counted, and the echo is still right."""
    with UdpPeer(lambda _, datagram: [b"220 hello", b"", b"\x9eCHO" + bytes(60), datagram]) as peer:
        results = run(peer, "--count", "5", time=SimulatedTime())
        result = report.result(arguments.parse([peer.target, "--count", "5"]), results)
    assert counts(results) == {"sent": 5, "received": 5, "foreign": 15}
    assert (result.outcome, result.problem) == (Outcome.RIGHT, "")


def test_a_server_of_another_protocol() -> None:
    """If no echo comes, the text that the server sends instead is shown."""
    time = SimulatedTime()

    def script(*_: object) -> Iterator[bytes]:
        yield b"220 hello\r\n"
        time.advance(LATER)

    with UdpPeer(script) as peer:
        results = run(peer, "--count", "2", time=time)
        result = report.result(arguments.parse([peer.target, "--count", "2"]), results)
    assert result.outcome is Outcome.FAILED
    assert result.problem == (
        f"{peer.target}: 2 of 2 datagrams lost (100%, --max-loss is 0%); the server sent '220 hello'"
    )


def test_a_server_that_ends() -> None:
    """After an echo, port unreachable is counted for each datagram, and the measurement continues."""
    time = SimulatedTime()

    def script(number: int, datagram: bytes) -> Iterator[bytes]:
        if number == 0:
            yield datagram
        if number == 4:
            peer.socket.close()
            time.advance(LATER)
            # The next four are sent together. Each ICMP error makes the next call of send(2) fail without sending.
            time.pause(0.05)
            time.advance(LATER)

    with UdpPeer(script) as peer:
        results = run(peer, "--count", "9", "--window", "4", time=time)
        result = report.result(arguments.parse([peer.target, "--count", "9"]), results)
    assert counts(results) == {"sent": 9, "received": 1, "lost": 8}
    assert results.errors == {"port_unreachable": 4}
    assert result.outcome is Outcome.FAILED
    assert result.problem == (
        f"{peer.target}: 8 of 9 datagrams lost (88.9%, --max-loss is 0%);"
        " port unreachable (ICMP from 127.0.0.1) (errors by kind: port_unreachable 4)"
    )


@pytest.mark.parametrize("options", [("--rate", "1000"), ("--window", "3")])
def test_no_server(options: tuple[str, ...]) -> None:
    """An ICMP error before any echo ends the measurement."""
    parsed = arguments.parse(["udp:127.0.0.1:1", "--count", "1000", *options])
    with progress.Display(parsed) as display:
        results = udp.Measurement(parsed, Interrupt(), display, SimulatedTime().timer).run()
    result = report.result(parsed, results)
    assert results.tally.sent < 100
    assert (result.outcome, result.text) == (Outcome.UNREACHABLE, "")
    assert "port unreachable (ICMP from 127.0.0.1)" in result.problem


def test_duration() -> None:
    """Datagrams are sent until the duration is over."""
    with UdpPeer(echo) as peer:
        results = run(peer, "--duration", "1.3", time=SimulatedTime())
    assert 1.3 <= results.seconds < 1.5
    assert results.tally.received == results.tally.sent > 100


def test_a_duration_without_an_echo() -> None:
    """The last datagrams have their timeout after the duration."""
    time = SimulatedTime()

    def script(number: int, _: bytes) -> list[bytes]:
        if number == 99:
            time.advance(LATER)
        return []

    with UdpPeer(script) as peer:
        results = run(peer, "--duration", "0.1", "--rate", "1000", time=time)
    assert counts(results) == {"sent": 100, "lost": 100}
    assert results.latencies.count == 0
    assert results.seconds < TIMEOUT


def test_rate_shows_a_stall_of_the_server() -> None:
    """The round trips of the datagrams that wait for the server are long."""
    time = SimulatedTime()

    def script(number: int, datagram: bytes) -> list[bytes]:
        if number == 50:
            time.pause(0.6)
        return [datagram]

    with UdpPeer(script) as peer:
        results = run(peer, "--count", "200", "--rate", "200", time=time)
    assert counts(results) == {"sent": 200, "received": 200}
    assert results.latencies.percentiles([90])[90] > 0.4
    assert results.lag < 0.5


def test_rate_shows_a_stall_of_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round trip counts from the time at which the datagram was due, even if it was sent late."""
    time, stalls = SimulatedTime(), iter([600_000_000])
    monkeypatch.setattr(progress.Display, "show", lambda *_, **__: time.advance(next(stalls, 0)))
    with UdpPeer(echo) as peer:
        results = run(peer, "--count", "200", "--rate", "200", time=time)
    assert counts(results) == {"sent": 200, "received": 200}
    assert results.latencies.percentiles([90])[90] > 0.4
    assert results.lag > 0.5


def test_a_stall_of_the_probe_is_not_a_loss() -> None:
    """The probe reads all echoes that have arrived before a timeout ends."""
    time = SimulatedTime()

    def script(_: int, datagram: bytes) -> Iterator[bytes]:
        yield datagram
        time.advance(LATER)

    with UdpPeer(script) as peer:
        results = run(peer, "--count", "50", time=time)
    assert counts(results) == {"sent": 50, "received": 50}


@pytest.mark.parametrize(
    ("refused", "number", "word"), [(1, errno.EPERM, "eperm"), (0, errno.EMSGSIZE, "message_too_long")]
)
def test_a_datagram_that_is_not_sent(refused: int, number: int, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error, and lost after its timeout. EMSGSIZE does not end the measurement even before any echo."""
    time = SimulatedTime()

    class Refusing(socket.socket):
        calls = 0

        def send(self, *arguments: Any) -> int:
            self.calls += 1
            if self.calls == refused + 1:
                time.advance(LATER)
                raise OSError(number, os.strerror(number))
            return super().send(*arguments)

    connect = sockets.connect
    monkeypatch.setattr(sockets, "connect", lambda *arguments: Refusing(fileno=connect(*arguments).detach()))
    with UdpPeer(echo) as peer:
        results = run(peer, "--count", "5", time=time)
    assert counts(results) == {"sent": 5, "received": 4, "lost": 1}
    assert results.errors == {word: 1}
    assert len(peer.clients) == 4
