"""The command of `make soak`: a daemon on each loop under a mixed load for a long time, whose resources must stay flat.

In each round, clients of all kinds connect, while the operator reloads settings, swaps certificates, rotates the log and
pauses the process. After each round, every invariant of its connections is checked, and the descriptors and threads must
be those of the start. Memory has a bound, as Python and malloc keep freed memory for later.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from certificates import Certificates
from generator import LOOPS, script
from harness import COMMAND
from invariants import check, check_connections
from scenario import FAULTS, LINE_FAULTS, Listener, Scenario
from steps import Calm
from world import Identity, ViolationError, World

# Memory of the daemon after the rounds of a time is the median. It may grow by this much from the second to the last
# quarter of the soak, in bytes: a kilobyte for each client would exceed it within minutes.
_GROWTH = 2 << 20

_CLIENTS = 25

LISTENERS = (
    Listener(name="plain"),
    Listener(name="line", mode="line"),
    Listener(name="info", mode="info"),
    Listener(name="unix", unix=True),
    Listener(name="tls", tls="server"),
    Listener(name="mutual", tls="mutual"),
    Listener(name="proxy", proxy=True),
    Listener(name="all", proxy=True, tls="mutual", mode="line"),
    *(Listener(name=name, fault=name, mode="line" if name in LINE_FAULTS else "stream") for name in FAULTS),
    Listener(name="slow_tls", tls="server", fault="slow"),
)


def soak(loop: str, seconds: float, seed: int, folder: Path) -> str:
    """Run a daemon under load, and return the figures.

    Raises:
        ViolationError: an invariant does not hold.

    """
    own, issued = folder / loop, folder / f"{loop} certificates"
    own.mkdir()
    issued.mkdir()
    rng = random.Random(seed)
    scenario = Scenario(seed=seed, loop=loop, listeners=LISTENERS)
    memory: list[int] = []
    with World(scenario, own, Identity(Certificates(issued)), COMMAND) as world:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for step in [*script(rng, LISTENERS, scenario.limits, _CLIENTS), Calm()]:
                step.apply(world)
            check_connections(world)
            memory.append(world.daemon.memory())
            world.forget()
        descriptors, threads = world.resources
        world.conclude()
        check(world)
    quarter = max(1, len(memory) // 4)
    first, last = (int(statistics.median(part)) for part in (memory[quarter : 2 * quarter], memory[-quarter:]))
    figures = (
        f"{loop}: {seconds:.0f} s, {len(memory)} rounds, {world.sums['connections']} clients, "
        f"{world.sums['received']} bytes received, {world.sums['sent']} sent; at rest {descriptors} descriptors and "
        f"{threads} threads after each round, memory {first >> 10} KiB in the second quarter, {last >> 10} KiB in the last"
    )
    if last - first > _GROWTH:
        msg = f"memory: {figures}"
        raise ViolationError(msg)
    return figures


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800, help="the duration")
    parser.add_argument("--seed", type=int, default=0, help="the random seed")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        ProcessPoolExecutor(len(LOOPS), multiprocessing.get_context("fork")) as pool,
    ):
        task = partial(soak, seconds=options.seconds, seed=options.seed, folder=Path(folder))
        for figures in pool.map(task, LOOPS):
            sys.stdout.write(f"{figures}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
