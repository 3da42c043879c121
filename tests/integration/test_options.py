"""The types of the options of a server in a program or a test: the keys of the settings, as a type checker sees them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from echod import options
from echod.settings import model, types

if TYPE_CHECKING:
    from pydantic import BaseModel

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "library.md"

# The types of settings, and the types that a caller may write for them.
WRITTEN: list[tuple[Any, Any]] = [
    (types.Seconds, options.Seconds),
    (types.PositiveSeconds, options.Seconds),
    (types.Size, options.Size),
    (types.Count, int),
    (types.Number, int),
    (types.Probability, float),
    (types.BurstLength, float),
    (types.Trigger, str),
    (types.Permissions, str),
    (types.Networks, options.Networks),
    (types.PortRanges, options.Networks),
    (bool, bool),
    (types.FileName, options.FileName),
    (types.Text, options.FileName),
]

TABLES: dict[Any, type[BaseModel]] = {
    options.LimitsOptions: model.LimitsSettings,
    options.ShutdownOptions: model.ShutdownSettings,
    options.FaultOptions: model.FaultSettings,
    options.TlsOptions: model.TlsSettings,
}


def written(annotation: Any) -> Any:
    """Return the type that a caller may write for a setting."""
    if get_origin(annotation) in {Union, UnionType}:
        (part,) = [part for part in get_args(annotation) if part is not NoneType]
        return written(part) | None
    for choice in (annotation, *get_args(annotation)):  # a validator may surround it
        if get_origin(choice) is Literal:
            return choice
    return next(value for setting, value in WRITTEN if setting == annotation)


def keys(table: type[BaseModel], *names: str) -> dict[str, Any]:
    """Return keys of a table with their types."""
    hints = get_type_hints(table, include_extras=True)
    return {name: written(hints[name]) for name in names or table.model_fields}


@pytest.mark.parametrize("table", TABLES)
def test_tables(table: Any) -> None:
    """A table has exactly the keys of the settings, with their types, and the same ones are required."""
    settings = TABLES[table]
    assert get_type_hints(table) == keys(settings)
    assert table.__required_keys__ == {name for name, field in settings.model_fields.items() if field.is_required()}


def test_options() -> None:
    """The options are the keys of a stream listener, and the tables. A thread always listens on TCP and may choose its loop."""
    single = set(model.ListenerSettings.model_fields) - {"address", "refuse_ports", "fault", "tls"}
    common = keys(model.ListenerSettings, *single) | {
        "limits": options.LimitsOptions,
        "shutdown": options.ShutdownOptions,
        "fault": options.FaultOptions,
    }
    assert get_type_hints(options.ServerOptions) == common | {"tls": options.TlsOptions}
    del common["socket_mode"]
    tls = {"tls": bool | options.IssuedTlsOptions | options.TlsOptions}
    assert get_type_hints(options.ThreadOptions) == common | tls | keys(model.Settings, "loop")


# A program with one statement per line. A comment has the text that mypy reports for the line.
SNIPPETS = """
from pathlib import Path

import pytest

from echod import Server
from echod.options import ShutdownOptions
from echod.pytest_plugin import with_options
from echod.testing import ServerFactory, ServerThread

soon: ShutdownOptions = {"quiet_period": 0.1, "drain_timeout": "250ms"}

Server.listen(mode="line", limits={"idle_timeout": 1, "max_line": "4KiB"}, proxy_trusted=["10.0.0.0/8"], shutdown=soon)
Server.listen("unix:/run/x", socket_mode="0600", fault={"action": "raise", "trigger": None})
Server.listen(tls={"certificate": Path("c.pem"), "private_key": "k.pem", "minimum_version": "1.3"})
Server.listen(limits={"idle_timout": 1})  # Extra key "idle_timout" for TypedDict "LimitsOptions"
Server.listen(limits={"idle_timeout": None})  # "idle_timeout" has type "float | str"
Server.listen(shutdown={"quiet_perod": 1})  # Extra key "quiet_perod"
Server.listen(fault={"action": "rise"})  # "action" has type
Server.listen(mode="lines")  # expected "Literal['stream', 'line', 'info']"
Server.listen(tls={"certificate": "c.pem"})  # Missing key "private_key"
Server.listen(tls=True)  # expected "TlsOptions"
Server.listen(loop="asyncio")  # Unexpected keyword argument "loop"

ServerThread(tls=True, loop="asyncio", limits={"backlog": 1})
ServerThread(tls={"minimum_version": "1.3"}, shutdown={"delay": 0})
ServerThread(tls={"certificate": "c.pem", "private_key": Path("k.pem")})
ServerThread(limits={"idle_timout": 1})  # Extra key "idle_timout"
ServerThread(loop="uvlop")  # expected "Literal['auto', 'uvloop', 'asyncio']"
ServerThread(socket_mode="0600")  # Unexpected keyword argument "socket_mode"

@with_options(tls=True, limits={"idle_timeout": 1})
@with_options(limits={"idle_timout": 1})  # Extra key "idle_timout"
def test_own(echod: ServerThread, echod_factory: ServerFactory) -> None:
    with echod_factory(mode="info") as server: server.port.bit_length()
    echod_factory(fault={"triger": "x"})  # Extra key "triger"

pytestmark = [with_options(mode="info"), pytest.mark.slow]
"""


@pytest.mark.once
def test_type_checker(tmp_path: Path) -> None:
    """Mypy accepts correct options, and rejects each wrong key and value where it is written."""
    programs = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    for name, source in {"snippets": SNIPPETS, **{f"page{index}": text for index, text in enumerate(programs)}}.items():
        (tmp_path / f"{name}.py").write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path / 'cache'}"]
    result = subprocess.run([*command, *tmp_path.glob("*.py")], capture_output=True, text=True, timeout=600)
    expected = {
        index: text for index, line in enumerate(SNIPPETS.split("\n"), 1) if (text := line.partition("  # ")[2])
    }
    errors = re.findall(r"^.*snippets\.py:(\d+): error: (.*)$", result.stdout, re.MULTILINE)
    found = {int(line): text for line, text in errors}
    assert found.keys() == expected.keys(), result.stdout + result.stderr
    assert [found[line] for line in expected if expected[line] not in found[line]] == []
    assert f"Found {len(errors)} errors in 1 file " in result.stdout
