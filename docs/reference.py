"""Write docs/configuration.md: the reference page of the settings, from their model."""

from __future__ import annotations

import sys
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ByteSize
from pydantic.fields import FieldInfo

from echod import render
from echod.settings import FaultSettings, ListenerSettings, Settings, TlsSettings, leaves, section

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

HEAD = """\
# Configuration

<!-- Written by `make docs` from the model in src/echod/settings.py: change that. -->

Each setting has one name, and three places where it can be given. The first that has it wins:

1. the command line: `--limits.idle-timeout 60` (or `--limits.idle_timeout=60`); of an option given twice, the last
   counts; a value that begins with a dash needs the form with `=`;
2. the environment: `ECHOD_LIMITS__IDLE_TIMEOUT=60`, the parts of the name joined by two underscores; a variable that is
   set to nothing is a value too;
3. the file, TOML, that `--config` or else the variable `ECHOD_CONFIG` names: `idle_timeout = 60` under `[limits]`; a
   pipe such as `/dev/stdin` can be read only once, so a [reload](reload.md) of it fails;
4. otherwise it has its default.

`--listen` may be repeated, and takes several addresses separated by commas, as `ECHOD_LISTEN` does. Addresses from one of
these places replace those from the next, and so does every other value; only the tables of names (`listeners`, `faults`)
are put together from all of them, key by key.

`echod check` takes the same options as `echod serve`, reports everything that is wrong, one problem a line, and opens
no address; its exit code is 78 then, and 0 when all is well. It opens and closes `log.file` if that exists, and creates
none. A reader that waits for the first writer of a FIFO therefore sees the end of its input. `echod config` prints the
settings in force as a TOML file, each line with where its value came from.

An unknown key is an error, in the file, on the command line, and in the environment where its section is known. An
unknown variable, such as `ECHOD_PORT`, which Kubernetes injects for a service named echod, is a warning.

Durations are seconds from 0 up, with a fraction if need be. Sizes are bytes, or strings such as `"64KiB"` and `"1MB"`. An
address is `HOST:PORT`, `[V6]:PORT` with an IPv6 address in brackets, or `:PORT` for all addresses of both families. A host
name that has several addresses, such as localhost, is listened on at each. `unix:PATH` is a unix socket, `unix:@NAME` one
in the abstract namespace, and `systemd:NAME` stands for the sockets of that name that echod inherits
([sockets.md](sockets.md)).

SIGHUP has all of this read again ([reload.md](reload.md)).

`config.example.toml` has every key with its default.
"""

NAMED = """\
## {title}

{text}

The name is part of the key: `[{name}.NAME]` in the file, `--{name}.NAME.{key} …` on the command line, where it has no dot,
and `ECHOD_{variable}__NAME__{key_variable}` in the environment, where it becomes lower case and has no double underscore.
"""

TAIL = """\
## Exit codes

| code | when |
| --- | --- |
| 0 | a graceful stop, also one whose deadline cut clients off (the receipt says how many) |
| 1 | an unexpected failure, or the system refuses the thread that writes the log |
| 2 | the command line could not be parsed |
| 69 | an address could not be opened; then none is |
| 78 | the settings are invalid |
| 130, 131, 143 | a second SIGINT, a SIGQUIT or a second SIGTERM forced the stop |
"""


def page() -> Iterator[str]:
    """Yield the page's parts."""
    yield HEAD
    sections: dict[str, list[tuple[str, FieldInfo]]] = {}
    for key, field in leaves():
        sections.setdefault(key[0] if len(key) > 1 else "", []).append((key[-1], field))
    for name, fields in sections.items():
        if name:
            yield f"## [{name}]\n\n{Settings.model_fields[name].description}\n"
        else:
            yield "## Top level\n"
        yield table(fields)
    for name, model in (("listeners", ListenerSettings), ("faults", FaultSettings)):
        text = Settings.model_fields[name].description
        key = next(iter(model.model_fields))
        yield NAMED.format(
            title=f"[{name}.NAME]", text=text, name=name, key=key, variable=name.upper(), key_variable=key.upper()
        )
        yield table((name, field) for name, field in model.model_fields.items() if section(field) is None)
        if model is ListenerSettings:
            yield f"### [listeners.NAME.tls]\n\n{model.model_fields['tls'].description}\n"
            yield table(TlsSettings.model_fields.items())
    yield TAIL


def table(fields: Iterable[tuple[str, FieldInfo]]) -> str:
    """Return a table of settings."""
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields:
        if field.is_required():
            default = "required"
        else:
            default = "none" if field.default is None else f"`{render.value(field.default)}`"
        rows.append(f"| `{name}` | {kind(*bare(field))} | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def bare(field: FieldInfo) -> tuple[object, dict[str, float]]:
    """Return a field's type and its bounds, also where there need not be a value."""
    annotation: Any = field.annotation
    metadata: list[object] = field.metadata
    if get_origin(annotation) in {Union, UnionType}:
        (annotation,) = (choice for choice in get_args(annotation) if choice is not NoneType)
    if get_origin(annotation) is Annotated:
        annotation, *given = get_args(annotation)
        metadata = [part for item in given for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    return annotation, {
        name: getattr(item, name) for item in metadata for name in ("ge", "gt", "le") if hasattr(item, name)
    }


def kind(annotation: object, bound: dict[str, float]) -> str:
    """Return a type in a reader's words, with the range of a number, where it is no matter of course."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list"
    if bound.keys() == {"gt", "le"}:
        return f"number, above {bound['gt']}, to {bound['le']}"
    name = {ByteSize: "size", float: "seconds", int: "number", str: "text"}[annotation]  # type: ignore[index]
    if "le" in bound:
        low, high = (ByteSize(bound[end]) if annotation is ByteSize else bound[end] for end in ("ge", "le"))
        return f"{name}, {render.value(low)} to {render.value(high)}".replace('"', "")
    return f"{name}, above {bound['gt']}" if "gt" in bound else name


if __name__ == "__main__":
    sys.stdout.write("\n".join(page()))
