"""The stop of the admin listener: connections and answers do not hold it up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from test_admin_bounds import LIVEZ, PAGE, narrow

from echod.admin.limits import AdminLimits
from watching import WATCHED, caller, get, place, received

if TYPE_CHECKING:
    from admin_thread import StartAdmin
    from harness import Start

pytestmark = pytest.mark.once


def test_stop_without_requests(start: Start) -> None:
    daemon = start(*WATCHED)
    assert daemon.stop() == 0
    assert {event["level"] for event in daemon.events} == {"info"}


def test_stop_with_connections(start: Start) -> None:
    """Silent clients, incomplete requests and unread answers neither hold up the stop nor write to the log."""
    daemon = start(*WATCHED, python=("-X", "dev"))
    with caller(daemon), caller(daemon) as asking, caller(daemon) as unread, caller(daemon) as idle:
        asking.sendall(b"GET / HT")
        unread.sendall(PAGE * 400)
        idle.sendall(LIVEZ)
        assert idle.recv(1) == b"H"
        assert daemon.stop() == 0
    assert daemon.loud() == []
    assert len(daemon.raw) == len(daemon.events), "a line is not a log event"


def test_stop_with_a_client_that_does_not_read(start: Start) -> None:
    """Answers that a client has not read by the stop are dropped."""
    daemon = start(*WATCHED)
    with narrow(place(daemon)) as sock:
        sock.sendall(PAGE * 400)
        assert sock.recv(1) == b"H"
        daemon.settle()  # the answers have filled all buffers
        assert daemon.stop() == 0
    assert {event["level"] for event in daemon.events} == {"info"}


@pytest.mark.parametrize(
    ("rest", "grace", "status_line"), [(0.2, 1000, b"HTTP/1.1 200 OK"), (1000, 0.05, b"")], ids=["given", "dropped"]
)
def test_stop_during_an_answer(start_admin: StartAdmin, rest: float, grace: float, status_line: bytes) -> None:
    """An answer that is ready within the grace time is given. The stop does not wait longer for it."""
    admin = start_admin(AdminLimits(rest_factor=10**9, longest_rest=rest, grace=grace))
    assert get(admin, "/metrics").status == 200
    with caller(admin) as sock, caller(admin) as other:
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")  # waits for the end of the rest
        other.sendall(LIVEZ)
        assert other.recv(1) == b"H"  # so the earlier request has been read
        admin.stop()
        assert received(sock).partition(b"\r\n")[0] == status_line
