"""Debian systems for containers, as debootstrap makes them, kept from one run of the tests to the next."""

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

# Seconds that making a system, or installing something in it, may take.
LONG = 600.0


def why_not(*tools: str) -> str | None:
    """Tell why nothing can be done as root with these tools here; None if it can."""
    if os.geteuid() != 0:
        return "needs root"
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)}"
    return None


@contextlib.contextmanager
def cache(variable: str, name: str) -> Iterator[Path]:
    """Hold the folder that an environment variable names, or one of that name; others wait for it here."""
    folder = Path(os.environ.get(variable) or Path(tempfile.gettempdir()) / name)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def system(place: Path, packages: str, finish: Callable[[Path], Path] = Path) -> Path:
    """Return the place of a Debian system, which is made if it is not there.

    Args:
        place: in a folder that is held.
        packages: more than the least there can be, with commas.
        finish: makes of the system's root what is to be at the place, beside it.

    """
    if not place.exists():
        # Beside its place first, so that one that was left half made is not taken for whole.
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            root = Path(folder) / "root"
            command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LONG)
            assert done.returncode == 0, done.stdout[-3000:]
            finish(root).rename(place)
    return place
