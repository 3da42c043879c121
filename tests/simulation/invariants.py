"""The invariants of a simulation, checked against the clients' own counts after the daemon has exited.

A byte count of the daemon and one of a client must be equal if the connection ended gracefully and the client read to
the end. After a reset in either direction, the kernel may have dropped bytes that one side counts already, so the
figures are only bounds of each other:

    got <= echo of received,  received <= sent by the client,  acked <= sent by the daemon
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING

import echo_model
from scenario import STOPS
from world import ViolationError, sums

if TYPE_CHECKING:
    from client import Client
    from harness import Event
    from world import World

# The part of the receipt that counts a reason, from docs/reference/events.md.
_OUTCOMES = {
    "eof": "completed",
    "reset": "completed",
    "info": "completed",
    "quiet": "quiet",
    "idle": "quiet",
    "cut": "cut",
    "undelivered": "aborted",
    "stalled": "aborted",
    "aborted": "aborted",
    "handshake": "failed",
    "tls": "failed",
    "proxy_header": "failed",
    "client_limit": "failed",
    "line_too_long": "failed",
    "fault": "failed",
}

_GRACEFUL = frozenset({"eof", "info", "quiet", "idle", "cut", "line_too_long", "fault"})

_TOTALS = frozenset({"connections", "empty", "received", "sent", "acked", "discarded_bytes"})

# Beyond the settings of a stop, in seconds: the last steps of clients, and time that a busy machine takes.
_SPARE = 30.0

_MAX_LINE = 65536

# Timestamps have microseconds, and timers may fire a millisecond early by them.
_EXACT = 0.01


def check(world: World) -> None:
    """Check all invariants after the daemon has exited.

    Raises:
        ViolationError: one does not hold.

    """
    check_connections(world)
    if world.scenario.connections == "all":
        _check_totals(world)
    _check_end(world)


def check_connections(world: World) -> None:
    """Check the invariants of connections. Each client must have ended.

    Raises:
        ViolationError: one does not hold.

    """
    _check_log(world)
    lines = _match(world)
    for client in world.clients.values():
        line = lines.get(client.number)
        _check_client(world, client, line)
        if line is not None:
            _check_line(world, client, line)


def _fail(invariant: str, message: str) -> None:
    text = f"{invariant}: {message}"
    raise ViolationError(text)


def _check_log(world: World) -> None:
    """Check that each line is an event, and that no event is louder than the steps explain."""
    events = world.events()
    if len(world.daemon.raw) != len(world.daemon.events):
        _fail("traceback", "a line that is no event:\n" + "".join(world.daemon.raw))
    allowed = {"accept_paused"} if "max_connections" in world.scenario.limits else set()
    if world.broken_reloads:
        allowed.add("reload_failed")
    if world.forced:
        allowed.add("backlog_abandoned")
    for event in events:
        is_injected = event["event"] == "client_failed" and "InjectedFault" in event["exception"]
        if event["level"] not in {"info", "debug"} and event["event"] not in allowed and not is_injected:
            _fail("traceback", str(event))
    failed = sum(event["event"] == "reload_failed" for event in events)
    if failed > world.broken_reloads or (failed < world.broken_reloads and not world.stopping):
        _fail("reload", f"{failed} failed, {world.broken_reloads} were broken")


def _match(world: World) -> dict[int, Event]:
    """Return the line of each client. With `log.connections` other than all, some have none."""
    by_peer: dict[str, Event] = {}
    for line in world.lines():
        host = line["peer"] if line["peer"].startswith("unix:") else line["peer"].rpartition(":")[0]
        if host in by_peer:
            _fail("one line", f"two for {host}")
        by_peer[host] = line
    lines: dict[int, Event] = {}
    missing: list[str] = []
    for client in world.clients.values():
        if line := by_peer.pop(client.name, {}):
            lines[client.number] = line
        elif world.scenario.connections == "all" and not client.late:
            missing.append(str(client))
    if len(missing) > sum(event["clients"] for event in world.events() if event["event"] == "backlog_abandoned"):
        _fail("one line", f"none for {missing}")
    if by_peer:
        _fail("one line", f"without a client: {by_peer}")
    return lines


def _check_client(world: World, client: Client, line: Event | None) -> None:
    """Check that each byte was right, and that the daemon reset no client without a cause."""
    if client.wrong and not client.is_raw:
        _fail("content", f"wrong echo within the first {client.got} bytes of {client}")
    served = [world.identity.ders[number] for number in world.certificates[client.oldest_certificate :]]
    if client.certificate is not None and client.certificate not in served:
        _fail("certificate", f"an old one for {client}")
    lost_race = client.late and line is None
    if client.misbehaves or client.end == "eof" or lost_race or world.scenario.stop in {"short", "forced"}:
        return
    if line is None and world.scenario.connections != "all":
        return
    assert line is not None
    explained = {
        "stalled": "write_timeout" in world.scenario.limits,
        "fault": client.listener.fault == "resetting",
        "client_limit": True,
        # It was closed gracefully before or in its handshake.
        **dict.fromkeys(("handshake", "proxy_header"), "handshake_timeout" in world.scenario.limits),
        **dict.fromkeys(("quiet", "cut", "idle"), bool(client.listener.tls) and not line["received"]),
    }
    if not explained.get(line["reason"], False):
        _fail("graceful", f"{client} ended by {client.end}, and its line is {line}")


def _check_line(world: World, client: Client, line: Event) -> None:
    """Check a client's line against the client's counts."""
    context = f"{client}: {line}"
    if not _reasons(world, client).get(line["reason"], False):
        _fail("reason", context)
    _check_time(world, line)
    if client.source and line.get("client", "") not in {client.source, ""}:
        _fail("source", context)
    if not 0 <= line["acked"] <= line["sent"] or line["received"] > client.sent:
        _fail("bounds", context)
    patient = world.scenario.stop != "short"  # otherwise a linger may end before the client has read
    is_graceful = patient and line["reason"] in _GRACEFUL and client.end == "eof" and not client.misbehaves
    if is_graceful and not client.got == line["sent"] == line["acked"]:
        _fail("counts", context)
    if client.listener.mode == "info":
        if is_graceful and line["reason"] == "info" and not client.reply.endswith(b"}\n"):
            _fail("content", context)
    elif not client.is_raw:
        _check_echo(world, client, line, is_graceful=is_graceful)


def _check_echo(world: World, client: Client, line: Event, *, is_graceful: bool) -> None:
    """Check a client's line against the echo that the daemon owed it."""
    received, listener = line["received"], client.listener
    context = f"{client}: {line}"
    if echo_model.is_prefix(listener):
        owed = received  # of an endless client, more than the model's data
        if listener.mode == "line" or listener.fault:
            max_line = world.scenario.limits.get("max_line", _MAX_LINE)
            owed = echo_model.echo_size(listener, max_line, client.payload(received))
        # TLS: a lost end may be counted as less than was sent, see docs/architecture.md.
        if client.got > owed or (not listener.tls and not client.got <= line["sent"] <= owed):
            _fail("bounds", f"owed {owed}, {context}")
        if is_graceful and client.got != owed:
            _fail("counts", f"owed {owed}, {context}")
    elif is_graceful and line["reason"] != "line_too_long":
        data, reply = client.payload(received), bytes(client.reply)
        if not echo_model.is_echo(listener, data, reply, at_eof=line["reason"] == "eof"):
            _fail("content", context)
    read = received if listener.tls else received + line["discarded_bytes"]  # of TLS, those are ciphertext
    if is_graceful and (line["reason"] == "eof" or not listener.tls) and read != client.sent:
        _fail("counts", context)


def _reasons(world: World, client: Client) -> dict[str, bool]:
    """Return the reasons of ends, and whether this client may have each."""
    limits, stop, listener = world.scenario.limits, world.scenario.stop, client.listener
    own, resets, hurries = client.misbehaves, stop in {"short", "forced"}, "handshake_timeout" in limits
    return {
        "quiet": True,  # the time of this reason and the next is checked
        "cut": True,
        "eof": client.finishing is not None or own,
        "reset": own or stop == "forced",
        "undelivered": own or resets,
        "aborted": resets,
        "tls": own,
        "handshake": own or (bool(listener.tls) and hurries),
        "proxy_header": own or (listener.proxy and hurries),
        "client_limit": listener.proxy and "max_connections_per_client" in limits,
        "info": listener.mode == "info",
        "line_too_long": listener.mode == "line",
        "fault": listener.fault in {"closing", "raising", "resetting", "half"},
        "idle": "idle_timeout" in limits,
        "stalled": "write_timeout" in limits,
    }


def _time(event: Event) -> float:
    return datetime.fromisoformat(event["timestamp"]).timestamp()


def _check_time(world: World, line: Event) -> None:
    """Check that no client was closed before the time that the settings give it."""
    reason, shutdown = line["reason"], STOPS[world.scenario.stop]
    if reason == "idle" and line["seconds"] < world.scenario.limits["idle_timeout"] - _EXACT:
        _fail("too early", str(line))
    if reason in {"quiet", "cut"}:
        draining = [event for event in world.events() if event["event"] == "draining"]
        needed = shutdown["quiet_period" if reason == "quiet" else "drain_timeout"]
        if not draining or _time(line) - _time(draining[0]) < needed - _EXACT:
            _fail("too early", f"{line} after {draining}")


def _check_totals(world: World) -> None:
    """Check that totals and receipt are the sums of their lines."""
    events = world.events()
    lines = world.lines()
    (stopped,) = (event for event in events if event["event"] == "stopped")
    (receipt,) = (event for event in events if event["event"] == "drained")
    totals = {name: value for name, value in stopped.items() if name in _TOTALS}
    totals |= {f"fault {name}": count for name, count in stopped.get("faults", {}).items()}
    expected = world.sums + sums(lines)
    if +Counter(totals) != expected or stopped["accept_failures"]:
        _fail("totals", f"{stopped}, and the lines give {expected}")
    after = next(number for number, event in enumerate(events) if event["event"] == "draining")
    drained = [event for event in events[after:] if event["event"] == "client_closed"]
    outcomes = Counter(_OUTCOMES[line["reason"]] for line in drained)
    counts = {outcome: outcomes[outcome] for outcome in sorted(set(_OUTCOMES.values()))} | {
        "clients": len(drained),
        "unsent_bytes": sum(max(0, line["received"] - line["sent"]) for line in drained),
        "unacked_bytes": sum(line["sent"] - line["acked"] for line in drained),
        "discarded_bytes": sum(line["discarded_bytes"] for line in drained),
    }
    if not counts.items() <= receipt.items():
        _fail("receipt", f"{receipt}, and the lines give {counts}")


def _check_end(world: World) -> None:
    """Check the exit code and the duration of the stop."""
    events = world.events()
    code = 130 if world.forced and any(event["event"] == "drained" for event in events) else 0
    if world.exit_code != code and not (world.forced and world.exit_code == 0):
        _fail("exit code", f"{world.exit_code} instead of {code}")
    (receipt,) = (event for event in events if event["event"] == "drained")
    shutdown = STOPS[world.scenario.stop]
    longest = 0.0 if world.forced else shutdown["drain_timeout"] + shutdown["linger_timeout"]
    if receipt["seconds"] > longest + _SPARE:
        _fail("too late", str(receipt))
