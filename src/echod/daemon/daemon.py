"""One process: settings, log, loop, servers and signals, put together and taken apart."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import echod
from echod import threads
from echod.connection.echo import EchoSession
from echod.connection.tls import TlsBuffers, TlsEnd
from echod.daemon import systemd
from echod.daemon.logs import STDERR
from echod.daemon.systemd import Notifier, count
from echod.net import addresses, kernel
from echod.net.listeners import ListenerSpec, inherit, open_listeners
from echod.server.ledger import Ledger, Receipt
from echod.server.server import Server, ServerSettings
from echod.settings.model import ListenerSettings, changes
from echod.settings.problems import Problem, SettingsError
from echod.settings.resources import log_problem, loop_factory
from echod.threads import ThreadError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from structlog.typing import FilteringBoundLogger

    from echod.admin.http import Admin
    from echod.admin.status import DaemonView
    from echod.daemon.logs import Log
    from echod.daemon.signals import Signals
    from echod.daemon.systemd import Manager
    from echod.net.listeners import Listener
    from echod.settings.model import Loaded
    from echod.settings.resources import Resources
    from echod.settings.types import Key

# Seconds that the admin listener may take to close.
_ADMIN_CLOSE = 5.0

# Looks at a reload, a second apart, until it is given up. A pause of the process takes one of them at most.
_RELOAD_LOOKS = 30

# Descriptors that are no client's: the log, the loop's own, and some to spare.
_RESERVED_DESCRIPTORS = 16


def serve(found: Resources, log: Log, signals: Signals, load: Callable[[Resources], Resources]) -> int:
    """Be the daemon, until a signal.

    Args:
        found: the settings, and what they name.
        log: of the process.
        signals: those that have come already, and all that come.
        load: reads the settings again for a reload, given those in force; it may be slow.

    Returns:
        The exit code: 0, or 128 + N if signal N forced the stop.

    Raises:
        ListenError: some address cannot be opened; then none is.

    """
    settings = found.loaded.settings
    for variable in found.loaded.unknown_variables:
        log.logger.warning("unknown_variable", variable=variable)
    manager = systemd.find_manager(log.logger.warning)
    descriptors = kernel.raise_descriptor_limit()
    inherited = inherit()
    tables = _tables(found.loaded, inherited)
    specs = [ListenerSpec(name, table.parsed_address, table.permissions) for name, table in tables.items()]
    if settings.admin.address:
        # Before anything listens: it takes its time to import.
        from echod.admin.http import Admin  # noqa: PLC0415  (an extra)

        specs.append(ListenerSpec("admin", addresses.parse(settings.admin.address)))
    try:
        listeners = open_listeners(specs, settings.limits.backlog, inherited, signals.is_stopping)
    except InterruptedError:
        listeners = []  # the stop begins as soon as there is a loop, and has nothing to drain
    admin = Admin(listeners.pop(), specs[-1].address) if settings.admin.address and listeners else None
    used = {str(address.name) for _, address, _ in specs if isinstance(address, addresses.InheritedAddress)}
    for name in inherited.keys() - used:
        log.logger.warning("inherited_socket_unused", name=name)
    with asyncio.Runner(loop_factory=loop_factory(settings.loop)) as runner:
        daemon = _Daemon(found, tables, log, load, descriptors, inherited, admin)
        return runner.run(daemon.run(listeners, signals, manager))


def _tables(loaded: Loaded, inherited: Collection[str]) -> dict[str, ListenerSettings]:
    """Return every listener by its name: where sockets were inherited and no address is given, these are they."""
    if inherited and ("listen",) not in loaded.origins and not loaded.settings.listeners:
        return {name: ListenerSettings(address=f"systemd:{name}") for name in inherited}
    return loaded.settings.all_listeners()


class _Daemon:
    """What runs inside the loop."""

    def __init__(
        self,
        found: Resources,
        tables: Mapping[str, ListenerSettings],
        log: Log,
        load: Callable[[Resources], Resources],
        descriptors: int,
        inherited: Collection[str],
        admin: Admin | None,
    ) -> None:
        self._found = found
        self._first = found.loaded.settings
        self._tables = dict(tables)
        self._log = log
        self._load = load
        self._descriptors = descriptors
        self._inherited = inherited
        self._own_descriptors = _lowest_free_descriptor() + _RESERVED_DESCRIPTORS
        self._admin = admin
        if admin is not None:
            self._own_descriptors += admin.max_connections
        self._buffers = TlsBuffers()
        self._servers: dict[str, Server] = {}
        self._stop = asyncio.Event()
        self._signals: list[int] = []
        self._code = 0
        self._reloading = False
        self._reload_again = False
        self._reloads = Counter[str]()

    async def run(self, listeners: list[Listener], signals: Signals, manager: Manager | None) -> int:
        loop = asyncio.get_running_loop()
        self._notifier = Notifier(manager, self._numbers, lambda: self._logger)
        loop.set_exception_handler(self._on_loop_exception)
        signals.attach(loop, self._on_signal, self._on_hangup)
        self._warn()
        max_connections = self._cap()
        for listener in listeners:
            observers = () if self._admin is None else (self._admin.observer(listener.name),)
            ledger = Ledger(self._logger.bind(listener=listener.name), self._first.log.connections, observers)
            server_settings = self._server_settings(listener.name, max_connections)
            self._servers[listener.name] = Server(listener.sockets, server_settings, ledger)
        self._logger.info(
            "started",
            version=echod.__version__,
            pid=os.getpid(),
            loop=type(loop).__module__.partition(".")[0],
            python=sys.version.partition(" ")[0],  # as platform.python_version(), whose import takes a millisecond
        )
        addresses_in_use = {listener.name: _addresses(listener) for listener in listeners}
        if self._admin is not None:
            self._admin.start(self._subject(addresses_in_use), lambda: self._logger)
        for listener in listeners:
            self._servers[listener.name].start()
            for address in addresses_in_use[listener.name]:
                self._logger.info("listening", listener=listener.name, address=address)
        if self._admin is not None:
            for address in _addresses(self._admin.listener):
                self._logger.info("listening", listener="admin", address=address)
        self._notifier.ready()
        # From here on garbage is collected, but not looked for in what the start has made: that would stop the loop for
        # 20 ms each time.
        gc.freeze()
        gc.enable()
        await self._stop.wait()
        self._notifier.stopping()
        servers = self._servers.values()
        clients = sum(server.begin_stop() for server in servers)
        self._logger.info("draining", signal=signal.Signals(self._signals[0]).name, clients=clients)
        failures = await self._shut_down()
        signals.detach(loop)
        return self._code or int(bool(failures))

    async def _shut_down(self) -> dict[str, BaseException]:
        """Stop all listeners side by side, log the receipt and the totals; return the listeners that failed."""
        outcomes = dict(
            zip(
                self._servers,
                await asyncio.gather(*(server.shutdown() for server in self._servers.values()), return_exceptions=True),
                strict=True,
            )
        )
        failures = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, BaseException)}
        receipt = asdict(Receipt.total(outcome for outcome in outcomes.values() if isinstance(outcome, Receipt)))
        self._logger.info("drained", **receipt)
        self._notifier.drained(receipt)
        if self._admin is not None:
            try:
                async with asyncio.timeout(_ADMIN_CLOSE):
                    await self._admin.close()
            except Exception as error:  # noqa: BLE001  (it is logged)
                failures["admin"] = error
        for name, failure in failures.items():
            self._logger.error("stop_failed", listener=name, exc_info=failure)
        self._logger.info("stopped", **self._totals())
        return failures

    @property
    def _logger(self) -> FilteringBoundLogger:
        return self._log.logger

    # Signals and accidents

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        self._stop.set()
        if not self._code and (number == signal.SIGQUIT or len(self._signals) > 1):
            self._code = 128 + number
            for server in self._servers.values():
                server.abort()

    def _on_loop_exception(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        protocol, error = context.get("protocol"), context.get("exception")
        # What stands between a transport and its session knows the session.
        session = getattr(protocol, "session", protocol)
        if isinstance(session, EchoSession) and isinstance(error, Exception) and not session.ended.done():
            session.fail(error)  # it comes out of the client's task, and is logged there
        else:
            self._logger.error("loop_error", message=context["message"], exc_info=error)

    # Reloading

    def _on_hangup(self) -> None:
        """Reopen the log, and read the settings again in a thread: files may be slow, and a check makes a handshake."""
        self._reopen_log()
        if self._stop.is_set():
            self._logger.info("reload_ignored")
            return
        if self._reloading:
            self._reload_again = True
            self._logger.info("reload_queued")
            return
        self._reloading = True
        self._notifier.reloading()
        loop = asyncio.get_running_loop()
        try:
            # No executor's thread: those are awaited at the end, and a file may be a pipe without a writer.
            loaded = threads.call(loop, partial(self._load, self._found), "reload")
        except ThreadError as error:
            loaded = loop.create_future()
            loaded.set_exception(error)
        loaded.add_done_callback(self._reload)
        self._look(loaded, _RELOAD_LOOKS)

    def _look(self, loaded: asyncio.Future[Resources], looks: int) -> None:
        """Give up a reload that has been reading for too long, so that the next SIGHUP starts another."""
        if loaded.done():
            return
        if looks:
            asyncio.get_running_loop().call_later(1, self._look, loaded, looks - 1)
            return
        problem = (
            f"not read within {_RELOAD_LOOKS} seconds: a pipe without a writer, or a file system that does not answer?"
        )
        loaded.set_exception(SettingsError([Problem("", "", problem)]))

    def _reload(self, loaded: asyncio.Future[Resources]) -> None:
        self._reloading = False
        if self._stop.is_set():
            loaded.exception()  # or asyncio would log it as one that nothing has retrieved
            self._logger.info("reload_ignored")
            return
        problems: list[str] = []
        try:
            self._apply(loaded.result())
        except SettingsError as error:
            problems = [str(problem) for problem in error.problems]
        except ThreadError as error:
            problems = [str(error)]
        except Exception as error:
            self._logger.exception("reload_crashed")
            problems = [f"an unexpected failure: {error!r}"]
        self._reloads["failure" if problems else "success"] += 1
        if problems:
            self._logger.error("reload_failed", problems=problems)
        self._notifier.reloaded(problems)
        if self._reload_again:
            self._reload_again = False
            self._on_hangup()

    def _reopen_log(self) -> None:
        """Reopen the log file. This is not part of the reload, so that no problem of the settings can prevent it."""
        try:
            self._log.reopen()
        except OSError as error:
            reason = error.strerror
        except ThreadError as error:
            reason = str(error)
        else:
            return
        self._logger.error("log_reopen_failed", file=self._log.settings.file, error=reason)

    def _apply(self, found: Resources) -> None:
        """Put other settings in force, all of them or none.

        Raises:
            SettingsError: the log file or a backlog cannot be had; nothing has changed.
            ThreadError: the log's thread cannot be started; nothing has changed.

        """
        loaded, settings = found.loaded, found.loaded.settings
        before, tables = self._found.loaded.settings, _tables(loaded, self._inherited)
        # Steps that can fail come first, and are undone if a later one fails.
        with contextlib.ExitStack() as undo:
            for name, server in self._servers.items():
                if name not in tables:
                    continue
                undo.callback(_restore_backlog, server, before.limits.backlog)
                try:
                    server.set_backlog(settings.limits.backlog)
                except OSError as error:
                    origin = loaded.origins.get(("limits", "backlog"), "")
                    message = f"cannot be set on {name}: {error.strerror}"
                    raise SettingsError([Problem(origin, "limits.backlog", message)]) from error
            try:
                self._log.change(settings.log)
            except OSError as error:
                raise SettingsError([log_problem(loaded, error)]) from error
            undo.pop_all()
        self._found = found
        max_connections = self._cap()
        for name, server in self._servers.items():
            server.ledger.reconfigure(self._logger.bind(listener=name), settings.log.connections)
            # A listener that has gone from the settings is served as before, until a restart.
            if name in tables:
                self._tables[name] = tables[name]
                server.reconfigure(self._server_settings(name, max_connections))
        self._logger.info("reloaded", changed=[".".join(key) for key in changes(before, settings)])
        self._warn()
        if waiting := self._restart_needed():
            self._logger.warning("restart_needed", settings=waiting)

    def _restart_needed(self) -> list[str]:
        return sorted({".".join(key) for key in self._waiting_for_restart()})

    def _waiting_for_restart(self) -> Iterator[Key]:
        """Yield what is not in force, since it takes effect at a start only."""
        began_with, now = self._first, self._found.loaded.settings
        for key in changes(began_with, now):
            if key[0] in {"loop", "listen", "admin"}:
                yield key
            elif key[0] == "listeners" and not (key[1] in began_with.listeners and key[1] in now.listeners):
                yield key[:2]
            elif key[0] == "listeners" and key[2] in {"address", "socket_mode"}:
                yield key

    def _warn(self) -> None:
        for listener, warning in self._found.warnings(datetime.now(UTC)):
            self._logger.warning(warning.event, listener=listener, **warning.fields)

    # Settings

    def _cap(self) -> int:
        """Return the most clients a listener may have, which the descriptors bound too."""
        specs, listeners = self._found.loaded.settings.limits.max_connections, len(self._tables)
        room = max(1, self._descriptors - self._own_descriptors)
        if specs * listeners > room:
            self._logger.warning(
                "descriptor_limit",
                limit=self._descriptors,
                max_connections=specs,
                listeners=listeners,
                room_for_clients=room,
            )
        return min(specs, room)

    def _server_settings(self, name: str, max_connections: int) -> ServerSettings:
        tls = self._found.tls.get(name)
        end = TlsEnd(tls.context, self._buffers) if tls is not None else None
        return ServerSettings.derive(self._found.loaded.settings, self._tables[name], end, max_connections)

    def _numbers(self) -> str:
        servers = self._servers.values()
        clients = count(sum(server.clients for server in servers), "client")
        connections = count(sum(server.ledger.counters.accepted for server in servers), "connection")
        received = count(sum(server.received for server in servers), "byte")
        return f"{clients} now, {connections} so far, {received} received"

    def _subject(self, addresses_in_use: Mapping[str, Sequence[str]]) -> DaemonView:
        from echod.admin.status import DaemonView  # noqa: PLC0415  (of use to the admin listener only)

        return DaemonView(
            servers=self._servers,
            addresses=addresses_in_use,
            found=lambda: self._found,
            draining=self._stop.is_set,
            restart_needed=self._restart_needed,
            reloads=self._reloads,
            log_lines_dropped=lambda: self._log.lost,
        )

    def _totals(self) -> dict[str, object]:
        """Return what was done since the start, for the last line of the log."""
        accounts = [server.ledger.counters for server in self._servers.values()]
        faults = sum((counters.faults for counters in accounts), Counter[str]())
        return {
            "connections": sum(counters.accepted for counters in accounts),
            "empty": sum(counters.empty for counters in accounts),
            "accept_pauses": sum(counters.accept_pauses for counters in accounts),
            "accept_failures": sum(counters.accept_failures for counters in accounts),
            "received": sum(counters.received for counters in accounts),
            "sent": sum(counters.sent for counters in accounts),
            "acked": sum(counters.acked for counters in accounts),
            "discarded_bytes": sum(counters.discarded for counters in accounts),
            **({"faults": dict(faults)} if faults else {}),
        }


def _restore_backlog(server: Server, backlog: int) -> None:
    with contextlib.suppress(OSError):  # the failure that is being undone is reported
        server.set_backlog(backlog)


def _addresses(listener: Listener) -> list[str]:
    """Return what a listener's sockets are bound to."""
    names = (listening.sock.getsockname() for listening in listener.sockets)
    return [str(addresses.from_sockaddr(name) or name) for name in names]


def _lowest_free_descriptor() -> int:
    """Return what tells, but for a hole or two, how many descriptors are in use."""
    descriptor = os.dup(STDERR)
    os.close(descriptor)
    return descriptor
