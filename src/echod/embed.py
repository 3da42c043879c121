"""The server inside another program, and its options, which are checked like the daemon's settings."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import defaultdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import structlog

from echod.connection.tls import TlsBuffers, TlsEnd
from echod.net.addresses import TcpAddress
from echod.net.listeners import ListenerSpec, open_listeners
from echod.options import ServerOptions
from echod.server import server
from echod.server.ledger import Ledger
from echod.server.settings import ServerSettings
from echod.settings import resources
from echod.settings.model import Config
from echod.settings.problems import Problem, SettingsError, validate
from echod.text import hint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Unpack

    from structlog.typing import FilteringBoundLogger

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


class Server(server.Server):
    """Run an echo server in your own asyncio program.

        async with echod.Server.listen("127.0.0.1:0", mode="line") as server:
            print(server.port)
            ...
            receipt = await server.shutdown()

    Without `async with`, `start` it in a running loop of asyncio or uvloop, and end it with `shutdown`. It belongs to that
    loop. A loop may have several servers, and each thread a loop. Make all calls in the thread of the loop, except those
    that read `addresses`, `port` and `clients`. docs/how-to/library.md lists the methods that a program may use.
    """

    @classmethod
    def listen(
        cls,
        address: str = "127.0.0.1:0",
        *,
        logger: FilteringBoundLogger | None = None,
        observe: Callable[[Entry], None] | None = None,
        **options: Unpack[ServerOptions],
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
            options: the keys of `echod.options.ServerOptions`. docs/reference/configuration.md has every key and default.

        Raises:
            SettingsError: options are wrong; it has all problems.
            ListenError: the address cannot be opened.

        """
        return cls.open(acquire(address, options, ServerOptions.__optional_keys__), logger, observe)

    @classmethod
    def open(
        cls, acquired: Resources, logger: FilteringBoundLogger | None, observe: Callable[[Entry], None] | None
    ) -> Self:
        """Open the address of acquired options, as `listen` does.

        Raises:
            ListenError: the address cannot be opened.

        """
        settings = acquired.config.settings
        table, tls = settings.listeners[_NAME], acquired.tls.get(_NAME)
        log = _SILENT if logger is None else logger.bind(listener=table.address)
        for _, warning in acquired.warnings(datetime.now(UTC)):
            log.warning(warning.event, **warning.fields)
        ledger = Ledger(log, "nonempty", () if observe is None else (observe,))
        end = TlsEnd(tls.context, TlsBuffers()) if tls is not None else None
        sections = ServerSettings(table, settings.limits, settings.shutdown, settings.faults.get(table.fault), end)
        spec = ListenerSpec(table.address, table.parsed_address, table.permissions)
        (listener,) = open_listeners([spec], settings.limits.backlog)  # last, as the steps above may fail
        return cls(listener.sockets, sections, ledger)

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
    def port(self) -> int:
        """The TCP port, which is the same for all addresses of a name.

        Raises:
            RuntimeError: this is a unix socket.

        """
        ports = [address.port for address in self.addresses if isinstance(address, TcpAddress)]
        if not ports:
            msg = f"{self!r} has no TCP port"
            raise RuntimeError(msg)
        return ports[0]

    async def shutdown(self) -> Receipt:
        """Stop gracefully and return the receipt.

        The stop goes on if the caller is cancelled. Another call waits for the same end and returns the same receipt.

        Raises:
            RuntimeError: this is not the server's loop.
            Exception: a task of the server failed, which is a defect. The clients have been drained all the same.

        """
        receipt = await super().shutdown()
        if self.failure is not None:
            raise self.failure
        return receipt


def acquire(address: str, options: Mapping[str, Any], known: frozenset[str]) -> Resources:
    """Return the settings from the options, with one listener, and load the files that they name.

    Args:
        address: the address of the listener.
        options: by their names.
        known: the names that the caller may use.

    Raises:
        SettingsError: options are wrong; it has all problems, under the options' names.

    """
    names = sorted(known)
    problems = [Problem("", name, f"unknown option; {hint(name, names)}") for name in options if name not in known]
    if address.startswith("udp:"):
        problems.append(
            Problem("", "address", f"{address!r}: a server in a program has no UDP: run the daemon for that")
        )
    values = {name: value for name, value in options.items() if name in known}
    settings: dict[str, Any] = {name: values.pop(name) for name in ("limits", "shutdown", "loop") if name in values}
    if "fault" in values:
        settings["faults"] = {_FAULT: values["fault"]}
        values["fault"] = _FAULT
    if isinstance(tls := values.get("tls"), dict):
        values["tls"] = {
            key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in tls.items()
        }
    settings |= {"listen": (), "listeners": {_NAME: {"address": address, **values}}}
    # All values come from one call, so problems have no origin.
    origins: defaultdict[Key, str] = defaultdict(str)
    try:
        return resources.acquire(Config(validate(settings, origins, problems), origins, {}))
    except SettingsError as error:
        raise SettingsError([problem._replace(key=_own(problem.key)) for problem in error.problems]) from None


def _own(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key
