"""What the settings name and this machine has to have: the loop, the log file, certificates and keys."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, NamedTuple

from echod.daemon import logs
from echod.loops import has_uvloop
from echod.net import certificates
from echod.settings.problems import Problem, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime

    from echod.net.certificates import CertificateWarning
    from echod.settings.model import Config


class Resources(NamedTuple):
    """Settings, with what they name loaded."""

    config: Config
    tls: Mapping[str, certificates.ServerTls]
    """By the listeners' names."""

    def warnings(self, now: datetime) -> Iterator[tuple[str, CertificateWarning]]:
        """Yield a listener's name and a warning for each certificate that is invalid at that time, or will be soon."""
        for name, end in self.tls.items():
            for warning in end.warnings(now):
                yield name, warning


def acquire(config: Config) -> Resources:
    """Load what the settings name.

    Raises:
        SettingsError: with everything that cannot be had.

    """
    problems = list(_unusable(config))
    ends: dict[str, certificates.ServerTls] = {}
    read = functools.cache(certificates.read)  # listeners may share a pipe
    for name, table in config.settings.all_listeners().items():
        if table.tls is not None:
            try:
                ends[name] = certificates.load(**table.tls.model_dump(), read=read)
            except certificates.CertificateError as error:
                key = ("listeners", name, "tls", error.key)
                problems.append(Problem(config.origins[key], ".".join(key), str(error)))
    if problems:
        raise SettingsError(problems)
    return Resources(config, ends)


def log_problem(config: Config, error: OSError) -> Problem:
    """Return the problem of a log file that cannot be opened."""
    message = f"{config.settings.log.file!r} cannot be written: {error.strerror}"
    return Problem(config.origins["log", "file"], "log.file", message)


def log_problems(config: Config) -> Iterator[Problem]:
    """Open the log file for a moment, and yield the problem if that fails."""
    if (error := logs.refusal(config.settings.log.file)) is not None:
        yield log_problem(config, error)


def _unusable(config: Config) -> Iterator[Problem]:
    settings = config.settings
    if settings.loop == "uvloop" and not has_uvloop():
        message = "uvloop is not installed: install it, or choose auto or asyncio"
        yield Problem(config.origins["loop",], "loop", message)
    if settings.admin.address and not all(map(importlib.util.find_spec, ("aiohttp", "prometheus_client"))):
        message = "aiohttp and prometheus-client are needed for it: pip install 'echod[admin]'"
        yield Problem(config.origins["admin", "address"], "admin.address", message)
    # A FIFO is not tried here: to open and close it would be the end of the input to its reader.
    if not logs.is_fifo(settings.log.file):
        yield from log_problems(config)
