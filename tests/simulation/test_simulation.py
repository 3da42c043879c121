"""Random scenarios of clients, signals and reloads: `make simulate` runs more of them."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

import pytest

from echo_model import echo_size, is_echo
from generator import generate
from invariants import check
from mutants import module
from runner import explain, run
from scenario import Listener, Scenario
from shrink import shrink
from steps import Calm, Connect, Finish, Send
from world import Identity, ViolationError, World

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from certificates import Certificates

# Each supported version of Python runs its share.
SEEDS = range(sys.version_info.minor % 3, 200, 3)

_LONG = (Connect(0, "plain"), Send(0, 1500, 1500), Finish(0))


@pytest.fixture(scope="session")
def identity(certificates: Certificates) -> Identity:
    return Identity(certificates)


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run daemons without coverage, which other tests complete: it doubles the CPU time of a start."""
    monkeypatch.delenv("COVERAGE_RUN", raising=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_seed(seed: int, identity: Identity) -> None:
    """A scenario violates no invariant. The report of a failure is its shortest script."""
    scenario = generate(seed)
    try:
        run(scenario, identity)
    except ViolationError as violation:
        pytest.fail(explain(scenario, violation, identity), pytrace=False)


def test_same_seed_same_script() -> None:
    assert [generate(seed) for seed in range(50)] == [generate(seed) for seed in range(50)]
    assert len({str(generate(seed).steps) for seed in range(50)}) == 50


def test_broken_daemon_is_found(identity: Identity) -> None:
    broken = module("received misses a byte of a long read")
    with pytest.raises(ViolationError) as caught:
        run(Scenario(seed=0, loop="uvloop", listeners=(Listener(name="plain"),), steps=_LONG), identity, broken)
    assert caught.value.invariant == "bounds"


def test_failure_is_shrunk(identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of a failure has no more than the steps that it needs, and the command that runs them."""

    def refuse_long_echo(world: World) -> None:
        check(world)
        if any(client.got == 1500 for client in world.clients.values()):
            msg = "size: too long"
            raise ViolationError(msg)

    monkeypatch.setattr("runner.check", refuse_long_echo)
    others = tuple(step for number in (1, 2) for step in (Connect(number, "plain"), Send(number, 9, 9), Finish(number)))
    scenario = Scenario(seed=0, loop="uvloop", listeners=(Listener(name="plain"),), steps=(*others, *_LONG))
    with pytest.raises(ViolationError) as caught:
        run(scenario, identity)
    report = explain(scenario, caught.value, identity)
    assert "make simulate SEED=0 KEEP=6,7\n" in report
    assert str(dataclasses.replace(scenario, steps=_LONG[:2])) in report


@pytest.mark.parametrize("needed", [{3}, {0, 9}, {2, 3, 4}, set(range(10))])
def test_shrink(needed: set[int]) -> None:
    """The shortest failing part is found; parts that do not fail are never returned."""

    def fails(part: Sequence[int]) -> bool:
        return needed <= set(part)

    assert set(shrink(range(10), fails, 1000)) == needed
    assert needed <= set(shrink(range(10), fails, 3))


def test_model_of_lines() -> None:
    """The model echoes lines up to one that is too long, and knows what each fault does to a line."""
    line = Listener(name="line", mode="line")
    assert echo_size(line, 4, b"ab\nabc\nabcd") == 11
    assert echo_size(line, 4, b"ab\nabcd\nab\n") == 3
    assert echo_size(line, 4, b"ab\nabcde") == 3
    doubling, halving, flipping = (
        Listener(name="line", mode="line", fault=fault) for fault in ("doubling", "halving", "flipping")
    )
    assert is_echo(doubling, b"a\nb", b"a\na\nbb", at_eof=True)
    assert is_echo(doubling, b"a\nb", b"a\na\nb", at_eof=False)
    assert is_echo(halving, b"abc\nab", b"aba", at_eof=True)
    assert is_echo(flipping, b"a\nb\n", b"c\nb\x0b", at_eof=True)
    assert not is_echo(flipping, b"a\nb\n", b"a\nb\x0b", at_eof=True)
    assert not is_echo(flipping, b"a\n", b"b\n", at_eof=True)


@pytest.mark.parametrize(
    ("field", "change", "invariant"),
    [("received", -1, "bounds"), ("sent", 1, "counts"), ("acked", -1, "counts"), ("discarded_bytes", 1, "counts")],
)
def test_wrong_figures_are_found(
    identity: Identity, tmp_path_factory: pytest.TempPathFactory, field: str, change: int, invariant: str
) -> None:
    """Each figure of a line is compared with the client's."""
    scenario = Scenario(seed=0, loop="uvloop", listeners=(Listener(name="plain"),))
    folder: Path = tmp_path_factory.mktemp("s")
    with World(scenario, folder, identity, module(None)) as world:
        for step in (Connect(0, "plain"), Send(0, 99, 10), Finish(0), Calm()):
            step.apply(world)
        world.conclude()
        check(world)
        world.lines()[0][field] += change
        with pytest.raises(ViolationError) as caught:
            check(world)
    assert caught.value.invariant == invariant
