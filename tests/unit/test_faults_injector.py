"""The injector decides from the conditions of a fault alone, and modifies the messages that match."""

from __future__ import annotations

from typing import Any

import pytest

from echod.connection.faults.injector import Injector
from echod.connection.faults.profile import FaultProfile
from echod.settings.model import FaultSettings


def injector(number: int = 1, **settings: Any) -> Injector:
    """Return the injector of a connection."""
    profile = FaultProfile("test", FaultSettings(**settings))
    return Injector(profile, profile.new_random(number))


def echoes(injector: Injector, *messages: bytes) -> list[bytes | None]:
    """Return the echo of each message, or None for one that ends the echo."""
    decisions = [injector.decide(message) for message in messages]
    return [None if decision is None else decision.data * decision.copies for decision in decisions]


def test_trigger() -> None:
    """Only a message that equals the trigger matches."""
    fault = injector(trigger="b", action="close")
    assert echoes(fault, b"a", b"bb") == [b"a", b"bb"]
    assert not fault.fired
    assert echoes(fault, b"b") == [None]
    fault.end_echo()
    assert (fault.fired, fault.ended_echo) == (True, True)


def test_after_bytes() -> None:
    """The messages before do not match, and all messages after match."""
    assert echoes(injector(after_bytes=3, action="duplicate"), b"abc", b"de", b"f") == [b"abc", b"dede", b"ff"]


def test_after_seconds() -> None:
    """Messages match once the time has come."""
    fault = injector(after_seconds=0.5, action="truncate")
    assert echoes(fault, b"abcd") == [b"abcd"]
    fault.reach_time()
    assert echoes(fault, b"efgh") == [b"ef"]


def test_all_conditions_at_once() -> None:
    """A trigger before its bytes, before its time, or against the odds is a message like any other."""
    fault = injector(trigger="x", after_bytes=4, after_seconds=1, action="duplicate")
    assert echoes(fault, b"x", b"123", b"x") == [b"x", b"123", b"x"]
    fault.reach_time()
    assert echoes(fault, b"y", b"x") == [b"y", b"xx"]
    fault = injector(trigger="x", after_bytes=4, after_seconds=1, action="duplicate")
    fault.reach_time()
    assert echoes(fault, b"x", b"123", b"x") == [b"x", b"123", b"xx"]
    fault = injector(trigger="x", probability=1e-300, action="duplicate")
    assert echoes(fault, *[b"x"] * 50) == [b"x"] * 50
    assert not fault.fired


def test_bytes_and_time_without_message() -> None:
    """An action that ends the echo is due when bytes and time are reached, in either order, and only once."""
    settings: dict[str, Any] = {"after_bytes": 3, "after_seconds": 1, "action": "reset"}
    fault = injector(**settings)
    assert echoes(fault, b"abc") == [b"abc"]
    assert not fault.is_due()
    fault.reach_time()
    assert fault.is_due()
    fault.end_echo()
    assert not fault.is_due()
    fault = injector(**settings)
    fault.reach_time()
    assert not fault.is_due()
    assert echoes(fault, b"abc") == [b"abc"]
    assert fault.is_due()


@pytest.mark.parametrize(
    "settings",
    [
        {"action": "close"},
        {"after_bytes": 1, "trigger": "x", "action": "close"},
        {"after_bytes": 1, "probability": 1, "action": "close"},
        {"after_bytes": 1, "action": "duplicate"},
        {"after_bytes": 1, "delay": 1},
    ],
)
def test_faults_that_need_a_message(settings: dict[str, Any]) -> None:
    """With other conditions or without an action that ends the echo, the fault waits for a message."""
    fault = injector(**settings)
    fault.decide(b"abc")
    fault.reach_time()
    assert not fault.is_due()


def test_corrupt() -> None:
    """One bit changes per message. With the same seed and number, the same bits change."""
    settings: dict[str, Any] = {"seed": 7, "action": "corrupt"}
    messages = [b"message %02d" % number for number in range(50)]
    corrupt = echoes(injector(**settings), *messages)
    for message, echo in zip(messages, corrupt, strict=True):
        assert echo is not None
        assert (int.from_bytes(message, "big") ^ int.from_bytes(echo, "big")).bit_count() == 1
    assert echoes(injector(**settings), *messages) == corrupt
    assert echoes(injector(2, **settings), *messages) != corrupt


def test_truncate() -> None:
    """Of an odd number of bytes, the middle one is missing too. Of one byte, nothing is left."""
    fault = injector(action="truncate")
    assert echoes(fault, b"abcd", b"abc", b"a") == [b"ab", b"a", b""]
    assert fault.fired


def test_probability_is_drawn_for_each_message() -> None:
    """The n-th message gets the n-th number, whatever the other conditions are."""
    settings: dict[str, Any] = {"probability": 0.5, "seed": 1, "action": "duplicate"}
    alone = echoes(injector(**settings), *[b"x"] * 40)
    later = echoes(injector(after_bytes=20, **settings), *[b"x"] * 40)
    assert later == [b"x"] * 20 + alone[20:]
    assert {b"x", b"xx"} == set(later[20:])
    assert echoes(injector(probability=0.5, action="duplicate"), *[b"x"] * 200) != alone * 5


def test_shaping_alone() -> None:
    """Without an action, the conditions select the messages to shape."""
    fault = injector(trigger="x", delay=1)
    assert fault.decide(b"a") == (b"a", False, 1)
    assert not fault.fired
    assert fault.decide(b"x") == (b"x", True, 1)
    assert fault.fired


def test_shaping_beside_an_action() -> None:
    """With an action, the conditions select when it comes, and all messages are shaped."""
    fault = injector(trigger="x", action="close", delay=1)
    assert fault.decide(b"a") == (b"a", True, 1)
    assert fault.fired
    assert fault.decide(b"x") is None
