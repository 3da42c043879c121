"""Messages between the parent and a worker, without I/O.

They are pickled, as both ends are forks of one process and no one else has the socket.
"""

from __future__ import annotations

import pickle
import struct
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

    from echod.admin.snapshot import Count
    from echod.daemon.plan import Plan
    from echod.net.addresses import InheritedAddress
    from echod.server.ledger import Counters
    from echod.server.receipt import Receipt
    from echod.settings.model import Config
    from echod.settings.problems import Problem

# Each message follows its length.
HEAD = struct.Struct("!I")


class Loaded(NamedTuple):
    """Settings that the parent has read and validated, and the content of the files that they name."""

    config: Config
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """Return the settings and files of a plan."""
        return cls(plan.resources.config, plan.resources.files)


class ListenerPart(NamedTuple):
    """The sockets of one listener that a worker gets."""

    name: str
    sockets: int
    is_inherited: bool
    is_shared: bool
    """Whether all workers accept from these sockets."""
    removed_from: Loaded | None
    """The last settings that contain the listener, if those in force do not: it is served until a restart."""


class Start(NamedTuple):
    """The first message to a worker. Its descriptors are the slots, then a semaphore and then a quota per listener, then the sockets."""

    number: int
    """Of this worker, from 0 on."""
    workers: int
    loaded: Loaded
    inherited: tuple[InheritedAddress, ...]
    """The addresses of all inherited sockets."""
    listeners: tuple[ListenerPart, ...]


class Ready(NamedTuple):
    """The worker accepts."""


class Prepare(NamedTuple):
    """Check other settings. They take effect with `Commit`."""

    loaded: Loaded


class Prepared(NamedTuple):
    """The answer to `Prepare`."""

    problems: tuple[Problem, ...]


class Commit(NamedTuple):
    """Put the prepared settings in force."""


class Reopen(NamedTuple):
    """Open the log file again."""


class BeginStop(NamedTuple):
    """Begin the time that the receipt covers."""


class StopBegun(NamedTuple):
    """The answer to `BeginStop`."""

    clients: int


class Drain(NamedTuple):
    """Empty the backlog, close the sockets and drain."""


class Abort(NamedTuple):
    """Reset all clients, then as `Drain`."""


class Drained(NamedTuple):
    """The last message of a worker, after `Drain` or `Abort`."""

    receipt: Receipt
    counters: tuple[Counters, ...]
    """Since its start, by listener."""


class TakeFigures(NamedTuple):
    """Count the clients for the admin listener."""


class Figures(NamedTuple):
    """The answer to `TakeFigures`. Sequences are by listener."""

    counts: tuple[Count, ...]
    """Without the clients themselves."""
    accept_paused: tuple[bool, ...]
    log_lines_dropped: int


def encode(message: object) -> bytes:
    """Return a message with its length in front."""
    data = pickle.dumps(message)
    return HEAD.pack(len(data)) + data


def decode(data: bytes) -> object:
    """Return the message in these bytes, which are without the length."""
    return pickle.loads(data)  # noqa: S301  (from a fork of this process)
