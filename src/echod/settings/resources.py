"""What the settings name and this machine has to have: the loop, the log file, certificates and keys."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
from typing import TYPE_CHECKING, NamedTuple

from echod.daemon import logs
from echod.net import certificates
from echod.settings.problems import Problem, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime

    from echod.net.certificates import Warned
    from echod.settings.model import Loaded


class Resources(NamedTuple):
    """Settings, with what they name loaded."""

    loaded: Loaded
    tls: Mapping[str, certificates.Tls]
    """By the listeners' names."""

    def warnings(self, now: datetime) -> Iterator[tuple[str, Warned]]:
        """Yield a listener's name and a warning for each certificate that is invalid at that time, or will be soon."""
        for name, end in self.tls.items():
            for warning in end.warnings(now):
                yield name, warning


def acquire(loaded: Loaded) -> Resources:
    """Load what the settings name.

    Raises:
        SettingsError: with everything that cannot be had.

    """
    problems = list(_unusable(loaded))
    ends: dict[str, certificates.Tls] = {}
    read = functools.cache(certificates.read)  # listeners may share a pipe
    for name, table in loaded.settings.all_listeners().items():
        if table.tls is not None:
            try:
                ends[name] = certificates.load(**table.tls.model_dump(), read=read)
            except certificates.TlsError as error:
                key = ("listeners", name, "tls", error.key)
                problems.append(Problem(loaded.origins[key], ".".join(key), str(error)))
    if problems:
        raise SettingsError(problems)
    return Resources(loaded, ends)


def log_problem(loaded: Loaded, error: OSError) -> Problem:
    """Return the problem of a log file that cannot be opened."""
    message = f"{loaded.settings.log.file!r} cannot be written: {error.strerror}"
    return Problem(loaded.origins["log", "file"], "log.file", message)


def log_problems(loaded: Loaded) -> Iterator[Problem]:
    """Open the log file for a moment, and yield the problem if that fails."""
    if (error := logs.refusal(loaded.settings.log.file)) is not None:
        yield log_problem(loaded, error)


def has_uvloop() -> bool:
    """Tell whether uvloop is installed."""
    return importlib.util.find_spec("uvloop") is not None


def loop_factory(choice: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes the loop of a choice: uvloop, asyncio, or auto.

    Raises:
        ImportError: uvloop was chosen and is not installed.

    """
    if choice == "asyncio" or (choice == "auto" and not has_uvloop()):
        return asyncio.SelectorEventLoop
    import uvloop  # noqa: PLC0415  (an optional dependency)

    return uvloop.new_event_loop


def _unusable(loaded: Loaded) -> Iterator[Problem]:
    settings = loaded.settings
    if settings.loop == "uvloop" and not has_uvloop():
        message = "uvloop is not installed: install it, or choose auto or asyncio"
        yield Problem(loaded.origins["loop",], "loop", message)
    if settings.admin.address and not all(map(importlib.util.find_spec, ("aiohttp", "prometheus_client"))):
        message = "aiohttp and prometheus-client are needed for it: pip install 'echod[admin]'"
        yield Problem(loaded.origins["admin", "address"], "admin.address", message)
    # A FIFO is not tried here: to open and close it would be the end of the input to its reader.
    if not logs.is_fifo(settings.log.file):
        yield from log_problems(loaded)
