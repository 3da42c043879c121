"""Suggestions for unknown keys, variables and options."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING

from echod.settings.model import Settings, has_named_tables, section
from echod.text import closest, hint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic import BaseModel

    from echod.settings.types import Key

ALIASES = {
    "listen": "addr address bind host port server",
    "address": "addr bind host listen port",
    "mode": "protocol",
    "idle_timeout": "client_timeout keepalive_timeout read_timeout timeout timeout_client",
    "write_timeout": "send_timeout",
    "handshake_timeout": "ssl_handshake_timeout tls_timeout",
    "max_connections": "connections max_clients max_conn maxconn worker_connections",
    "max_connections_per_client": "limit_conn max_connections_per_ip",
    "write_buffer": "buffer buffer_size bufsize",
    "drain_timeout": "grace_period graceful_timeout hard_stop_after shutdown_timeout timeout worker_shutdown_timeout",
    "level": "log_level loglevel verbosity",
    "format": "log_format",
    "file": "access_log error_log log_file logfile output",
    "proxy_protocol": "accept_proxy proxy send_proxy",
    "proxy_trusted": "set_real_ip_from trusted trusted_proxies",
    "socket_mode": "chmod permissions unix_mode",
    "certificate": "cert certfile crt server_cert ssl_certificate",
    "private_key": "key keyfile ssl_certificate_key",
    "client_ca": "ca ca_file cafile ssl_client_certificate verify",
    "minimum_version": "min_version ssl_min_ver ssl_protocols tls_version",
    "tls": "https ssl",
    "admin": "http metrics status",
    "faults": "fault",
    "listeners": "frontend listener",
}
"""First guesses, and the names of other servers, by the key that means the same."""


_NAME = "NAME"


def for_key(key: Key) -> str:
    """Return advice on an unknown key."""
    model: type[BaseModel] = Settings
    names = iter(key[:-1])
    for name in names:
        field = model.model_fields[name]
        if has_named_tables(field):
            next(names, None)  # all named tables of a field have one model
        model = section(field) or model
    unknown = key[-1]
    here = _find(unknown, model)
    top = Settings.model_fields.get(unknown)
    if top is not None and section(top) is not None:
        return f"{unknown!r} is a table of its own: write [{unknown}{'.NAME' if has_named_tables(top) else ''}]"
    if top is not None:
        advice = f"{unknown!r} is a top-level key: in a file, it must come before the first table"
        return f"{advice}; or did you mean {'.'.join(here)!r}?" if here else advice
    if here:
        return f"did you mean {'.'.join(here)!r}?"
    if closest(unknown, model.model_fields) is None and (there := _find(unknown, Settings)):
        place = f"below [{'.'.join(there[:-1])}]" if there[:-1] else "at the top level"
        return f"did you mean {there[-1]!r} {place}?"
    return hint(unknown, model.model_fields)


def for_value(key: Key, origin: str) -> str:
    """Return advice on a value in place of a named table: it may be a key of such a table, which lacks its name."""
    table, *name = key
    model = section(Settings.model_fields[table])
    if len(name) == 1 and model is not None and name[0] in model.model_fields:
        delimiter = "." if origin.startswith("--") else "__"
        tables, _, last = origin.rpartition(delimiter)
        if tables and ":" not in origin:  # an option or a variable
            return f"; write {tables}{delimiter}{_NAME}{delimiter}{last}"
        return f"; for the key {name[0]!r}, write [{table}.{_NAME}] above it"
    return ""


def for_variable(name: str) -> Key:
    """Return the key that was probably meant with a variable that names no setting; () if there is none.

    Args:
        name: without its prefix.

    """
    name = name.lower()
    known = list(paths(Settings))
    for path in known:
        words = [word for part in path for word in (["(.+?)"] if part == _NAME else part.split("_"))]
        if name.startswith(path[0]) and (found := re.fullmatch("_*".join(words), name)):
            return tuple(found[1] if part == _NAME else part for part in path)
    ends = [path for path in known if path[-1] == name]
    if len(ends) == 1 and _NAME not in ends[0]:
        return ends[0]
    first, *rest = name.split("__")
    if first in Settings.model_fields:  # not a table
        return (first,)
    table = closest(first, Settings.model_fields) if rest else None
    return () if table is None else (table, *rest)


def for_option(option: str) -> str:
    """Return advice on an unknown option. A key without its section, or the name in another server, is a common guess."""
    every = list(paths(Settings))
    tables = {path[:length] for path in every for length in range(1, len(path))}
    options = [path for path in every if path not in tables] + [("config",), ("help",), ("version",)]
    *table, last = option.lstrip("-").replace("-", "_").lower().split(".")
    given = dict([option.lstrip("-").split(".")[:2]]) if len(table) > 1 else {}
    if inside := [path for path in options if len(path) > len(table) + 1 and path[: len(table) + 1] == (*table, last)]:
        return f"name a key of the section, as in {_spelling(inside[0])}"
    meant: dict[str, list[Key]] = {}
    for path in options:
        for name in {path[-1], *ALIASES.get(path[-1], "").split()}:
            meant.setdefault(name, []).append(path)
    # All named tables of a section have the same keys.
    beside = [path for path in options if len(path) == len(table) + 1 and (not table or path[0] == table[0])]
    near = closest(last, [path[-1] for path in beside])
    exact = meant.get(last, [])
    found = (
        [path for path in exact if path in beside]
        or exact
        or [path for path in beside if path[-1] == near]
        or meant.get(closest(last, meant) or "", [])
    )
    if found:
        return f"did you mean {' or '.join(_spelling(path, given) for path in found)}?"
    if table and beside:
        return f"use one of: {', '.join(_spelling(path, given) for path in beside)}"
    return "`echod --help` lists the options"


def _spelling(path: Key, names: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the option of a key.

    Args:
        path: the key.
        names: the names that were given to tables, by section.

    """
    name = names.get(path[0], _NAME)
    return f"--{'.'.join(name if part == _NAME else part.replace('_', '-') for part in path)}"


def _find(unknown: str, model: type[BaseModel]) -> Key:
    """Return the path of the key that has this name, or means the same, in a table or in its tables. () if there is none."""
    name = unknown.lower().replace("-", "_")
    names = {name, *(key for key, aliases in ALIASES.items() if name in aliases.split())}
    return next((path for path in paths(model) if path[-1] in names), ())


def paths(model: type[BaseModel], path: Key = ()) -> Iterator[Key]:
    """Yield the paths of all keys of a table, and then those of its tables."""
    yield from ((*path, name) for name in model.model_fields)
    for name, field in model.model_fields.items():
        if (inner := section(field)) is not None:
            yield from paths(inner, (*path, name, *((_NAME,) if has_named_tables(field) else ())))
