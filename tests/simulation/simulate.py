"""The command of `make simulate`: run seeds of the simulation in parallel, and report each failure."""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from certificates import Certificates
from generator import generate
from mutants import MUTANTS, module
from runner import explain, run
from world import Identity, ViolationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runner import Figures


@cache
def identity(folder: Path) -> Identity:
    """Return the certificates of this run. A worker inherits those of its parent."""
    return Identity(Certificates(folder))


def one(seed: int, folder: Path, mutant: str | None, keep: Sequence[int] | None = None) -> Figures | str:
    """Run a seed, or some steps of it. Return its figures, or the report of its failure.

    The script of a failure is shortened, except for a part of a script or a mutant.
    """
    scenario = generate(seed)
    if keep is not None:
        scenario = dataclasses.replace(scenario, steps=tuple(scenario.steps[number] for number in keep))
    try:
        return run(scenario, identity(folder), module(mutant))
    except ViolationError as violation:
        if mutant is not None or keep is not None:
            return f"seed {seed}: {violation}\n{scenario}\n"
        return explain(scenario, violation, identity(folder))


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=200, help="the number of seeds")
    parser.add_argument("--keep", default="", help="run these steps of the first seed only, such as 0,3,4, or none")
    parser.add_argument("--jobs", type=int, default=2, help="seeds that run at the same time")
    parser.add_argument(
        "--mutant", choices=sorted(MUTANTS), help="break echod on purpose, and stop at the first failure"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="simulation-") as name:
        folder = Path(name)
        identity(folder)
        if options.keep:
            keep = [] if options.keep == "none" else [int(number) for number in options.keep.split(",")]
            result = one(options.seed, folder, options.mutant, keep)
            sys.stdout.write(result if isinstance(result, str) else f"no failure: {result}\n")
            return isinstance(result, str)
        return _run_all(options, partial(one, folder=folder, mutant=options.mutant))


def _run_all(options: argparse.Namespace, task: partial[Figures | str]) -> int:
    began = time.monotonic()
    clients = received = failures = 0
    reasons = Counter[str]()
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
        seeds = range(options.seed, options.seed + options.count)
        waiting = [pool.submit(task, seed) for seed in seeds]
        for done, future in enumerate(as_completed(waiting), start=1):
            result = future.result()
            if isinstance(result, str):
                failures += 1
                sys.stdout.write(f"{result}# found by the {done}th seed\n\n")
                sys.stdout.flush()
                if options.mutant:
                    pool.shutdown(cancel_futures=True)
                    return 1
            else:
                clients += result.clients
                received += result.received
                reasons += result.reasons
    sys.stdout.write(
        f"{options.count} seeds from {options.seed} in {time.monotonic() - began:.0f} s: {clients} clients, "
        f"{received} bytes of echo, {failures} failures\n"
        + "".join(f"  {number:6} {reason}\n" for reason, number in reasons.most_common())
    )
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
