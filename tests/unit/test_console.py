"""Test the text of the log for people, at the width of a terminal and in a file."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
import termios
import time
from typing import TYPE_CHECKING, Any

import pytest

from echod.daemon.console import Console, columns, has_colors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.once

CLOSED = {
    "event": "client_closed",
    "listener": ":8000",
    "peer": "127.0.0.1:51234",
    "seconds": 0.012,
    "received": 13,
    "sent": 13,
    "acked": 13,
    "discarded_bytes": 0,
    "reason": "eof",
    "rtt_ms": 0.031,
    "retransmits": 0,
}


@pytest.fixture(autouse=True)
def moment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Set the local time zone and the time, and return a function that changes the time."""

    def set_time(milliseconds: int) -> None:
        monkeypatch.setattr(time, "time_ns", lambda: milliseconds * 1_000_000)

    monkeypatch.setenv("TZ", "XYZ-02:30")
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    time.tzset()
    set_time(1_796_047_387_512)
    yield set_time
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def terminal() -> Iterator[int]:
    """Return a terminal of 120 columns."""
    master, slave = os.openpty()
    resize(slave, 120)
    yield slave
    for descriptor in (master, slave):
        os.close(descriptor)


def resize(descriptor: int, width: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))


@pytest.fixture
def pipe() -> Iterator[int]:
    reading, writing = os.pipe()
    yield writing
    for descriptor in (reading, writing):
        os.close(descriptor)


def console(descriptor: int) -> Console:
    """Return a console that has logged the address of one listener, and the date."""
    made = Console()
    made.use(descriptor)
    made(None, "info", {"event": "listening", "listener": ":8000", "address": "0.0.0.0:8000"})
    made(None, "info", {"event": "listening", "listener": "admin", "address": "127.0.0.1:9000"})
    return made


def texts(event: dict[str, Any], level: str = "info", width: int = 120) -> list[str]:
    """Return the lines of one event on a terminal without colours, each without its time."""
    master, slave = os.openpty()
    try:
        resize(slave, width)
        lines = re.sub(r"\x1b\[\d*m", "", console(slave)(None, level, dict(event))).split("\n")
    finally:
        os.close(slave)
        os.close(master)
    stamp = "16:33:07.512 "
    assert lines[0].startswith(stamp)
    return [lines[0].removeprefix(stamp), *lines[1:]]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({}, "   closed    127.0.0.1:51234 eof, 13 B echoed in 12 ms, rtt 31 µs"),
        ({"seconds": 0.0}, "   closed    127.0.0.1:51234 eof, 13 B echoed in under 1 ms, rtt 31 µs"),
        ({"rtt_ms": None}, "   closed    127.0.0.1:51234 eof, 13 B echoed in 12 ms"),
        (
            {"received": 0, "sent": 0, "acked": 0, "reason": "info"},
            "   closed    127.0.0.1:51234 info, nothing received in 12 ms, rtt 31 µs",
        ),
        ({"reason": "idle"}, " ! closed    127.0.0.1:51234 idle, 13 B echoed in 12 ms, rtt 31 µs"),
        (
            {"received": 12345678, "acked": 5, "reason": "reset", "retransmits": 3},
            " ! closed    127.0.0.1:51234 reset, 12,345,678 B received, 13 B sent, 5 B acknowledged in 12 ms, rtt 31 µs, ",
        ),
        (
            {"acked": 5},
            " ! closed    127.0.0.1:51234 eof, 13 B received, 13 B sent, 5 B acknowledged in 12 ms, rtt 31 µs",
        ),
        (
            {"reason": "io_error", "detail": "write: No space left on device"},
            "!! closed    127.0.0.1:51234 io_error, 13 B echoed in 12 ms, rtt 31 µs, write: No space left on device",
        ),
        (
            {"fault": "slow", "tls": "TLSv1.3", "cipher": "c", "subject": "CN=x", "discarded_bytes": 5, "rtt_ms": None},
            "   closed    127.0.0.1:51234 eof, 13 B echoed in 12 ms, 5 B discarded, fault slow, TLSv1.3, CN=x",
        ),
        (
            {"client": "198.51.100.7:4711"},
            "   closed    198.51.100.7:4711 via 127.0.0.1:51234 eof, 13 B echoed in 12 ms, rtt 31 µs",
        ),
        ({"listener": "lab"}, "   closed    127.0.0.1:51234 eof, 13 B echoed in 12 ms, rtt 31 µs [lab]"),
    ],
)
def test_closed_client(changed: dict[str, Any], text: str) -> None:
    """The line has peer, reason, bytes and time, without zeros. A mark shows a bad end, and another one our own failure."""
    first, *rest = texts(CLOSED | changed)
    assert first == text.rstrip()
    assert len(first) + len("16:33:07.512 ") <= 120
    assert [line.strip() for line in rest] == (["3 retransmitted"] if text.endswith(" ") else [])


@pytest.mark.parametrize("width", [80, 120])
def test_long_lines_are_folded(width: int) -> None:
    """Long addresses and texts continue under the text, within the width of the terminal."""
    address = "[2001:db8:1234:5678:9abc:def0:1234:5678]:51234"
    detail = "the client's certificate has " + "x" * 150
    lines = texts(CLOSED | {"peer": address, "client": address, "reason": "tls", "detail": detail}, width=width)
    lines[0] = "16:33:07.512 " + lines[0]
    assert max(map(len, lines)) <= width
    assert all(line.startswith(" " * 26) for line in lines[1:])
    joined = lines[0][26:] + " " + " ".join(line[26:] for line in lines[1:])
    assert joined.startswith(
        f"{address} via {address} tls, 13 B echoed in 12 ms, rtt 31 µs, the client's certificate has x"
    )
    assert joined.count("x") == 150


def test_folded_lines_keep_a_number_with_its_unit() -> None:
    """No line begins with a unit, at any width."""
    event = CLOSED | {"reason": "reset", "received": 12345678, "acked": 5}
    for width in range(60, 120):
        joined = "|".join(line.strip() for line in texts(event, width=width))
        for part in ("12,345,678 B", "13 B", "5 B", "12 ms", "31 µs"):
            assert part in joined


@pytest.mark.parametrize("width", [0, 59])
def test_narrow_terminals_fold_lines_themselves(width: int) -> None:
    """If the terminal has no width or few columns, an event is one line."""
    assert len(texts(CLOSED, width=width)) == 1


@pytest.mark.parametrize(
    ("level", "event", "text"),
    [
        (
            "info",
            {"event": "started", "version": "1.2", "pid": 7, "loop": "uvloop", "python": "3.13.1"},
            "   started   echod 1.2, pid 7, uvloop, Python 3.13.1",
        ),
        ("info", {"event": "listening", "listener": "a", "address": "[::1]:7"}, "   listening [::1]:7 [a]"),
        ("info", {"event": "listening", "listener": "[::1]:7", "address": "[::1]:7"}, "   listening [::1]:7"),
        ("debug", {"event": "client_connected", "listener": ":8000", "peer": "1.2.3.4:5"}, "   connected 1.2.3.4:5"),
        (
            "debug",
            {"event": "client_state", "listener": ":8000", "peer": "1.2.3.4:5", "state": "open"},
            "   open      1.2.3.4:5",
        ),
        ("info", {"event": "reloaded", "changed": []}, "   reloaded  no settings changed"),
        ("info", {"event": "reloaded", "changed": ["a.b", "c"]}, "   reloaded  changed: a.b, c"),
        ("error", {"event": "reload_failed", "problems": ["x: y", "z"]}, "!! reload_failed x: y; z"),
        ("warning", {"event": "restart_needed", "settings": ["loop", "listen"]}, " ! restart_needed for loop, listen"),
        (
            "info",
            {"event": "draining", "signal": "SIGINT", "clients": 1, "max_seconds": 8.0},
            "   draining  after SIGINT: 1 client, at most 8 s; Ctrl-C again stops at once",
        ),
        (
            "info",
            {"event": "draining", "signal": None, "clients": 1200, "max_seconds": 0.5},
            "   draining  after a failure: 1,200 clients, at most 500 ms; another signal stops at once",
        ),
        (
            "info",
            {"event": "draining", "signal": "SIGQUIT", "clients": 2, "max_seconds": 0.0},
            "   draining  after SIGQUIT: 2 clients, reset at once",
        ),
        (
            "info",
            {"event": "draining", "signal": "SIGTERM", "clients": 0, "max_seconds": 8.0},
            "   draining  after SIGTERM: no clients",
        ),
        (
            "info",
            {"event": "drained", "clients": 3, "completed": 1, "quiet": 2, "cut": 0, "aborted": 0, "failed": 0}
            | {"unsent_bytes": 0, "unacked_bytes": 1234, "discarded_bytes": 0, "seconds": 2.1},
            "   drained   3 clients in 2.1 s, 1 completed, 2 quiet, 1,234 B unacknowledged",
        ),
        (
            "info",
            {"event": "stopped", "connections": 2, "empty": 1, "accept_pauses": 3, "accept_failures": 0}
            | {"received": 9, "sent": 9, "acked": 9, "discarded_bytes": 0, "faults": {"slow": 1}},
            "   stopped   2 connections, 9 B echoed, 1 of them empty, accept pauses: 3, fault slow: 1",
        ),
        (
            "warning",
            {"event": "accept_paused", "listener": "lab", "cause": "max_connections", "clients": 0, "file": "a b"},
            " ! accept_paused cause=max_connections file='a b' [lab]",
        ),
        (
            "info",
            {"event": "flow_closed", "peer": "1.2.3.4:5", "local": "1.2.3.5:7", "reason": "idle", "seconds": 61.2}
            | {"received_datagrams": 1, "received": 64, "sent_datagrams": 1, "refused": 0, "dropped": 0},
            "   flow_closed 1.2.3.4:5 at 1.2.3.5:7 idle, 1 datagram echoed, 64 B in 61.2 s",
        ),
        (
            "info",
            {"event": "flow_closed", "peer": "1.2.3.4:5", "local": "1.2.3.5:7", "reason": "cut", "seconds": 0.0}
            | {
                "received_datagrams": 2000,
                "sent_datagrams": 1999,
                "refused": 3,
                "dropped": 1,
                "copies": 4,
                "fault": "x",
            },
            (
                "   flow_closed 1.2.3.4:5 at 1.2.3.5:7 cut, 2,000 datagrams received, 1,999 sent in under 1 ms, 1 dropped, "
                "3 refused, 4 sent twice, fault x"
            ),
        ),
        (
            "info",
            {"event": "flow_closed", "peer": "1.2.3.4:5", "local": "1.2.3.5:7", "reason": "idle", "seconds": 1.0}
            | {"received_datagrams": 0, "sent_datagrams": 0, "refused": 1},
            "   flow_closed 1.2.3.4:5 at 1.2.3.5:7 idle, nothing received in 1 s, 1 refused",
        ),
        (
            "warning",
            {"event": "datagrams_refused", "cause": "port", "datagrams": 3, "peer": "1.2.3.4:7"},
            " ! datagrams_refused 3 datagrams: port, such as 1.2.3.4:7",
        ),
        (
            "warning",
            {"event": "datagrams_dropped", "cause": "error", "datagrams": 1, "error": "No route"},
            " ! datagrams_dropped 1 datagram: error (No route)",
        ),
        (
            "info",
            {"event": "draining", "signal": "SIGTERM", "clients": 0, "flows": 2, "max_seconds": 8.0},
            "   draining  after SIGTERM: 0 clients and 2 flows, at most 8 s; another signal stops at once",
        ),
        (
            "info",
            {"event": "drained", "clients": 0, "completed": 0, "quiet": 0, "cut": 0, "aborted": 0, "failed": 0}
            | {"unsent_bytes": 0, "unacked_bytes": 0, "discarded_bytes": 0, "seconds": 2.1}
            | {"flows": 2, "datagrams_received": 5, "datagrams_sent": 4, "datagrams_unanswered": 1},
            "   drained   0 clients in 2.1 s, flows: 2, 5 datagrams received, 4 datagrams sent, 1 datagrams unanswered",
        ),
        (
            "info",
            {"event": "stopped", "connections": 0, "received": 0, "sent": 0, "acked": 0, "kernel_drops": 6}
            | {"datagrams_received": 9, "datagrams_sent": 8, "datagrams_refused": 7, "datagrams_dropped": 0},
            (
                "   stopped   0 connections, nothing received, 9 datagrams received, 8 datagrams sent, 7 datagrams refused, "
                "6 datagrams lost in the kernel"
            ),
        ),
        ("critical", {"event": "client_closed", "logger": "other"}, "!! client_closed logger=other"),
        ("critical", {"event": "client_state", "logger": "other"}, "!! client_state logger=other"),
    ],
)
def test_other_events(level: str, event: dict[str, Any], text: str) -> None:
    """Each event has its text. Events without a text of their own have their fields, without zeros."""
    assert texts(event, level, width=0) == [text]


def test_date_on_a_terminal(terminal: int, moment: Callable[[int], None]) -> None:
    """The date with the time zone comes before the first line, and again after midnight."""
    made = Console()
    made.use(terminal)
    midnight = 1_796_074_200_000
    lines = []
    for milliseconds in (midnight - 2000, midnight - 1, midnight, midnight + 1):
        moment(milliseconds)
        lines.append(made(None, "debug", {"event": "tick"}))
    plain = [re.sub(r"\x1b\[\d*m", "", line).split("\n") for line in lines]
    assert [line[:-1] for line in plain] == [["2026-11-30 UTC+0230"], [], ["2026-12-01 UTC+0230"], []]


def test_file_or_pipe(pipe: int) -> None:
    """Without a terminal, each event is one line with the date and no colour."""
    long = "x " * 200
    line = console(pipe)(None, "error", {"event": "odd", "text": long})
    assert line == f"2026-11-30 16:33:07.512+0230 !! odd       text='{long}'"


def test_traceback(pipe: int) -> None:
    """A traceback follows the line. Only its own line breaks are kept."""
    line = console(pipe)(None, "error", {"event": "crashed", "exception": "Trace\n  a\x1bb\u2028c"})
    assert line.split("\n")[1:] == ["Trace", r"  a\x1bb\u2028c"]


def test_colors(terminal: int) -> None:
    """The time is dim and the event bold. A problem is coloured as a whole, also in its following lines."""
    made = console(terminal)
    assert made(None, "info", {"event": "odd"}) == "\x1b[2m16:33:07.512\x1b[0m    \x1b[1modd\x1b[0m"
    assert made(None, "warning", {"event": "odd"}) == "\x1b[2m16:33:07.512\x1b[0m  ! \x1b[33modd\x1b[0m"
    first, second = made(None, "error", {"event": "odd", "a": "x" * 60, "b": "y" * 60}).split("\n")
    assert first == f"\x1b[2m16:33:07.512\x1b[0m !! \x1b[31modd       a={'x' * 60}\x1b[0m"
    assert second == f"\x1b[31m{' ' * 26}b={'y' * 60}\x1b[0m"


@pytest.mark.parametrize(
    ("environment", "terminal", "pipe"),
    [
        ({}, True, False),
        ({"TERM": "xterm"}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_variables_for_colors(environment: dict[str, str], terminal: bool, pipe: bool) -> None:
    assert has_colors(environment, is_terminal=True) is terminal
    assert has_colors(environment, is_terminal=False) is pipe


def test_closed_terminal() -> None:
    """A terminal that was closed has no width, and lines are still rendered."""
    master, slave = os.openpty()
    made = console(slave)
    os.close(master)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.get_terminal_size(slave)
    assert columns(slave) == 0
    assert "odd" in made(None, "info", {"event": "odd", "text": "x" * 200})
    os.close(slave)
