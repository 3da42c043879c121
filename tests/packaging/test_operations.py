"""Test that the reference pages list exactly the events, reasons and exit codes of the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import echod
from echod import cli
from echod.connection.outcome import Reason
from echod.server.ledger import Entry
from echod.server.receipt import Receipt
from watching import WATCHED, status

if TYPE_CHECKING:
    from harness import Start

PAGES = Path(__file__).parents[2] / "docs" / "reference"

LEVELS = {"debug", "info", "warning", "error", "exception"}

# Fields that are not keyword arguments of the call: the listener is bound to the logger, other fields are unpacked.
BOUND = {
    "accept_failed",
    "accept_paused",
    "accept_resumed",
    "backlog_abandoned",
    "client_closed",
    "client_connected",
    "client_failed",
    "client_state",
    "flow_closed",
    "listener_cancelled",
}
UNPACKED = {
    "client_closed": set(Entry._fields),
    "drained": {*Receipt.__slots__, "workers_lost"},
    "flow_closed": {"copies", "fault"},
    "stopped": {
        "connections",
        "empty",
        "accept_pauses",
        "accept_failures",
        "received",
        "sent",
        "acked",
        "discarded_bytes",
    },
    "worker_failed": {"pid", "signal", "code"},
}

# Fields of a daemon with several workers.
WITH_WORKERS = {"workers", "workers_lost"}

# Warnings that are logged with a variable as their name.
VARIABLE: dict[str, set[str]] = {
    "datagrams_dropped": {"listener", "cause", "datagrams", "peer", "error"},
    "datagrams_refused": {"listener", "cause", "datagrams", "peer"},
    "receive_failed": {"listener", "cause", "datagrams"},
    "certificate_ends_soon": {"listener", "file", "subject", "not_after", "days"},
    "certificate_expired": {"listener", "file", "subject", "not_after"},
    "certificate_not_yet_valid": {"listener", "file", "subject", "not_before"},
}


class Logged(NamedTuple):
    """The level and fields of an event in the source."""

    level: str
    fields: frozenset[str]


def logged() -> dict[str, Logged]:
    """Return all events in the source by name."""
    found = {
        "log_lines_dropped": Logged("warning", frozenset({"lines"})),  # the log's writer makes it itself
        **{event: Logged("warning", frozenset(fields)) for event, fields in VARIABLE.items()},
    }
    for module in Path(echod.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(attr=method), args=[ast.Constant(value=str(name))], keywords=keywords
                ) if method in LEVELS and name.isidentifier():  # a parser's errors are sentences
                    fields = {keyword.arg for keyword in keywords if keyword.arg}
                    fields |= UNPACKED.get(name, set()) | ({"listener"} if name in BOUND else set())
                    if method == "exception" or "exc_info" in fields:
                        fields = fields - {"exc_info"} | {"exception"}
                    level = "error" if method == "exception" else method
                    fields |= found[name].fields if name in found else set()
                    found[name] = Logged(level, frozenset(fields))
    return found


def rows(heading: str, page: str = "events.md") -> list[list[str]]:
    """Return the cells of the first table after a heading."""
    table = re.search(rf"^#+ {heading}$.*?^(\|.*?)\n\n", (PAGES / page).read_text(), re.MULTILINE | re.DOTALL)
    assert table, heading
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[1].splitlines()[2:]]


def test_events() -> None:
    """Check the level and fields of each event, and that the page has advice for it."""
    source = logged()
    page = {
        name.strip("`"): (level, set(re.findall("`(.*?)`", fields))) for name, level, fields, _ in rows("All events")
    }
    assert page == {name: (event.level, set(event.fields)) for name, event in source.items()}
    assert len(page) > 15
    assert all(row[3] for row in rows("All events"))


def test_a_run(start: Start) -> None:
    """Check the fields that a daemon really logs. The line of a connection may omit fields."""
    daemon = start()
    daemon.echo(b"hello")
    daemon.wait_for("client_closed")
    assert daemon.stop() == 0
    page = {name.strip("`"): set(re.findall("`(.*?)`", fields)) for name, _, fields, _ in rows("All events")}
    for event in daemon.events:
        fields = set(event) - {"timestamp", "level", "event"}
        assert fields == page[event["event"]] - WITH_WORKERS or (
            event["event"] == "client_closed" and fields < page["client_closed"]
        )
    assert {"started", "listening", "draining", "drained", "stopped"} <= {event["event"] for event in daemon.events}


def test_reasons() -> None:
    assert {row[0].strip("`") for row in rows("Reasons")} == set(get_args(Reason))


def test_status(start: Start) -> None:
    """The page on the status has every key that a report has."""
    daemon = start(*WATCHED)
    with daemon.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        report = status(daemon)
    objects = [report, report["clients"], *report["listeners"], *report["clients"]["most_traffic"]]
    keys = {key for each in objects for key in each}
    assert {"uptime_seconds", "accept_pauses", "unsent"} <= keys
    assert keys - set(re.findall("`(.*?)`", (PAGES / "status.md").read_text())) == set()


def test_exit_codes() -> None:
    codes = set(re.findall(r"\d+", " ".join(row[0] for row in rows("Exit codes", "exit-codes.md"))))
    own = {cli.EXIT_OK, cli.EXIT_FAILURE, cli.EXIT_UNAVAILABLE, cli.EXIT_CONFIG}
    assert codes == {str(code) for code in own} | {"2", "130", "131", "143"}
