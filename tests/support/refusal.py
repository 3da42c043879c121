"""The command in a process to which the system refuses threads, as it does at a limit of processes."""

from __future__ import annotations


def refusing(**outcomes: str) -> tuple[str, ...]:
    """Return the `module` of a command in which some threads cannot start.

    Args:
        outcomes: of the first starts, by the beginning of the thread's name: "+" starts, "-" is refused.

    """
    program = f"""
import sys, threading
begin, outcomes = threading.Thread.start, {outcomes!r}
def start(self):
    for name in outcomes:
        if self.name.startswith(name):
            outcome, outcomes[name] = outcomes[name][:1], outcomes[name][1:]
            if outcome == "-":
                raise RuntimeError("can't start new thread")
    begin(self)
threading.Thread.start = start
from echod.cli import main
sys.exit(main())
"""
    return ("-c", program)
