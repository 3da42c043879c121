"""Build the documentation site: `make_site.py FOLDER`. Requires docs/requirements.txt, and npm for Mermaid.

The pages link to files of the project outside docs/. The site gets copies of these files, so it is complete without the
repository. Mermaid comes from its npm package, so that readers need no other server.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MERMAID = "12.3.0"


def build(folder: Path) -> None:
    """Build the site in FOLDER/site."""
    pages = folder / "docs"
    shutil.rmtree(folder / "site", ignore_errors=True)
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(DOCS, pages, ignore=shutil.ignore_patterns("*.py", "*.txt", "__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", folder)
    for page in pages.rglob("*.md"):
        page.write_text(with_copies(page.read_text(), page.relative_to(pages), pages))
    shutil.copy(mermaid(folder), pages)
    subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=folder, check=True)


def with_copies(text: str, page: Path, pages: Path) -> str:
    """Copy the files outside docs/ to which a page links, and return the page with links to the copies.

    The site has no pages for folders, so only the text of a link to a folder remains.
    """

    def replace(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(DOCS / page.parent / match[2]))
        if target.is_relative_to(DOCS):
            return match[0]
        if target.is_dir():
            return match[1]
        copy = pages / "files" / target.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(target, copy)
        return f"[{match[1]}]({os.path.relpath(copy, pages / page.parent)})"

    return re.sub(r"\[([^]]+)\]\((\.\./[^)#\s]+)\)", replace, text)


def mermaid(folder: Path) -> Path:
    """Return the path of Mermaid, which is downloaded if it is missing."""
    place = folder / f"mermaid-{MERMAID}"
    script = place / "package" / "dist" / "mermaid.min.js"
    if not script.exists():
        if shutil.which("npm") is None:
            sys.exit("npm is missing: install it, as it provides Mermaid, which draws the diagrams")
        place.mkdir(exist_ok=True)
        command = ["npm", "pack", "--silent", f"mermaid@{MERMAID}"]
        subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(place / f"mermaid-{MERMAID}.tgz") as packed:
            packed.extract(script.relative_to(place).as_posix(), place, filter="data")
    return script


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    build(folder)
