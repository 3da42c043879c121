"""Test the Markdown pages: settings must be valid, and links must have a target."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE

if TYPE_CHECKING:
    from certificates import Certificates
    from harness import Command

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git repository"),
]


def pages() -> list[Path]:
    """Return the Markdown files tracked by git."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_settings(command: Command, tmp_path: Path, certificates: Certificates) -> None:
    """Check each TOML block with `echod check`, after replacing its paths by those of existing files."""
    real = {
        "certificate": certificates.certificate,
        "private_key": certificates.key,
        "client_ca": certificates.ca,
        "file": tmp_path / "echod.log",
    }
    tested, rejected = set(), []
    for page in pages():
        for written in re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            tested.add(page.name)
            block = written
            for key, path in real.items():
                block = re.sub(rf'^{key} = ".*"', f'{key} = "{path}"', block, flags=re.MULTILINE)
            config = tmp_path / "echo.toml"
            config.write_text(block)
            result = command("check", "--config", str(config))
            if (result.returncode, result.stderr) != (0, ""):
                rejected.append(f"{page.name}: {result.stderr}\n{written}")
    assert not rejected, "\n".join(rejected)
    assert {"tls.md", "proxy-protocol.md", "sockets.md", "modes.md", "limits.md", "reload.md"} <= tested


def test_links() -> None:
    """Check that each relative link leads to a file and, if it has a fragment, to a heading."""
    broken, count = [], 0
    for page in pages():
        # Code blocks and inline code are not links.
        text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            count += 1
            name, _, heading = target.partition("#")
            file = page.parent / name if name else page
            if not file.exists() or (heading and heading not in headings(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)
    assert count > 20


def headings(page: Path) -> set[str]:
    """Return the link fragments of a page's headings."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_site(tmp_path: Path) -> None:
    """The site is built without a warning, needs no other server, and has every page in its navigation."""
    script = [sys.executable, str(ROOT / "docs" / "make_site.py"), str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=PATIENCE * 10)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    home = (site / "index.html").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert f'href="./{name}"' in home or page.name == "index.md", f"{name} is missing in the nav of mkdocs.yml"
    assert '<pre class="mermaid">' in (site / "architecture.html").read_text()
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert re.findall(r'(?:src=|<link[^>]* href=)"(?:https?:)?//[^"]*', text) == []
        for link in re.findall(r'(?:src|href)="([^":#]+)(?:#[^"]*)?"', text):
            target = site / link[1:] if link.startswith("/") else page.parent / link
            assert target.exists(), f"{page.name}: {link}"
    assert '<script src="./mermaid.min.js">' in home


def test_architecture() -> None:
    """Each file that the map of the architecture names exists, and each package is in the picture."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    picture, _, table = page.partition("| feature | file |")
    table = table.partition("\n\n")[0]
    files = re.findall(r"`([\w/]+(?:\.\w+|/))`", table)
    assert len(files) > 50
    assert [file for file in files if not ((ROOT / "src" / "echod" / file).exists() or (ROOT / file).exists())] == []
    packages = {folder.parent.name for folder in (ROOT / "src" / "echod").glob("*/__init__.py")}
    assert packages == set(re.findall(r"(\w+)\[", picture)) & packages
