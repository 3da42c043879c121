"""Check manifests and Dockerfiles against the policies of checkov."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

# Names the path of the command, if it is not in PATH.
VARIABLE = "CHECKOV"


def failures(file: Path, framework: str) -> set[tuple[str, str]]:
    """Return the failed checks of a file, as pairs of check ID and kind of resource."""
    if (command := shutil.which(os.environ.get(VARIABLE, "checkov"))) is None:
        pytest.skip(f"not installed: checkov (add it to PATH, or set {VARIABLE} to its path)")
    options = ["--framework", framework, "--skip-download", "--quiet", "--compact", "--output", "json"]
    done = subprocess.run([command, "--file", str(file), *options], capture_output=True, text=True)
    assert done.returncode in {0, 1}, done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 0
    found = [(failed["check_id"], failed["resource"]) for failed in report["results"]["failed_checks"]]
    return {(check, resource.removeprefix(f"{file}.").partition(".")[0]) for check, resource in found}
