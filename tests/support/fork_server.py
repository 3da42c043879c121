"""Fork commands from a process that has imported echod. `forking.py` starts this script and sends it requests.

A start of the interpreter and its imports take 0.35 s of CPU time, far more than most tests need after them.

Each request is a JSON object in one message:

- `{"arguments": [...], "environment": {...}, "directory": "...", "descriptors": [0, 1, 2, ...]}` forks a child, which runs
  `echod ARGUMENTS`. The message carries a descriptor for each number in `descriptors`. The answer is the child's process id.
- `{"reap": PID}` waits for the end of a child. The answer is its exit code, or minus the number of the signal that ended it.
  Until then a process that has ended keeps its id, so a signal cannot reach another process.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"  # as cli.py sets it before its imports

# The modules that `echod serve` imports. Importing them starts no thread and opens no descriptor.
import coverage
import coverage.sqldata
import uvloop  # noqa: F401

import echod.admin.http
import echod.admin.snapshot
import echod.daemon.daemon
import echod.daemon.logs
import echod.settings.file
import echod.settings.options
import echod.settings.resources
import echod.settings.sources
import echod.settings.toml  # noqa: F401
from echod import cli

if TYPE_CHECKING:
    from collections.abc import Sequence

LARGEST_MESSAGE = 1 << 20
MOST_DESCRIPTORS = 100


def serve(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Answer requests until the socket's other end is closed. In each child, return its request and descriptors."""
    while True:
        message, received, *_ = socket.recv_fds(control, LARGEST_MESSAGE, MOST_DESCRIPTORS)
        if not message:
            return None
        request = json.loads(message)
        if "reap" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])
        elif not (answer := os.fork()):
            return request, received
        for descriptor in received:
            os.close(descriptor)
        control.send(b"%d" % answer)


def place(received: Sequence[int], numbers: Sequence[int]) -> None:
    """Give the received descriptors their numbers, and close all others."""
    above = max(*received, *numbers) + 1
    copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for descriptor in received]
    for copy, number in zip(copies, numbers, strict=True):
        os.dup2(copy, number)
    for descriptor in {int(path.name) for path in Path("/proc/self/fd").iterdir()}.difference(numbers):
        with contextlib.suppress(OSError):  # that of the listing is closed
            os.close(descriptor)


def main() -> int:
    # Ctrl-C ends the test run and this process. A child has the handler of a new interpreter.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.freeze()  # a collection in a child would copy every page of memory
    control = socket.socket(fileno=int(sys.argv[1]))
    child = serve(control)
    if child is None:
        return 0
    control.detach()
    request, received = child
    signal.signal(signal.SIGINT, signal.default_int_handler)
    place(received, request["descriptors"])
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [cli.__file__, *request["arguments"]]
    coverage.process_startup()  # only if the environment asks for it
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
