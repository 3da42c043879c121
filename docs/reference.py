"""Write docs/reference/configuration.md, the reference page of the settings, from their model."""

from __future__ import annotations

import sys
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ByteSize

from echod.settings import toml
from echod.settings.model import FaultSettings, ListenerSettings, Settings, TlsSettings, leaves, section
from echod.settings.types import LONGEST, Bounds

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pydantic.fields import FieldInfo

HEAD = """\
# Settings

<!-- Written by `make docs` from the model in src/echod/settings/model.py: change that. -->

Each setting has one name and three sources. The first source that contains it wins:

1. The command line: `--limits.idle-timeout 60` or `--limits.idle_timeout=60`. If an option is repeated, the last one
   counts. A value that begins with a dash needs the form with `=`.
2. The environment: `ECHOD_LIMITS__IDLE_TIMEOUT=60`. Two underscores join the parts of the name. An empty variable is a
   value too.
3. The TOML file named by `--config`, or else by the variable `ECHOD_CONFIG`: `idle_timeout = 60` under `[limits]`. A pipe
   such as `/dev/stdin` can be read only once, so a [reload](../how-to/reload.md) of it fails.

A setting without a source has its default.

`--listen` may be repeated. Like `ECHOD_LISTEN`, it accepts several addresses separated by commas. Every value replaces
that of the next source, and so do the addresses of `listen`. Only named tables (`listeners`, `faults`) are merged key by
key.

`echod check` accepts the same options as `echod serve` and opens no address. It reports every problem on a line of its own
and exits with code 78, or with 0 if there is no problem ([exit codes](exit-codes.md)). It opens and closes an existing
`log.file`, and does not create one. If that file is a FIFO without another writer, its
reader then sees the end of its input.

`echod config` prints the settings in force as a TOML file, each line with the origin of its value.

A problem in the file begins with the file's name and the line: `echo.toml:3: limits.backlog: should be at least 1, not 0`.
Items of a list are numbered from 0: `listen[2]`.

An unknown key is an error in the file and on the command line. In the environment, it is an error if its section is known.
Other unknown variables are warnings: Kubernetes injects `ECHOD_PORT` for a service named echod.

A duration is a number of seconds, such as `60` or `0.25`, or text such as `"250ms"`, `"10s"`, `"5m"`, `"1h"` or
`"1h30m"`. It is at most a year. A size is a number of bytes, or text such as `"64KiB"`, `"64k"` or `"1.5MB"`: units with an
i are powers of 1024, all others are powers of 1000. The case of keywords, such as `"info"`, does not matter. In the
file, text needs quotes.

An address is `HOST:PORT`, `[V6]:PORT` with an IPv6 address in brackets, or `:PORT` for all IPv4 and IPv6 addresses. If a host
name such as localhost has several addresses, echod listens on each of them. `unix:PATH` is a unix socket, and
`unix:@NAME` a unix socket in the abstract namespace. `systemd:NAME` means the inherited sockets of that name
([sockets](../how-to/sockets.md)). With `udp:` in front, `udp:HOST:PORT`, `udp:[V6]:PORT`, `udp::PORT` and `udp:systemd:NAME`
are [UDP listeners](../how-to/udp.md). TCP and UDP may share a port number.

SIGHUP makes echod read all sources again ([reload](../how-to/reload.md)).

`config.example.toml` contains every key with its default.
"""

NAMED = """\
## {title}

{text}

The name is part of the key: `[{name}.NAME]` in the file, `--{name}.NAME.{key} …` on the command line, and
`ECHOD_{variable}__NAME__{key_variable}` in the environment. On the command line, the name cannot contain a dot. In the
environment, it cannot contain a double underscore and becomes lower case.
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


def table(fields: Iterable[tuple[str, FieldInfo]]) -> str:
    """Return a table of settings."""
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields:
        if field.is_required():
            default = "required"
        else:
            default = "none" if field.default is None else f"`{toml.value(field.default)}`"
        rows.append(f"| `{name}` | {kind(*bare(field))} | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def bare(field: FieldInfo) -> tuple[object, Bounds | None]:
    """Return the type and the bounds of a field, which may be optional."""
    annotation: Any = field.annotation
    metadata: list[object] = field.metadata
    if get_origin(annotation) in {Union, UnionType}:
        choices = [choice for choice in get_args(annotation) if choice is not NoneType]
        annotation = choices[0] if len(choices) == 1 else annotation
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
    validators = (getattr(item, "func", None) for item in metadata)
    return annotation, next((each for each in validators if isinstance(each, Bounds)), None)


KINDS: dict[object, str] = {bool: "true or false", int | Literal["auto"]: "number from 1 on, or `auto`"}


def kind(annotation: object, bounds: Bounds | None) -> str:
    """Describe a type, with the range of a number or a size."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list"
    if (text := KINDS.get(annotation)) is not None:
        return text
    if bounds is None:
        return "text"
    if bounds.highest == LONGEST:
        return f"duration, above {bounds.lowest}" if bounds.above else "duration"
    low, high = (bounds.unit(bound).replace('"', "") for bound in (bounds.lowest, bounds.highest))
    name = "size" if annotation is ByteSize else "number"
    return f"{name}, above {low}, to {high}" if bounds.above else f"{name}, {low} to {high}"


if __name__ == "__main__":
    sys.stdout.write("\n".join(page()))
