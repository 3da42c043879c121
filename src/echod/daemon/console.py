"""Render the log for people: local time, the event, and its text, with zeros and defaults left out."""

from __future__ import annotations

import os
import re
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from echod.connection.outcome import has_failed
from echod.text import count, printable
from echod.units import seconds_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from structlog.typing import EventDict

# SGR parameters (ECMA-48, 8.3.117), and marks that say the same without colour.
_DIM, _BOLD = "2", "1"
_STYLES = {
    "debug": (_DIM, ""),
    "info": ("", ""),
    "warning": ("33", "!"),
    "error": ("31", "!!"),
    "critical": ("31", "!!"),
}

# Columns for the event. A longer name moves its text to the right.
_EVENT_WIDTH = 9

# A narrower terminal wraps the lines itself.
_NARROWEST = 60

# The parts of a receipt and of the totals, besides the bytes.
_ENDS = ("completed", "quiet", "cut", "aborted", "failed")


class Console:
    """Render events as text.

    On a terminal, lines have the time only, and the date is a line of its own once a day. A long line continues under its
    text. In a file or a pipe, an event is one line with date and time.
    """

    def __init__(self) -> None:
        self._date = ""
        self._listeners = set[str]()

    def use(self, descriptor: int) -> None:
        """Render for this descriptor from now on."""
        self._descriptor = descriptor
        self._is_terminal = os.isatty(descriptor)
        self._has_colors = has_colors(os.environ, self._is_terminal)

    def __call__(self, _: object, level: str, event: EventDict) -> str:
        """Return the line of an event, and the lines of its traceback."""
        name, traceback = event.pop("event"), event.pop("exception", "")
        listener = event.pop("listener", None)
        if name == "listening" and listener != "admin":
            self._listeners.add(listener)
        if (
            name == "client_closed"
            and "reason" in event
            and has_failed(event["reason"], event["received"], event["acked"])
        ):
            level = "error" if event["reason"] in {"io_error", "failed"} else "warning"
        if listener is not None and self._listeners != {listener} and listener != event.get("address"):
            suffix = f" [{listener}]"
        else:
            suffix = ""
        name, text = _describe(name, event)
        lines = self._layout(level, printable(name), printable(text + suffix))
        return "\n".join([*lines, *map(printable, traceback.split("\n") if traceback else ())])

    def _layout(self, level: str, name: str, text: str) -> list[str]:
        second, millisecond = divmod(time.time_ns() // 1_000_000, 1000)
        date, clock, zone = _local(second)
        stamp = f"{clock}.{millisecond:03}"
        style, mark = _STYLES[level]
        above = []
        if not self._is_terminal:
            stamp = f"{date} {stamp}{zone}"
        elif date != self._date:
            self._date = date
            above = [self._paint(_DIM, f"{date} UTC{zone}")]
        head, body = f"{stamp} {mark:>2} ", f"{name:<{_EVENT_WIDTH}} {text}".rstrip()
        first, *rest = self._fold(body, len(head))
        head = self._paint(_DIM, stamp) + head.removeprefix(stamp)
        if style:
            return [*above, head + self._paint(style, first), *(self._paint(style, line) for line in rest)]
        return [*above, head + self._paint(_BOLD, first[: len(name)]) + first[len(name) :], *rest]

    def _fold(self, body: str, indent: int) -> list[str]:
        """Break a line that is wider than the terminal. The first line is without its indent."""
        width = columns(self._descriptor) if self._is_terminal else 0
        if width < _NARROWEST or indent + len(body) <= width:
            return [body]
        import textwrap  # noqa: PLC0415  (for long lines only)

        following = " " * (indent + _EVENT_WIDTH + 1)
        # textwrap does not break at a no-break space, so a number stays with its unit. Other such spaces are escaped before.
        body = re.sub(r"(?<=\d) (?=(?:B|s|ms|µs)\b)", "\xa0", body)
        lines = textwrap.wrap(
            body, width, initial_indent=" " * indent, subsequent_indent=following, break_on_hyphens=False
        )
        lines = [line.replace("\xa0", " ") for line in lines]
        return [lines[0][indent:], *lines[1:]]

    def _paint(self, style: str, text: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if style and self._has_colors and text else text


def columns(descriptor: int) -> int:
    """Return the width of a terminal. It is 0 if it is unknown, or if the terminal has been closed."""
    try:
        return os.get_terminal_size(descriptor).columns
    except OSError:
        return 0


def has_colors(environment: Mapping[str, str], is_terminal: bool) -> bool:  # noqa: FBT001  (a property of the output)
    """Decide whether to use colours: see no-color.org and force-color.org. A variable that is empty counts as not set."""
    if environment.get("NO_COLOR"):
        return False
    return bool(environment.get("FORCE_COLOR")) or (is_terminal and environment.get("TERM") != "dumb")


@lru_cache(maxsize=1)
def _local(second: int) -> tuple[str, str, str]:
    """Return the local date, the time of day, and the offset from UTC."""
    moment = time.localtime(second)
    return time.strftime("%Y-%m-%d", moment), time.strftime("%H:%M:%S", moment), time.strftime("%z", moment)


def _describe(name: str, event: EventDict) -> tuple[str, str]:
    """Return the name and the text that the console shows."""
    # Messages of `logging` may have any name.
    if name not in _TEXTS or "logger" in event:
        return name, " ".join(f"{key}={_value(value)}" for key, value in event.items() if value)
    return event["state"] if name == "client_state" else name.removeprefix("client_"), _TEXTS[name](event)


def _value(value: object) -> str:
    text = str(value)
    return repr(text) if " " in text or not text.isprintable() else text


def _duration(event: Mapping[str, Any]) -> str:
    """Return the length of the event, which is rounded to milliseconds."""
    return seconds_text(event["seconds"]) if event["seconds"] else "under 1 ms"


def _echoed(event: Mapping[str, Any]) -> str:
    """Return the bytes of the echo, which differ only if something was lost, or sent twice on purpose."""
    received, sent, acked = (event[name] for name in ("received", "sent", "acked"))
    if received == sent == acked:
        return f"{received:,} B echoed" if received else "nothing received"
    return f"{received:,} B received, {sent:,} B sent, {acked:,} B acknowledged"


def _others(event: Mapping[str, Any], **texts: str) -> str:
    """Return the figures that are not zero, each in its text."""
    return "".join(f", {text.format(event[name])}" for name, text in texts.items() if event.get(name))


def _closed(event: EventDict) -> str:
    peer, client = event["peer"], event.get("client")
    who = peer if client is None else f"{client} via {peer}"
    rtt = "" if event.get("rtt_ms") is None else f", rtt {seconds_text(event['rtt_ms'] / 1000)}"
    others = _others(
        event,
        discarded_bytes="{:,} B discarded",
        retransmits="{} retransmitted",
        fault="fault {}",
        tls="{}",
        subject="{}",
        detail="{}",
    )
    return f"{who} {event['reason']}, {_echoed(event)} in {_duration(event)}{rtt}{others}"


def _flow(event: EventDict) -> str:
    datagrams = count(event["received_datagrams"], "datagram")
    if event["received_datagrams"] == event["sent_datagrams"]:
        echoed = f"{datagrams} echoed, {event['received']:,} B" if event["received_datagrams"] else "nothing received"
    else:
        echoed = f"{datagrams} received, {event['sent_datagrams']:,} sent"
    others = _others(event, dropped="{:,} dropped", refused="{:,} refused", copies="{:,} sent twice", fault="fault {}")
    return f"{event['peer']} at {event['local']} {event['reason']}, {echoed} in {_duration(event)}{others}"


def _refused(event: EventDict) -> str:
    peer = f", such as {event['peer']}" if "peer" in event else ""
    error = f" ({event['error']})" if "error" in event else ""
    return f"{count(event['datagrams'], 'datagram')}: {event['cause']}{error}{peer}"


def _draining(event: EventDict) -> str:
    cause = f"after {event['signal']}" if event["signal"] else "after a failure"
    flows = event.get("flows", 0)
    if not (event["clients"] or flows):
        return f"{cause}: no clients"
    clients = count(event["clients"], "client") + (f" and {count(flows, 'flow')}" if flows else "")
    if not event["max_seconds"]:
        return f"{cause}: {clients}, reset at once"
    return f"{cause}: {clients}, at most {seconds_text(event['max_seconds'])}; {again(event['signal'])} stops at once"


def again(signal_name: str | None) -> str:
    """Return the action of the operator that ends a drain at once."""
    return "Ctrl-C again" if signal_name == "SIGINT" else "another signal"


def _drained(event: EventDict) -> str:
    ends = "".join(f", {event[end]:,} {end}" for end in _ENDS if event[end])
    others = _others(
        event,
        unsent_bytes="{:,} B unsent",
        unacked_bytes="{:,} B unacknowledged",
        discarded_bytes="{:,} B discarded",
        flows="flows: {:,}",
        datagrams_received="{:,} datagrams received",
        datagrams_sent="{:,} datagrams sent",
        datagrams_unanswered="{:,} datagrams unanswered",
    )
    return f"{count(event['clients'], 'client')} in {_duration(event)}{ends}{others}"


def _stopped(event: EventDict) -> str:
    others = _others(
        event,
        empty="{:,} of them empty",
        discarded_bytes="{:,} B discarded",
        accept_pauses="accept pauses: {:,}",
        accept_failures="accept failures: {:,}",
        datagrams_received="{:,} datagrams received",
        datagrams_sent="{:,} datagrams sent",
        datagrams_refused="{:,} datagrams refused",
        datagrams_dropped="{:,} datagrams dropped",
        kernel_drops="{:,} datagrams lost in the kernel",
    )
    faults = "".join(f", fault {name}: {count:,}" for name, count in event.get("faults", {}).items())
    return f"{count(event['connections'], 'connection')}, {_echoed(event)}{others}{faults}"


_TEXTS: Mapping[str, Callable[[EventDict], str]] = {
    "started": "echod {version}, pid {pid}, {loop}, Python {python}".format_map,
    "listening": lambda event: event["address"],
    "client_connected": lambda event: event["peer"],
    "client_state": lambda event: event["peer"],
    "client_closed": _closed,
    "flow_closed": _flow,
    "datagrams_refused": _refused,
    "datagrams_dropped": _refused,
    "reloaded": lambda event: f"changed: {', '.join(event['changed'])}" if event["changed"] else "no settings changed",
    "reload_failed": lambda event: "; ".join(event["problems"]),
    "restart_needed": lambda event: f"for {', '.join(event['settings'])}",
    "draining": _draining,
    "drained": _drained,
    "stopped": _stopped,
}
