"""The server inside another program, and its options, which are checked like the daemon's settings."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import defaultdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict

import structlog

from echod.connection.tls import TlsBuffers, TlsEnd
from echod.net.listeners import ListenerSpec, open_listeners
from echod.server import server
from echod.server.ledger import Ledger
from echod.server.settings import ServerSettings
from echod.settings import resources
from echod.settings.model import Config
from echod.settings.problems import Problem, SettingsError, validate
from echod.text import hint

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from types import TracebackType
    from typing import Unpack

    from structlog.typing import FilteringBoundLogger

    from echod.net.addresses import TcpAddress, UnixAddress
    from echod.server.ledger import Entry
    from echod.server.receipt import Receipt
    from echod.settings.resources import Resources
    from echod.settings.types import Key

# The names of the tables in the settings. Messages leave them out.
_NAME = "server"
_FAULT = "fault"
_PREFIXES = (f"listeners.{_NAME}.", "faults.")


# Drops all events that a server logs.
_SILENT: FilteringBoundLogger = structlog.wrap_logger(
    structlog.ReturnLogger(), [], structlog.make_filtering_bound_logger(logging.CRITICAL)
).bind()


class CommonOptions(TypedDict, total=False):
    """The options of every server. Names, defaults and checks are those of the settings."""

    mode: Literal["stream", "line", "info"]
    limits: dict[str, Any]
    """The keys of `[limits]`. The program itself sets its limit of descriptors; without a free one, accepting pauses."""
    shutdown: dict[str, Any]
    """The keys of `[shutdown]`."""
    proxy_protocol: Literal["off", "require"]
    proxy_trusted: Sequence[str]
    fault: dict[str, Any]
    """The keys of a `[faults.NAME]`."""


class Options(CommonOptions, total=False):
    """The options of `Server.listen`."""

    socket_mode: str
    tls: dict[str, Any]
    """The keys of a listener's `tls`; a file may be a path object."""


class Server:
    """Run an echo server in your own asyncio program.

        async with echod.Server.listen("127.0.0.1:0", mode="line") as server:
            print(*server.addresses)
            ...
            receipt = await server.shutdown()

    Without `async with`, `start` it in a running loop of asyncio or uvloop, and end it with `shutdown`. It belongs to that
    loop. A loop may have several servers, and each thread a loop. Make all calls in the thread of the loop, except those
    that read `addresses` and `clients`.
    """

    def __init__(self, core: server.Server) -> None:
        self._core = core

    @classmethod
    def listen(
        cls,
        address: str = "127.0.0.1:0",
        *,
        logger: FilteringBoundLogger | None = None,
        observe: Callable[[Entry], None] | None = None,
        **options: Unpack[Options],
    ) -> Self:
        """Open an address and return a server for it, which is not started yet.

        New clients wait in the backlog until then. This call blocks while it resolves names and reads TLS files. Open unix
        sockets before other threads create files: bind(2) needs a umask of its own for a moment, so that the socket file
        never has wrong permissions.

        Args:
            address: HOST:PORT, [V6]:PORT, :PORT, unix:PATH or unix:@NAME. Port 0 takes a free port.
            logger: logger of structlog for the lines that the daemon would log, such as `client_closed` for each client
                that sent a byte. None: log nothing.
            observe: called in the loop with the entry of every closed connection.
            options: the keys of `echod.embed.Options`. docs/reference/configuration.md has every key and default.

        Raises:
            SettingsError: options are wrong; it has all problems.
            ListenError: the address cannot be opened.

        """
        acquired = acquire(address, options)
        settings = acquired.config.settings
        table, tls = settings.listeners[_NAME], acquired.tls.get(_NAME)
        (listener,) = open_listeners(
            [ListenerSpec(address, table.parsed_address, table.permissions)], settings.limits.backlog
        )
        log = _SILENT if logger is None else logger.bind(listener=address)
        for _, warning in acquired.warnings(datetime.now(UTC)):
            log.warning(warning.event, **warning.fields)
        ledger = Ledger(log, "nonempty", () if observe is None else (observe,))
        end = TlsEnd(tls.context, TlsBuffers()) if tls is not None else None
        sections = ServerSettings(table, settings.limits, settings.shutdown, settings.faults.get(table.fault), end)
        return cls(server.Server(listener.sockets, sections, ledger))

    async def __aenter__(self) -> Self:
        """Begin to accept."""
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop gracefully, also after an exception. If the task is cancelled during that, stop at once."""
        try:
            await self.shutdown()
        except asyncio.CancelledError:
            self.abort()
            await self.shutdown()
            raise

    @property
    def addresses(self) -> list[TcpAddress | UnixAddress]:
        """The addresses of the sockets, with the actual port instead of 0. They remain after the end."""
        return self._core.addresses

    @property
    def clients(self) -> int:
        """The number of connected clients."""
        return self._core.clients

    def start(self) -> None:
        """Begin to accept, in the running loop.

        Raises:
            RuntimeError: it was called before, or this is not the server's loop.

        """
        self._core.start()

    def begin_stop(self) -> int:
        """Begin the time that the receipt covers, and return the number of clients. `shutdown` calls it too.

        Raises:
            RuntimeError: this is not the server's loop.

        """
        return self._core.begin_stop()

    async def shutdown(self) -> Receipt:
        """Stop gracefully and return the receipt.

        The stop goes on if the caller is cancelled. Another call waits for the same end and returns the same receipt.

        Raises:
            RuntimeError: this is not the server's loop.
            Exception: a task of the server failed, which is a defect. The clients have been drained all the same.

        """
        receipt = await self._core.shutdown()
        if self._core.failure is not None:
            raise self._core.failure
        return receipt

    def abort(self) -> None:
        """Reset every client in a shutdown that is running or follows, and end it at once. Idempotent.

        Raises:
            RuntimeError: this is not the server's loop.

        """
        self._core.abort()


def acquire(address: str, options: Mapping[str, Any]) -> Resources:
    """Return the settings from the options, with one listener, and load the files that they name.

    Raises:
        SettingsError: options are wrong; it has all problems, under the options' names.

    """
    check_names(options, Options.__optional_keys__)
    table = {name: value for name, value in options.items() if name not in {"limits", "shutdown", "fault"}}
    if isinstance(tls := options.get("tls"), dict):
        table["tls"] = {
            key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in tls.items()
        }
    values = {name: options[name] for name in ("limits", "shutdown") if name in options}
    if "fault" in options:
        values["faults"] = {_FAULT: options["fault"]}
        table["fault"] = _FAULT
    values |= {"listen": (), "listeners": {_NAME: {"address": address, **table}}}
    try:
        return _acquire(values)
    except SettingsError as error:
        raise SettingsError([problem._replace(key=_own(problem.key)) for problem in error.problems]) from None


def check_loop(choice: object) -> None:
    """Check that a loop of this name is available.

    Raises:
        SettingsError: the name is unknown, or uvloop is not installed.

    """
    _acquire({"loop": choice})


def check_names(options: Collection[str], known: Collection[str]) -> None:
    """Check that all options are known.

    Raises:
        SettingsError: options are unknown; it has a suggestion for each.

    """
    unknown = [name for name in options if name not in known]
    if unknown:
        names = sorted(known)
        raise SettingsError([Problem("", name, f"unknown option; {hint(name, names)}") for name in unknown])


def _acquire(values: Mapping[str, Any]) -> Resources:
    # All values come from one call, so problems have no origin.
    origins: defaultdict[Key, str] = defaultdict(str)
    return resources.acquire(Config(validate(values, origins), origins, ()))


def _own(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key
