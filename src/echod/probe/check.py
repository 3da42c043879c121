"""The quick check: send one line and compare its echo."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

from echod.probe.errors import EarlyEofError, Mismatch, WrongEchoError, ended, kind, reason, unreachable
from echod.probe.model import Outcome, ProbeResult
from echod.probe.timing import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable

    from echod.probe.connect import Connected
    from echod.probe.errors import ProbeError
    from echod.probe.model import ProbeOptions

_SIZE = 64
_RECEIVE = 65536


def run(options: ProbeOptions, clock: Callable[[], float] = time.perf_counter) -> ProbeResult:
    """Send a line that no other check has sent, and compare its echo.

    It is a line because some echo servers echo complete lines only. It is new so that a repeated old answer is wrong.

    Args:
        options: the target and the ways to check it.
        clock: returns seconds.

    """
    message = b"echod probe %s\r\n" % os.urandom(_SIZE).hex().encode()[: _SIZE - 14]
    deadline = Deadline(options.timeout, clock)
    try:
        connection = options.route.connect(options.route.endpoints(options.timeout), deadline)
    except OSError as error:
        return failure(options, Outcome.UNREACHABLE, error, unreachable(error))
    echo = bytearray()
    began = clock()
    try:
        _exchange(connection, message, echo, deadline, half_close=options.half_close)
        seconds = clock() - began
    except (OSError, EarlyEofError, WrongEchoError) as error:
        if not echo and connection.tls is None and ended(error):
            error.add_note(options.route.advice)
        problem = reason(error)
        if isinstance(error, OSError):
            progress = f"{len(echo)} of {_SIZE} bytes came back, then" if echo else "no echo"
            problem = f"{progress}: {problem}"
        return failure(options, Outcome.FAILED, error, problem)
    finally:
        connection.channel.close()
    if options.json:
        text = report(options, Outcome.RIGHT, seconds=seconds, connect_seconds=connection.seconds)
    else:
        text = (
            f"{options.target}: {_SIZE} bytes came back right in {seconds * 1000:.3f} ms"
            f" (connected in {connection.seconds * 1000:.3f} ms)\n"
        )
    return ProbeResult(Outcome.RIGHT, text)


def _exchange(connection: Connected, message: bytes, echo: bytearray, deadline: Deadline, *, half_close: bool) -> None:
    """Send the message and append its echo to `echo`; after a half-close, require EOF too."""
    connection.socket.settimeout(0)
    connection.channel.send(message)  # every send buffer is larger
    if half_close:
        connection.channel.shutdown(socket.SHUT_WR)
    while len(echo) < len(message) or half_close:
        try:
            data = connection.channel.recv(_RECEIVE)
        except BlockingIOError:  # also after a part of a TLS record
            deadline.wait_readable(connection.socket)
            continue
        if not data:
            break
        echo += data
        if not message.startswith(echo):
            raise WrongEchoError(Mismatch.find(message, bytes(echo)), bytes(echo))
    if len(echo) < len(message):
        msg = f"the server closed the connection after {len(echo)} of {len(message)} bytes"
        raise EarlyEofError(msg)


def failure(options: ProbeOptions, outcome: Outcome, error: ProbeError, problem: str) -> ProbeResult:
    """Return the result of a check that failed. `problem` describes the error."""
    problem = f"{options.target}: {problem}"
    return ProbeResult(outcome, report(options, outcome, error, problem) if options.json else "", problem)


def report(
    options: ProbeOptions,
    outcome: Outcome,
    error: ProbeError | None = None,
    problem: str | None = None,
    *,
    seconds: float | None = None,
    connect_seconds: float | None = None,
) -> str:
    """Return the report of a check as JSON. Its parameters are the keys of the same names, and the first error."""
    import json  # noqa: PLC0415  (needed for --json only)

    found = {
        "target": str(options.target),
        "mode": "check",
        "ending": outcome.value,
        "seconds": seconds,
        "connect_seconds": connect_seconds,
        "errors": {kind(error): 1} if error else {},
        "mismatch": error.mismatch._asdict() if isinstance(error, WrongEchoError) else None,
        "problem": problem,
    }
    return json.dumps(found) + "\n"
