"""Delete coverage data that a killed daemon left damaged: `coverage combine` would stop at it, without the rest."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from pathlib import Path

for path in Path().glob(".coverage.*"):
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(path)) as data:
        if data.execute("PRAGMA quick_check").fetchone() == ("ok",):
            continue
    path.unlink()
    sys.stderr.write(f"deleted {path}, which is damaged\n")
