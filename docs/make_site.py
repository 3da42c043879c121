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


def build(folder: Path) -> Path:
    """Build the site in a folder, and return the path of its pages."""
    pages = folder / "docs"
    shutil.rmtree(folder / "site", ignore_errors=True)
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(DOCS, pages, ignore=shutil.ignore_patterns("*.py", "*.txt", "__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", folder)
    for page in pages.rglob("*.md"):
        page.write_text(with_copies(page.read_text(), page.relative_to(pages), pages))
    shutil.copy(mermaid(folder), pages)
    subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=folder, check=True)
    return folder / "site"


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
    archive = folder / f"mermaid-{MERMAID}.tgz"
    script = folder / "package" / "dist" / "mermaid.min.js"
    if not archive.exists():
        subprocess.run(
            ["npm", "pack", "--silent", f"mermaid@{MERMAID}"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        with tarfile.open(archive) as packed:
            packed.extract(script.relative_to(folder).as_posix(), folder, filter="data")
    return script


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    build(folder)
