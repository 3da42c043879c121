"""Faults under limits, in a stop, and beside listeners without a fault."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from fault_lab import connect, drain, is_silent, send_until_stuck
from harness import receive, reset

if TYPE_CHECKING:
    from harness import Start


def profiles(*faults: str, mode: str = "stream") -> list[str]:
    """Return the options for faults and their listeners, which are named a, b and so on.

    Args:
        faults: the keys of each fault, as `key=value key=value`.
        mode: the mode of the listeners.

    """
    options = []
    for name, fault in zip("abcdef", faults, strict=False):
        options += [f"--faults.{name}.{part}" for part in fault.split()]
        options += [f"--listeners.{name}.address=127.0.0.1:0", f"--listeners.{name}.fault={name}"]
        options += [f"--listeners.{name}.mode={mode}"]
    return options


def test_line_tails(start: Start) -> None:
    """At the client's EOF, an unfinished line is a message. A line that is too long ends the session after the others."""
    daemon = start(
        *profiles("action=duplicate", "action=stall", "delay=0.2", mode="line"),
        *("--limits.max-line=20", "--shutdown.quiet-period=0.2"),
        listen=None,
    )
    with connect(daemon, "a") as client:
        client.sendall(b"ab\ncd")
        client.shutdown(socket.SHUT_WR)
        assert drain(client) == b"ab\nab\ncdcd"
    with connect(daemon, "b") as client:
        client.sendall(b"ab")
        client.shutdown(socket.SHUT_WR)
        assert is_silent(daemon, client)
    with connect(daemon, "c") as client:
        client.sendall(b"ab\n" + bytes(30))
        assert drain(client) == b"ab\n"
    line = daemon.wait_for("client_closed", listener="c")
    assert (line["reason"], line["sent"]) == ("line_too_long", 3)
    with connect(daemon, "c") as client:
        client.sendall(b"cd\nef")
        client.shutdown(socket.SHUT_WR)
        assert drain(client) == b"cd\nef"
    with connect(daemon, "c") as client:
        client.sendall(b"gh\nij")
        assert receive(client, 3) == b"gh\n"
        daemon.send_signal()
        assert drain(client) == b"ij"
    assert daemon.wait() == 0
    assert daemon.receipt()["quiet"] == 2
    assert daemon.wait_for("client_closed", listener="b")["fault"] == "b"


def test_memory_is_bounded(start: Start) -> None:
    """Above the write buffer, reading pauses, whatever the delay or rate. All echo arrives in order."""
    daemon = start(
        *profiles("delay=1", "rate=20MB", "trigger=never action=close"), "--limits.write-buffer=100KiB", listen=None
    )
    with connect(daemon, "a") as client:
        assert send_until_stuck(daemon, client, bytes(20_000_000)) < 20_000_000
        reset(client)
    pattern = bytes(range(251)) * 60_000
    for listener in "bc":
        with connect(daemon, listener, SO_RCVBUF=4096) as client:
            sent = send_until_stuck(daemon, client, pattern)
            assert sent < len(pattern)
            sender = threading.Thread(target=client.sendall, args=(pattern[sent:],))
            sender.start()
            assert receive(client, len(pattern)) == pattern
            sender.join()
    assert daemon.stop() == 0


def test_limits_hold(start: Start) -> None:
    """idle_timeout closes a client without echo, and write_timeout resets a client that does not take its echo."""
    daemon = start(
        *profiles(
            "action=stall",
            "action=blackhole",
            "after_bytes=9 action=half_close",
            "slice=10000",
            "rate=50MB",
            mode="line",
        ),
        *("--limits.idle-timeout=0.8", "--limits.write-timeout=0.8", "--shutdown.linger-timeout=0.2"),
        listen=None,
    )
    with contextlib.ExitStack() as clients:
        quiet = [clients.enter_context(connect(daemon, listener)) for listener in "abc"]
        for client in quiet:
            client.sendall(b"x\n")
        daemon.settle()  # so that the stalled session leaves the rest unread
        for client in quiet:
            client.sendall(b"y" * 1000 + b"\n")
        greedy = [clients.enter_context(connect(daemon, listener, SO_RCVBUF=4096)) for listener in "de"]
        threads = [threading.Thread(target=flood, args=(client,)) for client in greedy]
        for thread in threads:
            thread.start()
        for listener in "abc":
            line = daemon.wait_for("client_closed", listener=listener)
            assert (line["reason"], line["fault"], line["sent"]) == ("idle", listener, 1003 if listener == "c" else 0)
        for listener in "de":
            assert daemon.wait_for("client_closed", listener=listener)["reason"] == "stalled"
        for thread in threads:
            thread.join()
    assert daemon.stop() == 0


def flood(client: socket.socket) -> None:
    """Send until the connection is closed, and read nothing."""
    with contextlib.suppress(OSError):
        while True:
            client.sendall(b"." * 50_000 + b"\n")


def test_stop(start: Start) -> None:
    """No fault delays a stop beyond its timeouts, and a stop loses no held echo."""
    daemon = start(
        *profiles("action=stall", "action=blackhole", "delay=60", "rate=1000", "after_seconds=0 action=half_close"),
        *("--shutdown.quiet-period=0.3", "--shutdown.drain-timeout=1.2", "--shutdown.linger-timeout=1"),
        listen=None,
    )
    with contextlib.ExitStack() as clients:
        stalled, flooding, dropped, late, left, slow, half = (
            clients.enter_context(connect(daemon, listener)) for listener in "aabccde"
        )
        stalled.sendall(b"x")
        late.sendall(b"late")
        left.sendall(b"left")
        left.shutdown(socket.SHUT_WR)
        slow.sendall(bytes(30_000))
        assert slow.recv(1) == b"\0"
        assert half.recv(1) == b""
        threads = [threading.Thread(target=flood, args=(client,)) for client in (flooding, dropped)]
        for thread in threads:
            thread.start()
        daemon.send_signal(signal.SIGTERM)
        assert stalled.recv(1) == b""
        stalled.close()
        assert drain(late) == b"late"
        assert drain(left) == b"left"
        assert len(drain(slow)) == 29_999
        for client in (late, left, slow):
            client.close()
        assert daemon.wait() == 0
        for thread in threads:
            thread.join()
    receipt = daemon.receipt()
    assert receipt["seconds"] < 1.2 + 1 + 5
    assert receipt["clients"] == 7
    assert receipt["aborted"] == 0
    reasons = {(line["listener"], line["reason"]) for line in daemon.all("client_closed")}
    assert reasons == {("a", "quiet"), ("b", "cut"), ("c", "cut"), ("c", "eof"), ("d", "cut"), ("e", "quiet")}
    assert daemon.wait_for("stopped")["faults"] == {"a": 2, "b": 1, "c": 2, "d": 1, "e": 1}


def test_second_signal(start: Start) -> None:
    """Held echo does not delay a forced stop."""
    daemon = start(*profiles("delay=60"), listen=None)
    with connect(daemon, "a") as client:
        client.sendall(b"x")
        daemon.settle()
        daemon.send_signal()
        daemon.wait_for("draining")
        daemon.send_signal()
        assert daemon.wait() == 143
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_listener_without_a_fault(start: Start) -> None:
    """Beside a listener with a fault, one without a fault logs none."""
    daemon = start(*profiles("delay=1"), "--listeners.plain.address=127.0.0.1:0", listen=None)
    with connect(daemon, "plain") as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    assert "fault" not in daemon.wait_for("client_closed", listener="plain")
    daemon.stop()
    assert "faults" not in daemon.wait_for("stopped")
