"""What the settings name and this machine has to have: the loop, the log file, certificates and keys."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from typing import TYPE_CHECKING, NamedTuple

from echod import logs, tls
from echod.settings.problems import Problem, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from echod.settings.model import Loaded

_DAY = 86400


class Resources(NamedTuple):
    """Settings, with what they name loaded."""

    loaded: Loaded
    tls: Mapping[str, tls.Tls]
    """By the listeners' names."""

    def warnings(self) -> Iterator[dict[str, object]]:
        """Yield the fields of a warning for each certificate that ends soon."""
        for name, end in self.tls.items():
            if end.ends_soon:
                days = int((end.expires - time.time()) / _DAY)
                yield {"listener": name, "file": end.certificate, "days": days}


def acquire(loaded: Loaded) -> Resources:
    """Load what the settings name.

    Raises:
        SettingsError: with everything that cannot be had.

    """
    problems = list(_unusable(loaded))
    ends: dict[str, tls.Tls] = {}
    for name, table in loaded.settings.all_listeners().items():
        if table.tls is not None:
            try:
                ends[name] = tls.load(**table.tls.model_dump())
            except tls.TlsError as error:
                key = ("listeners", name, "tls", error.key)
                problems.append(Problem(loaded.origins[key], ".".join(key), str(error)))
    if problems:
        raise SettingsError(problems)
    return Resources(loaded, ends)


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
    if (reason := logs.unusable(settings.log.file)) is not None:
        yield Problem(loaded.origins["log", "file"], "log.file", reason)
