"""Run the commands of the pages that show a listener, against a daemon with the page's settings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from harness import PATIENCE, clean_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Start

DOCS = Path(__file__).parents[2] / "docs"

# A command that pauses is repeated with longer pauses, in case the machine is too slow for the pause in the page.
PAUSES = (1, 4, 16)

# These need a proxy. test_behind_proxies.py has tests with them.
PROXIES = ("haproxy", "nginx")

pytestmark = pytest.mark.once


class Step(NamedTuple):
    """A command in a page, and its output there."""

    command: str
    output: str


def blocks(text: str, language: str) -> list[str]:
    """Return the content of all code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def steps(text: str) -> Iterator[Step]:
    """Yield the commands of a page. A variable that one of them sets is also set in those after it."""
    variables = ""
    for block in blocks(text, "console"):
        if block.startswith(tuple(f"$ {proxy}" for proxy in PROXIES)):
            continue
        for command, output in re.findall(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            if re.match(r"\w+=", command):
                variables += command + "\n"
            else:
                yield Step(variables + command, output)


def alike(output: str, expected: str) -> bool:
    """Return whether an output is that of the page, except for numbers. An ellipsis there stands for any text."""

    def plain(text: str) -> str:
        return re.sub(r"\d+", "0", text.replace(" = ", "=")).strip()

    return re.fullmatch(re.escape(plain(expected)).replace("…", ".*"), plain(output), re.DOTALL) is not None


@pytest.mark.parametrize("loop_name", ["uvloop"])
@pytest.mark.parametrize(
    ("name", "tools"),
    [
        ("how-to/tls.md", ("openssl", "socat", "ncat")),
        ("how-to/proxy-protocol.md", ("nc",)),
        ("reference/modes.md", ("nc", "socat")),
    ],
)
def test_commands(start: Start, tmp_path: Path, name: str, tools: tuple[str, ...]) -> None:
    """Each command of the page has the output that the page shows."""
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    page = (DOCS / name).read_text()
    environment = clean_environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def shell(script: str) -> str:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE * 3,
            check=False,
        )
        return done.stdout

    for script in blocks(page, "sh"):
        shell(script)
    settings = next(block for block in blocks(page, "toml") if "[listeners." in block)
    (tmp_path / "echo.toml").write_text(re.sub(r'^(address = ".*):\d+"$', r'\1:0"', settings, flags=re.MULTILINE))
    daemon = start("--config", "echo.toml", listen=None, prepare=lambda: os.chdir(tmp_path))
    listeners = tomllib.loads(settings)["listeners"]
    daemon.wait_for("listening", count=len(listeners))
    ports = {
        listener["address"].rpartition(":")[2]: daemon.wait_for("listening", listener=key)["address"].rpartition(":")[2]
        for key, listener in listeners.items()
        if listener["address"].startswith("127.")
    }

    run = 0
    for step in steps(page):
        command = re.sub(r"\b\d{4}\b", lambda match: ports.get(match[0], match[0]), step.command)
        command = command.replace("timeout 10 ", f"timeout {PATIENCE:.0f} ")
        for pause in PAUSES:
            output = shell(command.replace("sleep 1", f"sleep {pause}"))
            if alike(output, step.output):
                break
        else:
            pytest.fail(f"{name}:\n{command}\n{output}\ninstead of\n{step.output}")
        run += 1
    assert run > 1
