"""Write the tables of the Helm chart's values from the comments in values.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
CHART = ROOT / "packaging" / "helm" / "echod"
PAGES = (CHART / "README.md", ROOT / "docs" / "how-to" / "kubernetes.md")
START, END = "<!-- Values, written by `make docs` from values.yaml: change that. -->\n\n", "\n<!-- End of values. -->"


def values(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield the key, the default and the comment of each value.

    A comment describes the key in the line after it. A key without a value on its line contains other keys or a list.
    The keys of a list's items have no comment and are left out.
    """
    parents: list[tuple[int, str]] = []
    comment: list[str] = []
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if match := re.fullmatch(r" *# (.*)", line):
            comment.append(match[1])
            continue
        if match := re.fullmatch(r"( *)(\w+):(?: (.+))?", line):
            indent, name, default = len(match[1]), match[2], match[3]
            parents = [(depth, parent) for depth, parent in parents if depth < indent] + [(indent, name)]
            if default is None and following.lstrip().startswith("- "):
                default = "[…]"
            if comment and default is not None:
                yield ".".join(parent for _, parent in parents), default, " ".join(comment)
        comment = []


def table() -> str:
    """Return the table of all values."""
    rows = ["| value | default | meaning |", "| --- | --- | --- |"]
    rows += [f"| `{key}` | `{default}` | {meaning} |" for key, default, meaning in values(source())]
    return "\n".join(rows) + "\n"


def source() -> str:
    """Return the content of values.yaml."""
    return (CHART / "values.yaml").read_text()


def filled(page: str) -> str:
    """Return a page with the current table."""
    before, _, rest = page.partition(START)
    return before + START + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text()))
