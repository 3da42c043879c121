"""Load the certificates and keys of the settings, and check that the chosen loop and extras are installed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from echod.extras import missing
from echod.loops import has_uvloop
from echod.net import certificates
from echod.settings.problems import Problem, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from datetime import datetime

    from echod.net.certificates import CertificateWarning
    from echod.settings.model import Config


class Resources(NamedTuple):
    """Settings, and the certificates that they name."""

    config: Config
    tls: Mapping[str, certificates.ServerTls]
    """By the names of the listeners."""
    files: Mapping[str, bytes]
    """The content of each file that was read for them."""

    def warnings(self, now: datetime) -> Iterator[tuple[str, CertificateWarning]]:
        """Yield the name of a listener and a warning for each certificate that is invalid at that time, or will be soon."""
        for name, tls in self.tls.items():
            for warning in tls.warnings(now):
                yield name, warning


def acquire(
    config: Config, problems: Iterable[Problem] = (), read: Callable[[str], bytes] = certificates.read
) -> Resources:
    """Load the certificates and keys, and check the chosen loop and extras.

    Args:
        config: the settings.
        problems: those found earlier.
        read: reads a file. It is called once for each, because listeners may share a pipe.

    Raises:
        SettingsError: with the earlier problems, and everything that is missing or cannot be loaded.

    """
    problems = [*_missing(config), *problems]
    tls: dict[str, certificates.ServerTls] = {}
    files: dict[str, bytes] = {}

    def read_once(file: str) -> bytes:
        if file not in files:
            files[file] = read(file)
        return files[file]

    for name, table in config.settings.all_listeners().items():
        if table.tls is not None:
            try:
                tls[name] = certificates.load(**table.tls.model_dump(), read=read_once)
            except certificates.CertificateError as error:
                key = ("listeners", name, "tls", error.key)
                problems.append(Problem(config.origins[key], ".".join(key), str(error)))
    if problems:
        raise SettingsError(problems)
    return Resources(config, tls, files)


def _missing(config: Config) -> Iterator[Problem]:
    settings = config.settings
    if settings.loop == "uvloop" and not has_uvloop():
        message = "uvloop is not installed: install it, or choose auto or asyncio"
        yield Problem(config.origins["loop",], "loop", message)
    if settings.workers != 1 and sys.platform != "linux":
        yield Problem(config.origins["workers",], "workers", "more than one process needs Linux: set 1")
    if settings.admin.address and (message := missing("aiohttp", "prometheus-client")):
        yield Problem(config.origins["admin", "address"], "admin.address", message)
