"""Break echod on purpose, to see that the simulation finds it: `make simulate MUTANT=name`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MUTANTS: Mapping[str, str] = {}


def module(mutant: str | None) -> tuple[str, ...]:
    """Return the options of the interpreter that run the command, or a mutant of it."""
    if mutant is None:
        return ("-m", "echod")
    return ("-c", f"{MUTANTS[mutant]}\nfrom echod.cli import main\nimport sys\nsys.exit(main())")
