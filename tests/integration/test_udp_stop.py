"""The stop of UDP listeners: nothing that has arrived stays without an answer."""

from __future__ import annotations

import signal
import socket
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

import pytest

from harness import PATIENCE, UNHURRIED
from inheriting import hand_over
from udp_clients import AT_ONCE, UNLIMITED, ask, client, flow, udp_address

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Start

LOOPBACK = "udp:127.0.0.1:0"


@pytest.fixture
def owned() -> Iterator[ExitStack]:
    """Yield a stack that closes the sockets of the test."""
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("listen", [LOOPBACK, "udp:0.0.0.0:0", "udp:[::1]:0", "udp:[::]:0"])
def test_queue_is_answered(start: Start, owned: ExitStack, listen: str) -> None:
    """At the end of a stop, everything in the socket's queue is answered. The receipt adds up."""
    daemon = start(*UNLIMITED, *AT_ONCE, listen=listen)
    host, port = udp_address(daemon)
    sock = owned.enter_context(client(({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)))
    assert ask(sock, b"first") == b"first"
    daemon.freeze()
    messages = {b"%d" % number for number in range(400)}
    for message in messages:
        sock.send(message)
    daemon.send_signal()
    daemon.send_signal(signal.SIGCONT)
    assert daemon.wait() == 0
    assert {sock.recv(10) for _ in messages} == messages
    with pytest.raises(ConnectionRefusedError):
        ask(sock, b"late")
    receipt, line = daemon.receipt(), flow(daemon, sock)
    assert (receipt["flows"], receipt["datagrams_unanswered"]) == (1, 0)
    assert receipt["datagrams_received"] == receipt["datagrams_sent"]
    assert (line["received_datagrams"], line["sent_datagrams"]) == (401, 401)


def test_stop_waits_for_silence(start: Start, owned: ExitStack) -> None:
    """During a drain, datagrams are answered until every flow is silent."""
    daemon = start(*UNHURRIED, listen=LOOPBACK)
    sock = owned.enter_context(client(udp_address(daemon)))
    assert ask(sock, b"x") == b"x"
    daemon.send_signal()
    draining = daemon.wait_for("draining")
    assert (draining["clients"], draining["flows"]) == (0, 1)
    assert ask(sock, b"y") == b"y"
    daemon.send_signal(signal.SIGINT)
    assert daemon.wait() == 128 + signal.SIGINT
    assert flow(daemon, sock)["reason"] == "aborted"
    receipt = daemon.receipt()
    assert (receipt["datagrams_received"], receipt["datagrams_sent"]) == (1, 1)


def test_silent_flows(start: Start, owned: ExitStack) -> None:
    """A stop ends as soon as the flows were silent for `quiet_period`, long before `drain_timeout`."""
    quiet = ("--shutdown.quiet-period", "0.05", "--shutdown.drain-timeout", "3600")
    daemon = start(*quiet, listen=LOOPBACK)
    sock = owned.enter_context(client(udp_address(daemon)))
    assert ask(sock, b"x") == b"x"
    assert daemon.stop() == 0
    assert flow(daemon, sock)["reason"] == "quiet"


def test_flow_that_is_not_silent(start: Start, owned: ExitStack) -> None:
    """A flow that is still active at `drain_timeout` is cut, after its answers."""
    daemon = start("--shutdown.quiet-period", "3600", "--shutdown.drain-timeout", "0.05", listen=LOOPBACK)
    sock = owned.enter_context(client(udp_address(daemon)))
    assert ask(sock, b"x") == b"x"
    assert daemon.stop() == 0
    assert flow(daemon, sock)["reason"] == "cut"


class Prober:
    """Send numbered datagrams, a few at a time, until `stop`, and receive the answers.

    Args:
        address: of the daemon.

    """

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = client(address)
        self.sent = 0
        self.answered: set[int] = set()
        self._stop = threading.Event()
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        self.sock.close()

    def wait_for(self, answers: int) -> None:
        """Wait until this many datagrams were answered."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.answered) >= answers, PATIENCE)

    def finish(self) -> None:
        """Stop to send, and wait for all answers."""
        self._stop.set()
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        while len(self.answered) < self.sent or not self._stop.is_set():
            while self.sent - len(self.answered) < 20 and not self._stop.is_set():
                self.sock.send(b"%d" % self.sent)
                self.sent += 1
            number = int(self.sock.recv(20))
            with self._news:
                self.answered.add(number)
                self._news.notify_all()


def test_restarts_of_an_inherited_socket(loop_name: str, owned: ExitStack) -> None:
    """Over restarts under load, no datagram to an inherited socket is lost: the next process reads the queue."""
    sock = owned.enter_context(socket.socket(type=socket.SOCK_DGRAM))
    sock.bind(("127.0.0.1", 0))
    answered = 0
    with Prober(sock.getsockname()) as prober:
        for _ in range(5):
            with hand_over([sock], "echo", *UNLIMITED, loop_name=loop_name) as daemon:
                daemon.wait_for("listening")
                before = len(prober.answered)
                prober.wait_for(before + 100)
                assert daemon.stop() == 0
                line = flow(daemon, prober.sock)
                assert (line["reason"], line["dropped"]) == ("handed_over", 0)
                answered += line["sent_datagrams"]
        with hand_over([sock], "echo", *UNLIMITED, loop_name=loop_name) as daemon:
            prober.finish()
            assert daemon.stop() == 0
            answered += sum(line["sent_datagrams"] for line in daemon.all("flow_closed"))
    assert prober.answered == set(range(prober.sent))
    assert answered == prober.sent


def test_delay_before_the_drain(loop_name: str, owned: ExitStack) -> None:
    """An inherited socket is read during `delay`. A second signal ends the delay."""
    sock = owned.enter_context(socket.socket(type=socket.SOCK_DGRAM))
    sock.bind(("127.0.0.1", 0))
    with hand_over([sock], "echo", "--shutdown.delay", "3600", loop_name=loop_name) as daemon:
        peer = owned.enter_context(client(sock.getsockname()))
        daemon.send_signal()
        daemon.wait_for("draining")
        assert ask(peer, b"x") == b"x"
        daemon.send_signal()
        assert daemon.wait() == 128 + signal.SIGTERM
        assert daemon.receipt()["datagrams_sent"] == 1
