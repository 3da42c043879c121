"""Make system calls of a running daemon fail, by means of strace."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from harness import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Daemon


@contextlib.contextmanager
def injected(daemon: Daemon, *injections: str, threads: Literal["loop", "others", "all"] = "loop") -> Iterator[None]:
    """Make system calls of some threads fail. At the end, wait until at least one call has failed.

    Args:
        daemon: the process.
        injections: as for strace's option `--inject`: CALL:error=ERRNO:when=N.
        threads: the loop's thread, the threads that exist besides it, or all, with those that start later.

    """
    if (strace := shutil.which("strace")) is None:
        pytest.skip("strace is not installed")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "calls"
        options = [text for injection in injections for text in ("-e", f"inject={injection}")]
        target = ["-p", str(daemon.pid)]
        if threads == "all":
            target.append("-f")
        elif threads == "others":
            tasks = {task.name for task in Path(f"/proc/{daemon.pid}/task").iterdir()} - {str(daemon.pid)}
            target = [text for task in tasks for text in ("-p", task)]
        with subprocess.Popen([strace, *target, "-o", output, *options], stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            said = process.stderr.readline()
            try:
                if "Operation not permitted" in said:
                    pytest.skip(f"strace may not attach here: {said}")
                assert "attached" in said
                yield
                until(lambda: "(INJECTED)" in output.read_text())
            finally:
                process.terminate()
