"""System calls that fail: each client is served, or has one truthful line; the next clients notice nothing.

strace makes the calls of a running daemon fail. `make syscalls` runs the whole table, and a normal test run its core.
close(2) is not in the table: Linux closes the descriptor even if it reports an error, and strace cannot do that.
"""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from crowd import Crowd
from harness import PATIENCE, until
from injection import injected

if TYPE_CHECKING:
    from collections.abc import Iterable

    from certificates import Certificates, TlsSocket
    from crowd import Peer
    from harness import Daemon, Event, Start

WHOLE = os.environ.get("SYSCALLS") == "all"
CLIENTS = 6
SIZE = 100_000
RECORD = 16384
QUICK = (
    *("--log.connections", "all", "--shutdown.quiet-period", "0.1"),
    *("--shutdown.drain-timeout", "5", "--shutdown.linger-timeout", "2"),
)

READ = "read,readv,recvfrom,recvmsg"
WRITE = "write,writev,sendto,sendmsg"
WAIT = "epoll_wait,epoll_pwait,epoll_pwait2"


class Case(NamedTuple):
    """A system call that fails while clients are served."""

    call: str
    error: str
    when: str
    """Which of the calls fail, as strace counts them: N, N+STEP or N..M."""
    ends: tuple[str, ...] = ()
    """Reason and detail of clients that are not served as usual. Empty: all are."""
    loops: str = "uvloop asyncio"
    core: bool = False

    def __str__(self) -> str:
        return f"{self.call.partition(',')[0]}-{self.error}-{self.when}"


def chosen(cases: Iterable[Case]) -> list[tuple[str, Case]]:
    """Return the cases that this run tests, each with the loops that make the call."""
    return [(loop, case) for case in cases if case.core or WHOLE for loop in case.loops.split()]


CASES = [
    # No descriptors or no memory: a pause. The connections stay in the backlog.
    *(Case("accept4", error, "1..3") for error in ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM")),
    # The connection is gone, or a signal or filter came between: another try.
    *(Case("accept4", error, "1+2") for error in ("ECONNABORTED", "EPROTO", "EPERM", "EINTR", "EAGAIN", "ENETDOWN")),
    *(Case(READ, error, "3+5", ("io_error read: " + error,), core=error == "ENOMEM") for error in ("ENOMEM", "EIO")),
    *(Case(READ, error, "3+5", ("reset",)) for error in ("ECONNRESET", "ETIMEDOUT", "EHOSTUNREACH")),
    *(Case(READ, error, "2+2") for error in ("EINTR", "EAGAIN")),
    *(
        Case(WRITE, error, "2+3", ("io_error write: " + error,), core=error == "ENOBUFS")
        for error in ("ENOBUFS", "ENOMEM")
    ),
    *(Case(WRITE, error, "2+3", ("reset",)) for error in ("ECONNRESET", "EPIPE", "ETIMEDOUT", "EHOSTUNREACH")),
    *(Case(WRITE, error, "2+2") for error in ("EINTR", "EAGAIN")),
    # libuv aborts the process if epoll_ctl(2) fails.
    *(Case("epoll_ctl", error, when, loops="asyncio") for error in ("ENOSPC", "ENOMEM") for when in ("1", "2", "3")),
    Case(WAIT, "EINTR", "1+2"),
    # The counters of the kernel: the figures are estimates.
    *(Case("getsockopt", error, "1+1", ("eof estimate",)) for error in ("ENOBUFS", "ENOMEM")),
    Case("ioctl", "ENOMEM", "2+5", ("io_error system call: ENOMEM", "eof estimate")),
    Case("setsockopt", "ENOBUFS", "1+2", ("io_error system call: ENOBUFS",), loops="uvloop"),
    *(Case(call, "ENOBUFS", "1+1") for call in ("getsockname", "getpeername")),
]


class Seen(NamedTuple):
    """A connection as its client saw it."""

    end: str
    sent: int
    received: int


class Scene:
    """A daemon with one listener, and its clients, each with an address of its own, as ports may be used again."""

    def __init__(self, start: Start, certificates: Certificates, transport: str) -> None:
        is_tls = transport == "tls"
        listener = certificates.options("echo") if is_tls else ("--listeners.echo.address", "127.0.0.1:0")
        self.daemon = start(*listener, *QUICK, listen=None)
        self.clients = 0
        self._certificates = certificates
        self._transport = transport

    def connect(self) -> tuple[str, TlsSocket | None]:
        """Return the name of a new client, and its socket or None if the daemon has reset it before the payload."""
        self.clients += 1
        sock = socket.socket()
        sock.settimeout(PATIENCE)
        sock.bind((f"127.1.{self.clients // 250}.{self.clients % 250 + 1}", 0))
        name = "{}:{}".format(*sock.getsockname())
        try:
            sock.connect(self.daemon.address)
            return name, self._certificates.over(sock) if self._transport == "tls" else sock  # type: ignore[return-value]  # it has the same methods
        except OSError:
            sock.close()
            return name, None

    def serve(self, *, logged: bool = True) -> dict[str, Seen]:
        """Let clients send and read until the end. Return what they saw; if `logged`, once each has its line."""
        peers: dict[str, Peer] = {}
        seen: dict[str, Seen] = {}
        with Crowd() as crowd:
            for number in range(CLIENTS):
                name, sock = self.connect()
                if sock is None:
                    seen[name] = Seen("handshake", 0, 0)
                else:
                    peers[name] = crowd.add(sock, SIZE, number)
            crowd.finish()
        assert not any(peer.wrong for peer in peers.values())
        if logged:
            self.daemon.wait_for("client_closed", count=self.clients)
        return seen | {name: Seen(peer.end, peer.sent, peer.received) for name, peer in peers.items()}

    def lines(self) -> dict[str, Event]:
        """Return the line of each client so far."""
        lines = self.daemon.all("client_closed")
        assert len(lines) == self.clients
        return {line["peer"]: line for line in lines}

    def check(self, seen: dict[str, Seen], *ends: str) -> None:
        """Compare the clients' lines with what the clients saw. If `ends` are given, at least one client ended so."""
        lines = self.lines()
        found = set()
        for name, client in seen.items():
            line = lines[name]
            context = f"{client} {line}"
            found.add(end := ending(line))
            assert end in {"eof", *ends}, context
            assert line["acked"] <= client.received, context
            # A TLS client may have sent a record that it does not count yet.
            assert line["received"] <= client.sent + (RECORD if self._transport == "tls" else 0), context
            if self._transport == "plain" and not end.endswith("estimate"):
                assert line["sent"] >= client.received, context
            if client.end == "eof":  # FIN says that the echo is complete
                assert client.sent == client.received == SIZE, context
            if line["reason"] == "eof":
                assert client.sent == client.received == SIZE, context
                assert line["received"] == line["sent"] == line["acked"] == SIZE, context
                # Over TLS, the client has all of its echo before echod's close_notify, which may fail.
                assert client.end == "eof" or self._transport == "tls", context
        assert found & set(ends) or not ends

    def check_log(self) -> None:
        """Check that there is no traceback, and that the only problems are pauses of accepting."""
        assert {event["event"] for event in self.daemon.loud()} <= {"accept_paused"}
        assert len(self.daemon.events) == len(self.daemon.raw)

    def check_totals(self) -> None:
        """Check that the totals of the whole run are the sums of the lines."""
        totals = self.daemon.wait_for("stopped")
        lines = self.lines().values()
        for field in ("received", "sent", "acked", "discarded_bytes"):
            assert totals[field] == sum(line[field] for line in lines)
        assert (totals["connections"], totals["accept_failures"]) == (self.clients, 0)


def ending(line: Event) -> str:
    """Return the reason and the detail of a line, with estimated figures as such."""
    detail = line.get("detail", "")
    return f"{line['reason']} {'estimate' if detail.startswith('sent and acked are estimates') else detail}".strip()


def descriptors(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))


@pytest.fixture(params=["plain", "tls"])
def scene(request: pytest.FixtureRequest, start: Start, certificates: Certificates) -> Scene:
    return Scene(start, certificates, request.param)


@pytest.mark.parametrize(("loop_name", "call"), dict.fromkeys((loop, case.call) for loop, case in chosen(CASES)))
def test_while_serving(scene: Scene, loop_name: str, call: str) -> None:
    """After each failure, the next clients are served without one, no descriptor is lost, and the stop is in time."""
    scene.check(scene.serve())
    open_before = descriptors(scene.daemon)
    for loop, case in chosen(CASES):
        if (loop, case.call) == (loop_name, call):
            with injected(scene.daemon, f"{call}:error={case.error}:when={case.when}"):
                seen = scene.serve()
            scene.check(seen, *case.ends)
            scene.check(scene.serve())
            until(lambda: descriptors(scene.daemon) == open_before)
    assert scene.daemon.stop() == 0
    scene.check_totals()
    scene.check_log()


# During a stop, a reload, and in the writer of the log

STOPS = [
    Case("shutdown", "ENOBUFS", "1+2", ("io_error shutdown: ENOBUFS",)),
    *(Case("getsockopt", error, "1+1", ("quiet estimate",)) for error in ("ENOBUFS", "ENOMEM")),
    # Without SIOCOUTQ, it is unknown whether a client has its echo, so it is closed at the end of the drain.
    Case("ioctl", "ENOMEM", "1+1", ("cut estimate",)),
    Case("accept4", "EMFILE", "1+1"),
    Case(READ, "EINTR", "1+2"),
    Case(WAIT, "EINTR", "1+2"),
    # uvloop opens a pair of sockets at the very end.
    Case("socketpair", "EMFILE", "1+1", loops="uvloop", core=True),
]


@pytest.mark.parametrize(("loop_name", "case"), chosen(STOPS), ids=str)
def test_during_a_stop(scene: Scene, case: Case) -> None:
    """The stop ends in time with exit code 0. Each client has its line, and gets FIN unless its end is a failure."""
    clients = {}
    for _ in range(CLIENTS):
        name, sock = scene.connect()
        assert sock is not None
        sock.send(b"hello")
        assert sock.recv(5) == b"hello"
        clients[name] = sock
    ends = {}
    with injected(scene.daemon, f"{case.call}:error={case.error}:when={case.when}"):
        scene.daemon.send_signal()
        for name, sock in clients.items():
            with sock:
                try:
                    ends[name] = "eof" if not sock.recv(1) else "data"
                except OSError as error:
                    ends[name] = type(error).__name__
        assert scene.daemon.wait() == 0
    scene.check_totals()
    scene.check_log()
    found = set()
    for name, line in scene.lines().items():
        found.add(end := ending(line))
        assert end in {"quiet", *case.ends}
        assert (line["received"], line["sent"], line["acked"]) == (5, 5, 5)
        # A TLS client has echod's close_notify before the failure.
        assert ends[name] == "eof" or (line["reason"] == "io_error" and ends[name] == "ConnectionResetError")
    assert found & set(case.ends) or not case.ends
    assert scene.daemon.receipt()["clients"] == CLIENTS


RELOADS = [
    *(Case("openat", error, "1+1", core=error == "EMFILE") for error in ("EMFILE", "ENFILE", "EACCES", "EIO")),
    *(Case("clone3,clone", error, "1+1") for error in ("EAGAIN", "ENOMEM")),
    *(Case("listen", error, "1+1") for error in ("ENOBUFS", "EADDRINUSE")),
    *(Case("memfd_create", error, "1+1") for error in ("EMFILE", "ENOMEM")),
]


@pytest.mark.parametrize("scene", ["tls"], indirect=True)
def test_during_reloads(scene: Scene, loop_name: str) -> None:
    """Each failed reload is logged, and changes nothing. The next one succeeds, and clients are served in between."""
    for number, case in enumerate((case for loop, case in chosen(RELOADS) if loop == loop_name), 1):
        with injected(scene.daemon, f"{case.call}:error={case.error}:when={case.when}", threads="all"):
            scene.daemon.send_signal(signal.SIGHUP)
            problems = scene.daemon.wait_for("reload_failed", count=number)["problems"]
        assert problems
        scene.daemon.send_signal(signal.SIGHUP)
        scene.daemon.wait_for("reloaded", count=number)
        scene.check(scene.serve())
    assert {event["event"] for event in scene.daemon.loud()} == {"reload_failed"}
    assert scene.daemon.stop() == 0
    scene.check_totals()


LOG_ERRORS = {"ENOSPC": True, "EIO": True, "EPIPE": True, "EINTR": False, "EAGAIN": False}


@pytest.mark.parametrize("scene", ["plain"], indirect=True)
def test_in_the_writer_of_the_log(scene: Scene) -> None:
    """A line that cannot be written is counted as dropped, and the clients notice nothing. Other lines are written."""
    daemon = scene.daemon
    losses = dropped = 0
    for error, loses in LOG_ERRORS.items():
        if not (WHOLE or error == "ENOSPC"):
            continue
        with injected(daemon, f"write:error={error}:when=1", threads="others"):
            seen = scene.serve(logged=False)
        assert set(seen.values()) == {Seen("eof", SIZE, SIZE)}
        daemon.echo(b"one more line")
        scene.clients += 1
        if loses:
            losses += 1
            dropped += daemon.wait_for("log_lines_dropped", count=losses)["lines"]
    assert daemon.stop() == 0
    assert daemon.wait_for("stopped")["connections"] == scene.clients
    assert sum(line["lines"] for line in daemon.all("log_lines_dropped")) == dropped
    assert len(daemon.all("client_closed")) + dropped == scene.clients
    assert len(daemon.events) == len(daemon.raw)
