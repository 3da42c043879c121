"""Test the distribution: its name, its extras, and that no text installs the package `echod` of the index, which is foreign."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytestmark = pytest.mark.once

# Not followed by a character of a longer name, or of a path.
NAME = r"echod(?![\w/.-])"
FOREIGN = re.compile(
    rf"""\b(?:pip3?|pipx|uv|poetry|pdm|conda)\b[^\n`;&|]*?\s(?:install|add|download|inject|run|wheel)(?=\s)[^\n`;&|]*?['"\s]{NAME}
      | \buvx\s[^\n`;&|]*?{NAME}
      | \bechod\[[a-z]+[],]
      | (?:^|['"])\s*{NAME}\s*(?:[<>=~!]=|@\s)
    """,
    re.MULTILINE | re.VERBOSE,
)
FOLDERS = ("docs", "src", "packaging", "examples", "benchmarks", ".ci")
TEXTS = {".md", ".py", ".toml", ".txt", ".html", ".yaml", ".yml", ".tpl", ".service", ".json", ".sh", ""}


def test_name() -> None:
    assert PROJECT["name"] == "echod-server"
    assert PROJECT["scripts"] == {"echod": "echod.cli:main"}


def test_all() -> None:
    """The extra `all` has every other extra."""
    extras = PROJECT["optional-dependencies"]
    assert extras.pop("all") == [f"echod-server[{','.join(sorted(extras))}]"]


@pytest.mark.parametrize(
    "command",
    [
        "pip install echod",
        "python3 -m pip install -U echod",
        "`pip3 install --user echod`",
        "pip install 'echod[pytest]'",
        "needs the extra `echod[probe]`",
        "echod[admin,probe]",
        "pip install aiohttp echod",
        'pip install "echod==0.1"',
        "pipx install echod",
        "pipx run echod probe :8000",
        "uv add echod",
        "uv pip install echod",
        "uv tool install echod",
        "uvx echod",
        "echod>=0.1",
        'dependencies = ["echod>=0.1"]',
        "echod @ file:///wheel",
    ],
)
def test_foreign(command: str) -> None:
    assert FOREIGN.search(command)


@pytest.mark.parametrize(
    "command",
    [
        "pip install echod-server",
        "pip install 'echod-server[pytest]'",
        "pip install '.[all]'; then run echod",
        "pip install '.[all]' && echod check",
        "pip install echod_server-0.1.0-py3-none-any.whl",
        "pip install ./echod",
        "`pip install .`, and then `echod`",
        "install -m 644 packaging/systemd/echod.service /etc/systemd/system/",
        "docker run --detach --name echod echod",
        "uv run python3",
        "echod probe 127.0.0.1:8000",
    ],
)
def test_own(command: str) -> None:
    assert not FOREIGN.search(command)


def test_texts() -> None:
    """No page, message or file of the project installs the foreign package."""
    # The test run creates and deletes files of coverage.
    files = [path for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".coverage")]
    for folder in FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in TEXTS]
    found, count = [], 0
    for path in files:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        count += 1
        lines = [text.count("\n", 0, match.start()) + 1 for match in FOREIGN.finditer(text)]
        found += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    assert found == []
    assert count > 100


def make(*arguments: str) -> str:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help() -> None:
    """`make` alone lists every target with an explanation, and starts nothing."""
    assert make("--dry-run") == make("--dry-run", "help")
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {line.split()[0] for line in make("help").splitlines() if len(line.split()) > 2} == targets
