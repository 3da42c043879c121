"""Find the line of each key and value in a TOML document. tomllib reads the values and does not tell where they are."""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_left
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from echod.settings.types import Key

_TOKEN = re.compile(
    r"""
    (?P<space> [ \t\r]+ | \#[^\n]* )
    | "{3} (?:\\.|[^\\])*? "{3,5} | '{3} .*? '{3,5}  # on several lines
    | " (?:\\.|[^\\"])* " | ' [^']* '
    | [\[\]{},=\n]
    | [^\s\[\]{},=\#"']+
    """,
    re.DOTALL | re.VERBOSE,
)


class Place(NamedTuple):
    """A key or an item in the document."""

    line: int
    value: str = ""
    """The value as it is written; empty for a table with a header."""


def find(document: str) -> dict[Key, Place]:
    """Return the place of each table, key and item. An item's name is its index.

    Args:
        document: TOML that tomllib has read.

    """
    return _Reader(document).places


class _Reader:
    """A recursive descent through the tokens of a valid document."""

    def __init__(self, document: str) -> None:
        self.places: dict[Key, Place] = {}
        self._document = document
        self._breaks = [found.start() for found in re.finditer("\n", document)]
        self._tokens = [found for found in _TOKEN.finditer(document) if found["space"] is None]
        self._next = 0
        table: Key = ()
        while self._next < len(self._tokens):
            if self._at("["):
                table = self._header()
            elif self._at("\n"):
                self._next += 1
            else:
                self._pair(table)

    def _at(self, *tokens: str) -> bool:
        return self._tokens[self._next][0] in tokens

    def _run(self, ends: Container[str]) -> str:
        """Read to one of the tokens or to the end of the document, and return the text before it."""
        first = self._next
        while self._next < len(self._tokens) and self._tokens[self._next][0] not in ends:
            self._next += 1
        return self._document[self._tokens[first].start() : self._tokens[self._next - 1].end()]

    def _line(self) -> int:
        return bisect_left(self._breaks, self._tokens[self._next].start()) + 1

    def _add(self, path: Key, name: str, line: int) -> Key:
        """Add the tables of a dotted name that is written below a path, and return the path of the name itself."""
        for part in _parts(name):
            path = (*path, part)
            self.places.setdefault(path, Place(line))
        return path

    def _header(self) -> Key:
        line = self._line()
        path = self._add((), self._run("\n").strip("[ \t]"), line)
        self.places[path] = Place(line)
        return path

    def _pair(self, table: Key) -> None:
        line = self._line()
        path = self._add(table, self._run("="), line)
        self._next += 1
        self._value(path)

    def _elements(self, end: str) -> Iterator[None]:
        """Stop at the first token of each element of an array or inline table, and after its end."""
        self._next += 1
        while not self._at(end):
            if self._at("\n", ","):
                self._next += 1
            else:
                yield
        self._next += 1

    def _value(self, path: Key) -> None:
        line, first = self._line(), self._tokens[self._next]
        if self._at("["):
            for index, _ in enumerate(self._elements("]")):
                self._value((*path, str(index)))
        elif self._at("{"):
            for _ in self._elements("}"):
                self._pair(path)
        else:
            self._run(",]}\n")
        end = self._tokens[self._next - 1].end()
        self.places[path] = Place(line, self._document[first.start() : end])


def _parts(name: str) -> Key:
    """Return the parts of a dotted name."""
    table: Any = tomllib.loads(f"{name} = 0")
    path: Key = ()
    while isinstance(table, dict):
        ((part, table),) = table.items()
        path = (*path, part)
    return path
