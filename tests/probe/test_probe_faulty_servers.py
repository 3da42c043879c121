"""Measurements of servers with a wrong or incomplete echo."""

from __future__ import annotations

import random
import socket
import threading
from typing import Any

import pytest

from echod.probe.connection import PERIOD
from harness import PATIENCE, run
from peers import Peer, change, each, echo, ending, messages, resetting, silent
from probing import measure

pytestmark = pytest.mark.once


def test_finds_a_wrong_byte() -> None:
    """The report has the connection, the offset and both bytes. The other connections continue."""
    with Peer(each(change(12_345), echo)) as peer:
        found = measure(peer.target, "--count", "5000", "--connections", "2", "--size", "100", code=1)
    assert found["errors"] == {"wrong_echo": 1}
    mismatch = found["mismatch"]
    assert mismatch["offset"] == 12_345
    assert mismatch["got"] == mismatch["expected"] ^ 1
    assert mismatch["connection"] in {0, 1}
    assert found["problem"] == (
        f"connection {mismatch['connection']}: wrong echo at offset 12345:"
        f" expected 0x{mismatch['expected']:02x}, got 0x{mismatch['got']:02x}"
    )
    assert found["messages"] + found["unanswered"] == 5000


class Swapped:
    """Sends the echo of the fifth message after that of the sixth."""

    def __init__(self) -> None:
        self._held = b""

    def __call__(self, sock: socket.socket, number: int, message: bytes) -> None:
        if number == 4:
            self._held = message
        else:
            sock.sendall(message + self._held)
            self._held = b""


def lost(sock: socket.socket, number: int, message: bytes) -> None:
    if number != 4:
        sock.sendall(message)


def doubled(sock: socket.socket, number: int, message: bytes) -> None:
    sock.sendall(message * (1 + (number == 4)))


@pytest.mark.parametrize("act", [Swapped(), lost, doubled])
def test_finds_misplaced_messages(act: Any) -> None:
    """A swapped, lost or doubled message is found, although its bytes are right elsewhere."""
    with Peer(messages(512, act)) as peer:
        found = measure(peer.target, "--count", "20", "--size", "512", "--pipeline", "8", code=1)
    assert found["errors"] == {"wrong_echo": 1}
    # The first bytes of two messages may be equal by chance.
    expected = 5 if act is doubled else 4
    assert expected * 512 <= found["mismatch"]["offset"] < expected * 512 + 8


def test_finds_the_echo_of_another_connection() -> None:
    """Each connection sends different bytes."""
    waiting: list[socket.socket] = []
    both = threading.Barrier(2)

    def handler(sock: socket.socket) -> None:
        waiting.append(sock)
        message = sock.recv(64, socket.MSG_WAITALL)
        both.wait(PATIENCE)
        waiting[waiting[0] is sock].sendall(message)
        silent(sock)

    with Peer(handler) as peer:
        found = measure(peer.target, "--count", "2", "--connections", "2", code=1)
    assert found["errors"] == {"wrong_echo": 2}


def test_finds_more_than_was_sent() -> None:
    def handler(sock: socket.socket) -> None:
        sock.sendall(sock.recv(64, socket.MSG_WAITALL) + b"!!")
        silent(sock)

    with Peer(handler) as peer:
        found = measure(peer.target, "--count", "1", code=1)
        assert found["mismatch"] == {"connection": 0, "offset": 64, "expected": None, "got": 0x21}
        assert run("probe", peer.target, "--count", "1").stderr == (
            f"echod: {peer.target}: connection 0: wrong echo at offset 64: expected nothing, as no more had been sent,"
            " got 0x21 (errors by kind: wrong_echo 1)\n"
        )


def test_finds_what_it_would_have_sent_next() -> None:
    """An echo that arrives before its message is wrong, even if the bytes are right."""
    coming = random.Random(5).randbytes(PERIOD)[:65]

    def handler(sock: socket.socket) -> None:
        assert sock.recv(64, socket.MSG_WAITALL) == coming[:64]
        sock.sendall(coming)
        silent(sock)

    with Peer(handler) as peer:
        found = measure(peer.target, "--count", "1", "--seed", "5", code=1)
    assert found["mismatch"] == {"connection": 0, "offset": 64, "expected": None, "got": coming[64]}


def test_errors_by_kind() -> None:
    """The error of each connection is counted. Messages before the error count too."""
    with Peer(each(ending(640), resetting(640), silent, echo)) as peer:
        options = ("--connections", "4", "--duration", "1", "--timeout", "0.3")
        found = measure(peer.target, *options, code=1)
    assert found["errors"] == {"early_eof": 1, "reset": 1, "timeout": 1}
    assert found["messages"] > 20
    assert found["unanswered"] == 3


def test_half_close_finds_an_early_end() -> None:
    """A server that closes on our FIN, before it has sent the whole echo, is found."""

    def handler(sock: socket.socket) -> None:
        data = sock.recv(64, socket.MSG_WAITALL)
        assert sock.recv(1) == b""
        sock.sendall(data[:60])

    with Peer(handler) as peer:
        found = measure(peer.target, "--count", "1", "--half-close", code=1)
        assert found["errors"] == {"early_eof": 1}
        assert found["problem"] == "connection 0: the server closed it with 4 bytes of echo missing"


def test_some_connections_refused() -> None:
    """The exit code is 69 only if no connection could be opened."""
    listening = socket.create_server(("127.0.0.1", 0))

    def handler(sock: socket.socket) -> None:
        # Accept one connection only. The others are refused, or reset in the backlog.
        listening.shutdown(socket.SHUT_RDWR)
        echo(sock)

    with Peer(handler, listening) as peer:
        found = measure(peer.target, "--count", "5000", "--connections", "200", code=1)
    assert 1 <= found["connected"] < 200
    assert found["errors"]["refused"] > 0
