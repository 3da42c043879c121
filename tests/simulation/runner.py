"""Run a scenario, and show a failing one as a short script.

Why a generator of our own, and not Hypothesis' stateful tests: an example here is a process with real sockets, so it
costs a third of a second, and the kernel's scheduling varies it. Hypothesis shrinks by hundreds of examples, reports an
example that fails only sometimes as flaky, and generates steps while it runs them. A seed here is one script, known
before anything runs: it has the same steps in each run, any part of it can be run, and a failure is shown as a script.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from harness import COMMAND
from invariants import check
from shrink import shrink
from world import PATIENCE, ViolationError, World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scenario import Scenario
    from world import Identity

# The most runs that look for a shorter script, and the patience of each in seconds.
_TRIES = 30
_BRIEF = 3.0


class Figures(NamedTuple):
    """A run in numbers."""

    clients: int
    received: int
    """Bytes of echo that the clients got."""
    reasons: Counter[str]


def run(
    scenario: Scenario, identity: Identity, module: tuple[str, ...] = COMMAND, patience: float = PATIENCE
) -> Figures:
    """Run a scenario and check its invariants.

    Raises:
        ViolationError: an invariant does not hold.

    """
    with tempfile.TemporaryDirectory(prefix="simulation-") as folder:
        try:
            with World(scenario, Path(folder), identity, module, patience) as world:
                for step in scenario.steps:
                    step.apply(world)
                world.conclude()
                check(world)
                return Figures(
                    len(world.clients),
                    sum(client.got for client in world.clients.values()),
                    Counter(line["reason"] for line in world.lines()),
                )
        except (AssertionError, OSError) as error:
            msg = f"unexpected: {error!r}"
            raise ViolationError(msg) from error


def explain(
    scenario: Scenario, violation: ViolationError, identity: Identity, module: tuple[str, ...] = COMMAND
) -> str:
    """Return a report of a failure, with the shortest script found that violates the same invariant."""

    def part(kept: Sequence[int]) -> Scenario:
        return dataclasses.replace(scenario, steps=tuple(scenario.steps[number] for number in kept))

    def fails(kept: Sequence[int]) -> bool:
        try:
            run(part(kept), identity, module, _BRIEF)
        except ViolationError as error:
            return error.invariant == violation.invariant
        return False

    kept = shrink(range(len(scenario.steps)), fails, _TRIES)
    numbers = ",".join(map(str, kept))
    return (
        f"seed {scenario.seed}: {violation}\n{part(kept)}\n"
        f"# {len(kept)} of {len(scenario.steps)} steps: make simulate SEED={scenario.seed} KEEP={numbers or 'none'}\n"
    )
