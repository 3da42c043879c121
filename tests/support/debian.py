"""Create Debian systems for containers with debootstrap, and cache them between test runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Timeout in seconds for creating a system or installing packages in it.
LONG = 600.0


def why_not(*tools: str) -> str | None:
    """Return why these tools cannot be used as root, or None if they can."""
    if os.geteuid() != 0:
        return "needs root"
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)}"
    return None


@contextlib.contextmanager
def cache(variable: str, name: str) -> Iterator[Path]:
    """Lock a cache folder: the one that an environment variable names, or `name` in the temporary directory."""
    folder = Path(os.environ.get(variable) or Path(tempfile.gettempdir()) / name)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def system(place: Path, packages: str, finish: Callable[[Path], Path] = Path) -> Path:
    """Create a Debian system if it is not cached yet, and return its path.

    Args:
        place: the path, in a folder locked by `cache`.
        packages: extra packages, separated by commas.
        finish: turns the root folder into a file or folder in the same parent, to be moved to `place`.

    """
    if not place.exists():
        # Create it elsewhere and rename it, so that an interrupted run leaves no incomplete system.
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            root = Path(folder) / "root"
            command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
            assert done.returncode == 0, done.stdout[-3000:]
            finish(root).rename(place)
    return place
