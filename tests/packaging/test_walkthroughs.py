"""Follow the README and the tutorial in a real terminal."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from walkthrough import Walkthrough

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs" / "tutorial").glob("*.md")))]

pytestmark = pytest.mark.once


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Type each command on the page, and compare the output with the page."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    for name in [name for name in os.environ if name.startswith("COVERAGE_") or name == "PYTEST_ADDOPTS"]:
        monkeypatch.delenv(name)
    text = (ROOT / page).read_text()
    if "\n$ nc " in text and not shutil.which("nc"):
        pytest.skip("nc is not installed")
    walkthrough = Walkthrough(tmp_path)
    walkthrough.follow(text)
    assert walkthrough.commands


def test_pictures() -> None:
    """The pictures of the README exist, and load fast together."""
    pictures = re.findall(r"docs/images/[\w.]+", (ROOT / "README.md").read_text())
    assert pictures == ["docs/images/terminal.svg", "docs/images/status.png"]
    assert sum((ROOT / picture).stat().st_size for picture in pictures) < 150_000
