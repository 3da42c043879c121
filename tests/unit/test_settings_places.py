"""The lines of keys and values in a TOML document."""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echod.settings.places import Place, find
from loading import problems

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echod.settings.types import Key
    from loading import Write

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("no_settings_in_the_environment")]

DOCUMENT = '''\
# a = 1
a = 1  # a comment with "quotes" and [brackets
"b.c" . d = """
a = 2
"] \\""""
list = [ # a comment
  "x, y", 'z]', [1,
  2],  # another
]
[limits]
table = {p = 1, "q = r" = [
 2020-01-01 10:00:00, 0o660], s.t = '}'}
[[many]]
[ listeners . "x]" . tls ]
key = true'''


def test_document() -> None:
    """Find the line and the text of each value, in each form of TOML."""
    assert find(DOCUMENT) == {
        ("a",): Place(2, "1"),
        ("b.c",): Place(3),
        ("b.c", "d"): Place(3, '"""\na = 2\n"] \\""""'),
        ("list",): Place(6, "[ # a comment\n  \"x, y\", 'z]', [1,\n  2],  # another\n]"),
        ("list", "0"): Place(7, '"x, y"'),
        ("list", "1"): Place(7, "'z]'"),
        ("list", "2"): Place(7, "[1,\n  2]"),
        ("list", "2", "0"): Place(7, "1"),
        ("list", "2", "1"): Place(8, "2"),
        ("limits",): Place(10),
        ("limits", "table"): Place(11, "{p = 1, \"q = r\" = [\n 2020-01-01 10:00:00, 0o660], s.t = '}'}"),
        ("limits", "table", "p"): Place(11, "1"),
        ("limits", "table", "q = r"): Place(11, "[\n 2020-01-01 10:00:00, 0o660]"),
        ("limits", "table", "q = r", "0"): Place(12, "2020-01-01 10:00:00"),
        ("limits", "table", "q = r", "1"): Place(12, "0o660"),
        ("limits", "table", "s"): Place(12),
        ("limits", "table", "s", "t"): Place(12, "'}'"),
        ("many",): Place(13),
        ("listeners",): Place(14),
        ("listeners", "x]"): Place(14),
        ("listeners", "x]", "tls"): Place(14),
        ("listeners", "x]", "tls", "key"): Place(15, "true"),
    }
    assert find("") == find("# a\n\n") == {}


def test_header_below_its_table() -> None:
    """A table has the line of its own header, even if the header of a table in it is above."""
    assert find("[a.b]\n[a]\nx = 1") == {("a",): Place(2), ("a", "b"): Place(1), ("a", "x"): Place(3, "1")}


TEXTS = st.text(st.sampled_from("ab.'\"\\\n\t#[]{}=, \x7fé🎉"), max_size=8)


def quoted(text: str) -> str:
    """Return a text as a basic string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def literal(text: str) -> str:
    """Return a text in a form with few escapes, if it has one."""
    if text.isprintable() and "'" not in text:
        return f"'{text}'"
    if all(char.isprintable() or char in "\n\t" for char in text) and "'" not in text:
        return f"'''\n{text}'''"
    return '"""' + quoted(text)[1:-1].replace("\\n", "\n") + '"""'


SCALARS = st.one_of(
    TEXTS.map(quoted),
    TEXTS.map(literal),
    st.integers(0, 999).map(oct),
    st.sampled_from(["-1.5e3", "inf", "true", "2020-01-01", "2020-01-01 10:00:00Z", '""""""', "''''''", '"""\\\n """']),
)
SPACES = st.sampled_from(["", " ", "\t "])
BREAKS = st.sampled_from(["", " ", "\n", " # ] \" '\n\n", "\n#\n"])
NAMES = st.sampled_from(["a", "1", "-", "b_c", "'a.b'", "''"]) | TEXTS.map(quoted)


@st.composite
def arrays(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    items = [draw(BREAKS) + draw(values) + draw(BREAKS) for _ in range(draw(st.integers(0, 3)))]
    return "[" + ",".join(items) + (draw(st.sampled_from(["", ","])) if items else "") + draw(BREAKS) + "]"


@st.composite
def tables(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    pairs = draw(st.dictionaries(NAMES.map(canonical), values, max_size=3))
    return "{" + ",".join(f" {quoted(name)} = {value}" for name, value in pairs.items()) + "}"


def canonical(name: str) -> str:
    (key,) = tomllib.loads(f"{name} = 0")
    return key


VALUES = st.recursive(SCALARS, lambda values: arrays(values) | tables(values), max_leaves=6)


@st.composite
def documents(draw: st.DrawFn) -> str:
    lines = []
    for number in range(draw(st.integers(0, 4))):
        if number:
            lines.append(f"{draw(SPACES)}[{draw(SPACES)}t{number}{draw(SPACES)}.{draw(NAMES)}]{draw(SPACES)}# ] [")
        names = draw(st.lists(NAMES, max_size=3, unique_by=canonical))
        lines += (f"{draw(SPACES)}{name}{draw(SPACES)}={draw(SPACES)}{draw(VALUES)}{draw(BREAKS)}" for name in names)
    return "\n".join(lines) + draw(BREAKS)


def leaves(value: Any, path: Key = ()) -> Iterator[tuple[Key, Any]]:
    if path:
        yield path, value
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, str(name)))


@settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(documents())
def test_any_document(document: str) -> None:
    """The place of every value that tomllib reads has a text with that value, and the text is in that line."""
    values = dict(leaves(tomllib.loads(document)))
    places = find(document)
    assert places.keys() == values.keys()
    lines = document.split("\n")
    for path, place in places.items():
        if place.value:
            assert repr(tomllib.loads(f"x = {place.value}")["x"]) == repr(values[path])
            assert "\n".join(lines[place.line - 1 :]).find(place.value) <= len(lines[place.line - 1])
        else:
            assert "[" in lines[place.line - 1]


def test_lines_of_problems(write: Write) -> None:
    """A problem has the line of its value or key, of its item, and of its table if the key is missing."""
    config = write("""\
listen = [
  "h:1",
  "h",
]
[limits]
backlog = 0
timeut = 1
[unknown]
[listeners.a]
proxy_trusted = ["10.0.0.0/8",
  "10.0.0.1/8"]
tls = {certificate = "x"}
[listeners.b]
address = "h:1"
""")
    lines = problems(config=config, places=True)
    assert [line.partition(": ")[::2] for line in (line[: line.index(": ", 9)] for line in lines)] == [
        ("FILE:3", "listen[1]"),
        ("FILE:6", "limits.backlog"),
        ("FILE:7", "limits.timeut"),
        ("FILE:9", "listeners.a.address"),
        ("FILE:11", "listeners.a.proxy_trusted[1]"),
        ("FILE:12", "listeners.a.tls.private_key"),
        ("FILE:8", "unknown"),
        ("FILE:14", "listeners.b.address"),
    ]
