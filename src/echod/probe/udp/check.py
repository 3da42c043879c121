"""The quick check over UDP: send a datagram and compare its echo."""

from __future__ import annotations

import collections
import contextlib
import errno
import math
import os
import select
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

from echod.probe.check import failure, report
from echod.probe.connect import ATTEMPT_DELAY
from echod.probe.errors import Mismatch, WrongEchoError, reason
from echod.probe.model import Outcome, ProbeResult
from echod.probe.timing import Deadline
from echod.probe.udp import icmp, sockets
from echod.probe.udp.payload import SESSION, Payloads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echod.probe.connect import Endpoint, Route
    from echod.probe.model import ProbeOptions

_SIZE = 64
# Seconds without an echo after which the next datagram is sent.
_AGAIN = 1.0
# Larger than any datagram.
_RECEIVE = 65536
# The longest wait in seconds: a signal is handled after it.
_PATIENCE = 0.1


class Answer(NamedTuple):
    """The first echo of a quick check."""

    endpoint: Endpoint
    seconds: float
    """Its round trip."""
    unanswered: int
    """Earlier datagrams to this address, all without an echo."""


def run(options: ProbeOptions, clock: Callable[[], float] = time.perf_counter) -> ProbeResult:
    """Check the server, and report the result.

    Args:
        options: the target and the ways to check it.
        clock: returns seconds.

    """
    deadline = Deadline(options.timeout, clock)
    try:
        answer = exchange(options.route, options.route.endpoints(options.timeout), deadline)
    except (TimeoutError, WrongEchoError) as error:
        return failure(options, Outcome.FAILED, error, describe(error))
    except OSError as error:
        return failure(options, Outcome.UNREACHABLE, error, describe(error))
    if options.json:
        return ProbeResult(Outcome.RIGHT, report(options, Outcome.RIGHT, seconds=answer.seconds))
    retries = f" (without an echo before: {answer.unanswered})" if answer.unanswered else ""
    text = f"{options.target}: {_SIZE} bytes came back right in {answer.seconds * 1000:.3f} ms{retries}\n"
    return ProbeResult(Outcome.RIGHT, text)


def describe(error: OSError | WrongEchoError) -> str:
    """Describe the failure of a check."""
    return f"no echo: {reason(error)}" if isinstance(error, OSError) else reason(error)


def exchange(
    route: Route, endpoints: Sequence[Endpoint], deadline: Deadline, stopped: Callable[[], bool] = lambda: False
) -> Answer:
    """Send a datagram, and another one every second until an echo arrives.

    Several addresses race as in RFC 8305: the next one joins when one has failed, or has not answered within 250 ms.

    Args:
        route: the way to the server.
        endpoints: at least one.
        deadline: for all addresses together.
        stopped: called every 100 ms; True ends the wait.

    Raises:
        TimeoutError: no echo arrived in time.
        InterruptedError: `stopped` returned True.
        WrongEchoError: a server sent something else.
        OSError: no address can be reached. The error is that of the last one to fail.

    """
    waiting = collections.deque(endpoints)
    racers: list[_Racer] = []
    failures: list[OSError] = []
    poll = select.poll()
    due = 0.0
    with contextlib.ExitStack() as opened:
        while waiting or racers:
            if stopped():
                raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
            left = deadline.left()
            now = deadline.clock()
            if waiting and now >= due:
                endpoint = waiting.popleft()
                try:
                    sock = opened.enter_context(sockets.connect(route, endpoint))
                except OSError as error:
                    failures.append(error)
                    continue
                racers.append(_Racer(sock, endpoint))
                poll.register(sock, select.POLLIN)
                due = now + ATTEMPT_DELAY
            for racer in racers[:]:
                try:
                    answer = racer.step(deadline.clock)
                except OSError as error:
                    failures.append(error)
                    racers.remove(racer)
                    poll.unregister(racer.socket)
                    due = now
                else:
                    if answer is not None:
                        return answer
            moments = [racer.again for racer in racers] + [due] * bool(waiting)
            wait = min(left, _PATIENCE, *(moment - now for moment in moments))
            poll.poll(max(wait, 0) * 1000)
        raise failures[-1]


class _Racer:
    """One address of the server.

    Args:
        sock: a connected UDP socket.
        endpoint: the address.

    """

    def __init__(self, sock: socket.socket, endpoint: Endpoint) -> None:
        self.socket = sock
        self.again = -math.inf
        """When to send the next datagram."""
        self._endpoint = endpoint
        session = os.urandom(SESSION)
        self._payloads = Payloads(session, session * _SIZE, len(session), _SIZE)
        self._sent: list[float] = []
        """When each datagram was sent."""

    def step(self, clock: Callable[[], float]) -> Answer | None:
        """Send a datagram if it is time, and receive one. Return the answer if it is an echo.

        Raises:
            WrongEchoError: the server sent something else.
            OSError: the address cannot be reached.

        """
        try:
            if (now := clock()) >= self.again:
                self.again = now + _AGAIN
                self.socket.send(self._payloads.datagram(len(self._sent)))
                self._sent.append(now)
            data = self.socket.recv(_RECEIVE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            raise next(iter(icmp.queued(self.socket)), icmp.from_errno(error.errno or 0)) from error
        number = self._payloads.residue(data)
        if number is None or number >= len(self._sent):
            number = 0
        if data != (right := self._payloads.datagram(number)):
            raise WrongEchoError(Mismatch.find(right, data), data)
        return Answer(self._endpoint, clock() - self._sent[number], number)
