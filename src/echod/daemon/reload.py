"""Reload the settings: read them in a thread, and apply them as a whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Protocol

from echod import threads
from echod.daemon import logs
from echod.settings.problems import Problem, SettingsError
from echod.threads import ThreadError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from echod.daemon.logs import Log
    from echod.daemon.plan import Plan
    from echod.daemon.systemd import Notifier
    from echod.settings.resources import Resources


# Looks at a reload, one second apart, until it is given up. A pause of the process takes one of them at most.
LOOKS = 30


class Reloader:
    """Reload the settings when requested, one reload at a time.

    Requests during a reload cause one more reload after it.

    Args:
        load: reads the settings and loads their certificates. It runs in a thread: files may be slow, and the check of
            a certificate is a handshake.
        apply: puts the result in force as a whole, or raises an exception and changes nothing.
        is_stopping: tells whether the daemon stops, so that a reload has no effect.
        notifier: reports the phases of a reload.
        log: of the process.

    """

    def __init__(
        self,
        load: Callable[[], Resources],
        apply: Callable[[Resources], None],
        is_stopping: Callable[[], bool],
        notifier: Notifier,
        log: Log,
    ) -> None:
        self._load = load
        self._apply = apply
        self._is_stopping = is_stopping
        self._notifier = notifier
        self._log = log
        self._running = False
        self._requested_again = False
        self.results = Counter[str]()
        """Number of reloads by result, "success" or "failure"."""

    def request(self) -> None:
        """Reload now, or after the current reload."""
        if self._is_stopping():
            self._log.logger.info("reload_ignored")
            return
        if self._running:
            self._requested_again = True
            self._log.logger.info("reload_queued")
            return
        self._running = True
        self._notifier.reloading()
        loop = asyncio.get_running_loop()
        try:
            # Not an executor: its threads are joined at exit, and reading a pipe without a writer never ends.
            loaded = threads.call(loop, self._load, "reload")
        except ThreadError as error:
            loaded = loop.create_future()
            loaded.set_exception(error)
        loaded.add_done_callback(self._finish)
        self._look(loaded, LOOKS)

    def _look(self, loaded: asyncio.Future[Resources], looks: int) -> None:
        """Give up a reload that has been reading for too long, so that the next SIGHUP starts another."""
        if loaded.done():
            return
        if looks:
            asyncio.get_running_loop().call_later(1, self._look, loaded, looks - 1)
            return
        problem = f"not read within {LOOKS} seconds: a pipe without a writer, or a file system that does not answer?"
        loaded.set_exception(SettingsError([Problem("", "", problem)]))

    def _finish(self, loaded: asyncio.Future[Resources]) -> None:
        self._running = False
        if self._is_stopping():
            loaded.exception()  # otherwise asyncio logs that it was never retrieved
            self._log.logger.info("reload_ignored")
            return
        problems: list[str] = []
        try:
            self._apply(loaded.result())
        except SettingsError as error:
            problems = [str(problem) for problem in error.problems]
        except ThreadError as error:
            problems = [str(error)]
        except Exception as error:
            self._log.logger.exception("reload_crashed")
            problems = [f"an unexpected failure: {error!r}"]
        self.results["failure" if problems else "success"] += 1
        if problems:
            self._log.logger.error("reload_failed", problems=problems)
        self._notifier.reloaded(problems)
        if self._requested_again:
            self._requested_again = False
            self.request()


class HasBacklog(Protocol):
    """A server, or the sockets of one listener."""

    def set_backlog(self, backlog: int) -> None:
        """Set the backlog of the listening sockets, except inherited ones.

        Raises:
            OSError: the kernel refused.

        """


def take_fallible_steps(before: Plan, plan: Plan, servers: Mapping[str, HasBacklog], log: Log) -> None:
    """Take the steps of a reload that can fail: set the backlogs, and change the log. If one fails, undo the others.

    Args:
        before: the plan in force.
        plan: the new one.
        servers: by the names of their listeners. One that is not in the new plan keeps its backlog.
        log: of the process.

    Raises:
        SettingsError: a backlog or the log file cannot be set.
        ThreadError: the log's thread cannot be started.

    """
    config = plan.resources.config
    with contextlib.ExitStack() as undo:
        for name in filter(plan.listeners.__contains__, servers):
            undo.callback(_restore_backlog, servers[name], before.settings.limits.backlog)
            try:
                servers[name].set_backlog(config.settings.limits.backlog)
            except OSError as error:
                origin = config.origins.get(("limits", "backlog"), "")
                message = f"cannot be set on {name}: {error.strerror}"
                raise SettingsError([Problem(origin, "limits.backlog", message)]) from error
        try:
            log.change(config.settings.log)
        except OSError as error:
            raise SettingsError([logs.problem(config, error)]) from error
        undo.pop_all()


def _restore_backlog(server: HasBacklog, backlog: int) -> None:
    with contextlib.suppress(OSError):  # the failure that is being undone is reported
        server.set_backlog(backlog)
