"""The admin listener pauses if the kernel refuses a connection, and goes on afterwards."""

from __future__ import annotations

import errno
import resource
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest

from harness import PATIENCE, UNHURRIED, receive
from watching import WATCHED, caller, get, place, received, scrape

if TYPE_CHECKING:
    import asyncio

    from admin_thread import MakeLoop, StartAdmin
    from echod.net.listeners import Listener
    from harness import Start

pytestmark = pytest.mark.once


def test_no_descriptor_for_a_connection(start: Start) -> None:
    """Without a free descriptor, a client waits in the backlog, and is answered once there is one: one pause, logged."""
    daemon = start(*WATCHED)
    soft, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (3, hard))
    with caller(daemon) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        paused = daemon.wait_for("accept_paused")
        assert (paused["listener"], paused["cause"], paused["clients"]) == ("admin", "EMFILE", 0)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert received(sock).endswith(b"alive\n")
    resumed = daemon.wait_for("accept_resumed")
    assert resumed["listener"] == "admin"
    assert resumed["seconds"] >= 0
    assert scrape(daemon)["echod_admin_accept_pauses_total",] == 1
    assert (len(daemon.all("accept_paused")), len(daemon.all("accept_resumed"))) == (1, 1)
    daemon.echo(b"x")
    assert daemon.stop() == 0


def refuse(errors: list[Exception]) -> MakeLoop:
    """Return a maker of loops that refuse to watch the admin listener, once for each error."""

    def make_loop(base: Any, listener: Listener) -> asyncio.AbstractEventLoop:
        class Loop(base):  # type: ignore[misc]
            def add_reader(self, fd: object, *arguments: Any) -> None:
                if errors and any(fd is listening.sock for listening in listener.sockets):
                    raise errors.pop()
                super().add_reader(fd, *arguments)

        loop: asyncio.AbstractEventLoop = Loop()
        return loop

    return make_loop


def test_socket_cannot_be_watched(start_admin: StartAdmin) -> None:
    """If epoll_ctl(2) fails, the listener tries again: one pause, logged."""
    admin = start_admin(make_loop=refuse([OSError(errno.ENOSPC, "no room") for _ in range(4)]))
    assert get(admin, "/livez").status == 200
    paused, resumed = admin.wait_for("accept_paused"), admin.wait_for("accept_resumed")
    assert paused == {
        "event": "accept_paused",
        "level": "warning",
        "listener": "admin",
        "cause": "ENOSPC",
        "clients": 0,
    }
    assert (resumed["listener"], resumed["level"]) == ("admin", "info")
    assert scrape(admin)["echod_admin_accept_pauses_total",] == 1
    assert len(admin.events) == 2
    admin.echo(b"x")


def test_stop_during_a_pause(start_admin: StartAdmin) -> None:
    """The stop does not wait for the end of a pause."""
    admin = start_admin(make_loop=refuse([OSError(errno.ENOSPC, "no room") for _ in range(10_000)]))
    admin.wait_for("accept_paused")
    with socket.create_connection(place(admin), PATIENCE) as waiting:
        admin.stop()
        with pytest.raises(ConnectionResetError):
            waiting.recv(1)


def test_defect_of_the_listener_task(start_admin: StartAdmin) -> None:
    """If the listener task dies of a defect, `wait_failed` returns its exception, and the stop closes everything."""
    admin = start_admin(make_loop=refuse([KeyError("a bug")]))
    failure = admin.wait_failed()
    assert (type(failure), failure.args) == (KeyError, ("a bug",))
    admin.stop()
    with pytest.raises(ConnectionRefusedError):
        caller(admin)


# The listener task of the admin listener fails at the first connection.
FAILING_LISTENER = """
import sys
from echod import cli
from echod.admin import connections
def fail(*_):
    raise ArithmeticError("a defect")
connections.Connections.add = fail
sys.exit(cli.main())
"""


@pytest.mark.parametrize("draining", [False, True])
def test_defect_ends_the_daemon(start: Start, *, draining: bool) -> None:
    """The daemon logs `crashed`, drains its clients, and exits with code 1, also if a stop has begun already."""
    daemon = start(*WATCHED, *UNHURRIED, module=("-c", FAILING_LISTENER))
    with daemon.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        if draining:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait_for("draining")
        with caller(daemon):
            crashed = daemon.wait_for("crashed")
        assert (crashed["level"], crashed["listener"]) == ("error", "admin")
        assert "ArithmeticError: a defect" in crashed["exception"]
        assert daemon.wait_for("draining")["signal"] == ("SIGTERM" if draining else None)
        client.sendall(b"still served")
        assert receive(client, 12) == b"still served"
    assert daemon.wait() == 1
    assert daemon.receipt()["completed"] == 1
    assert daemon.all("stop_failed") == []
