"""The options of a server inside another program, checked as the daemon's settings are."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from echod.settings import resources
from echod.settings.model import Config
from echod.settings.problems import Problem, SettingsError, validate
from echod.text import hint

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from echod.settings.resources import Resources
    from echod.settings.types import Key

# The names that the tables of settings have here; in what a user is told they are left out.
NAME = "server"
_FAULT = "fault"
_PREFIXES = (f"listeners.{NAME}.", "faults.")


class CommonOptions(TypedDict, total=False):
    """What is set for a server wherever it runs. The names, the defaults and the checks are those of the settings."""

    mode: Literal["stream", "line", "info"]
    limits: dict[str, Any]
    """The keys of `[limits]`. The limit of descriptors is the program's affair: accepting pauses without them."""
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


def acquire(address: str, options: Mapping[str, Any]) -> Resources:
    """Return the settings that the options amount to, with one listener, and what they name loaded.

    Raises:
        SettingsError: with everything that is wrong, by the names of the options.

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
    values |= {"listen": (), "listeners": {NAME: {"address": address, **table}}}
    try:
        return _acquire(values)
    except SettingsError as error:
        raise SettingsError([problem._replace(key=_own(problem.key)) for problem in error.problems]) from None


def check_loop(choice: object) -> None:
    """Make sure that there is such a loop.

    Raises:
        SettingsError: there is none, or uvloop is not installed.

    """
    _acquire({"loop": choice})


def check_names(options: Collection[str], known: Collection[str]) -> None:
    """Make sure that all options are known.

    Raises:
        SettingsError: with those that are not, and what each may have meant to be.

    """
    unknown = [name for name in options if name not in known]
    if unknown:
        names = sorted(known)
        raise SettingsError([Problem("", name, f"unknown option; {hint(name, names)}") for name in unknown])


def _acquire(values: Mapping[str, Any]) -> Resources:
    # Where each comes from is no question: all are arguments of one call.
    origins: defaultdict[Key, str] = defaultdict(str)
    return resources.acquire(Config(validate(values, origins), origins, ()))


def _own(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key
