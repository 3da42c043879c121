"""Slow and hostile clients of the admin listener: time, memory, connections and answers are bounded."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from echod.admin.connection import Connection
from echod.admin.limits import DEFAULT_LIMITS, AdminLimits
from echod.admin.sharing import Shared, Turns
from harness import PATIENCE, reset, until
from virtual_time import run_virtually
from watching import WATCHED, ask, caller, get, place, received

if TYPE_CHECKING:
    from collections.abc import Callable

    from admin_thread import StartAdmin
    from echod.net.listeners import Listener
    from harness import Start

pytestmark = pytest.mark.once

PAGE = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


# Heads and connections


def test_endless_heads(start_admin: StartAdmin) -> None:
    """A head, or input after it, is limited to 16 KiB."""
    admin = start_admin(AdminLimits(patience=1000))
    for start in (
        b"GET / HTTP/1.1\r\nX: ",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n",
    ):
        with caller(admin) as sock:
            sock.sendall(start)
            with pytest.raises(ConnectionError):
                sock.sendall(b"a" * 50_000_000)
    assert get(admin, "/livez").status == 200


def test_asked_and_gone(start: Start) -> None:
    """Resets before, during or after an answer are not logged."""
    daemon = start(*WATCHED, python=("-X", "dev"))
    for number in range(150):
        with caller(daemon) as sock:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * (1 + number % 3))
            if number % 5 == 0:
                sock.recv(1)
            reset(sock)
    assert get(daemon, "/livez").status == 200
    assert daemon.stop() == 0
    assert daemon.loud() == []


def test_silent_clients(start_admin: StartAdmin) -> None:
    """A client that sends no request, or no further request, is closed."""
    admin = start_admin(AdminLimits(patience=0.1))
    with caller(admin) as silent, caller(admin) as idle:
        idle.sendall(LIVEZ)
        assert received(silent) == b""
        assert received(idle).endswith(b"alive\n")
    assert get(admin, "/livez").status == 200


class Peer:
    """Stands for aiohttp's protocol and for the transport. It records all calls."""

    peername = None

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.calls.append((name, *arguments))


def make_connection(take_turn: Callable[[], float] = float) -> tuple[Connection, Any]:
    peer: Any = Peer()
    return Connection(peer, DEFAULT_LIMITS, take_turn, peer.lost), peer


def test_patience() -> None:
    """A head has to be complete after 15 seconds, and the next one 15 seconds later, even if bytes keep arriving."""

    async def drip() -> None:
        loop = asyncio.get_running_loop()
        connection, peer = make_connection()
        connection.connection_made(peer)
        await asyncio.sleep(10)
        connection.data_received(PAGE)
        connection.answered()
        while ("abort",) not in peer.calls:
            connection.data_received(b"a")
            await asyncio.sleep(0.5)
        assert loop.time() == pytest.approx(25.0, abs=0.5)

    run_virtually(drip())


def test_connection_between_two_iterations() -> None:
    """A connection may be aborted before it has a transport, and lost while a request waits for its turn."""

    async def main() -> None:
        delays = iter([0.0, 1.0])
        connection, peer = make_connection(lambda: next(delays))
        connection.abort()
        assert not peer.calls
        connection.connection_made(peer)
        connection.pause_writing()
        connection.data_received(PAGE + PAGE)
        assert [name for name, *_ in peer.calls] == ["connection_made", "pause_writing"]
        connection.resume_writing()
        connection.answered()  # the second request has to wait
        connection.connection_lost(None)
        await asyncio.sleep(2)
        assert peer.calls[2:] == [("resume_writing",), ("data_received", PAGE), ("connection_lost", None), ("lost",)]

    run_virtually(main())


def test_too_many_connections(start_admin: StartAdmin) -> None:
    """At the limit, a new connection replaces the one that has asked for nothing for the longest time."""
    admin = start_admin(AdminLimits(patience=1000))
    with contextlib.ExitStack() as opened:
        connection = http.client.HTTPConnection(*place(admin), timeout=PATIENCE)
        opened.callback(connection.close)
        silent: list[socket.socket] = []
        for _ in range(100):
            assert ask(connection, "/readyz").status == 200
            silent.append(opened.enter_context(caller(admin)))
            if len(silent) == 32:
                assert received(silent.pop(0)) == b""
        assert get(admin, "/livez").status == 200
        assert ask(connection, "/livez").status == 200
        admin.echo(b"x")


def test_reset_while_it_is_accepted(start_admin: StartAdmin) -> None:
    """If the kernel reports a reset while a connection is set up, only that connection ends."""

    def make_loop(base: Any, _: Listener) -> asyncio.AbstractEventLoop:
        class Loop(base):  # type: ignore[misc]
            resets = 1

            async def connect_accepted_socket(self, *arguments: Any, **options: Any) -> Any:
                if self.resets:
                    self.resets -= 1
                    raise ConnectionResetError
                return await super().connect_accepted_socket(*arguments, **options)

        loop: asyncio.AbstractEventLoop = Loop()
        return loop

    admin = start_admin(make_loop=make_loop)
    with caller(admin) as sock:
        assert received(sock) == b""
    assert get(admin, "/livez").status == 200
    assert admin.events == []


# Clients that do not read


def narrow(address: tuple[str, int]) -> socket.socket:
    """Return a client with a small receive buffer."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(PATIENCE)
    sock.connect(address)
    return sock


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_client_that_does_not_read(start_admin: StartAdmin) -> None:
    """Its requests are not answered once the send buffer is full. It is closed in time, and uses little memory."""
    admin = start_admin(AdminLimits(patience=2, answer_interval=0))
    with narrow(place(admin)) as sock:
        before = memory()
        with contextlib.suppress(ConnectionError):
            while True:
                sock.sendall(PAGE)
                assert memory() - before < 10_000_000
    admin.echo(b"x")
    assert admin.events == []


def test_a_reader_that_comes_back(start: Start) -> None:
    """A client that reads late gets all answers in order."""
    daemon = start(*WATCHED)
    with narrow(place(daemon)) as sock:
        count = 380
        sock.sendall(PAGE * count)
        sock.shutdown(socket.SHUT_WR)
        until(lambda: len(sock.recv(65536, socket.MSG_PEEK)) > 0)
        daemon.settle()  # the answers have filled all buffers
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        assert received(sock).count(b"</html>") == count
    assert daemon.stop() == 0


# Turns and shared results


def test_turns() -> None:
    """Turns are an interval apart. Unused turns are not saved."""
    turns = Turns(0.25)
    assert [turns.take(10.0) for _ in range(3)] == [0.0, 0.25, 0.5]
    assert turns.take(10.5) == 0.25
    assert [turns.take(20.0) for _ in range(2)] == [0.0, 0.25]


def test_requests_take_turns(start_admin: StartAdmin) -> None:
    """All connections share the turns."""
    admin = start_admin(AdminLimits(answer_interval=1000, patience=0.2))
    assert get(admin, "/livez").status == 200
    with caller(admin) as sock:
        sock.sendall(LIVEZ)
        assert received(sock) == b""


def test_many_requests(start: Start) -> None:
    """Requests that wait for their turn are all answered, and the echo goes on."""
    daemon = start(*WATCHED)
    answered: list[int] = []

    def hammer() -> None:
        with caller(daemon) as sock:
            sock.sendall(LIVEZ * 100)
            sock.shutdown(socket.SHUT_WR)
            answered.append(received(sock).count(b"alive"))

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    daemon.echo(b"x")
    for thread in threads:
        thread.join()
    assert answered == [100] * 3


def test_shared_result() -> None:
    """A result is made once for all waiting callers, begins after their calls, and is followed by a rest."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        begun: list[float] = []
        third = asyncio.Event()

        async def make() -> bytes:
            begun.append(loop.time())
            if len(begun) == 3:
                third.set()
            await asyncio.sleep(1 if len(begun) == 4 else 0.0625)
            return str(len(begun)).encode()

        shared = Shared(make, AdminLimits(rest_factor=9, longest_rest=1.0))
        assert await asyncio.gather(*(shared.get() for _ in range(5))) == [b"1"] * 5
        late = loop.create_task(shared.get())
        assert {await shared.get(), await late} == {b"2"}
        running = loop.create_task(shared.get())
        await third.wait()
        assert await shared.get() == b"4"  # making the third had begun before this call
        assert await running == b"3"
        await shared.get()
        assert begun == [0, 0.625, 1.25, 1.875, 3.875]  # the last rest is the longest one

    run_virtually(main())
