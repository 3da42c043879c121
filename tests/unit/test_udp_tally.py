"""The counters of a UDP probe: by examples, and against a simple model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echod.probe.udp import tally as module
from echod.probe.udp.payload import Payloads
from echod.probe.udp.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.once

TIMEOUT = 10
SESSION = b"sessio"


def payloads(size: int = 40, session: bytes = SESSION) -> Payloads:
    return Payloads(session, bytes(range(251)) * 2, 251, size)


def sending(count: int, size: int = 40) -> tuple[Tally, list[bytes]]:
    """Return a tally that has sent datagrams at the times 0, 1, 2, ..., and these."""
    tally = Tally(payloads(size), TIMEOUT)
    return tally, [tally.send(due=now, now=now) for now in range(count)]


def counts(tally: Tally) -> dict[str, int]:
    """Return the counters that are not zero."""
    names = ("received", "lost", "late", "duplicated", "reordered", "corrupted", "foreign", "in_flight")
    return {name: getattr(tally, name) for name in names if getattr(tally, name)}


def test_in_order() -> None:
    """The round trip counts from the due time, and the timeout from the time of sending."""
    tally = Tally(payloads(), TIMEOUT)
    datagram = tally.send(due=3, now=8)
    assert (tally.expiry, tally.expire(17)) == (18, 0)
    assert tally.receive(datagram, 17) == 14
    assert tally.expiry is None
    assert (tally.sent, counts(tally)) == (1, {"received": 1})


def test_lost_late_and_duplicated() -> None:
    """An echo after the timeout is late once, and then duplicated. Its datagram stays lost."""
    tally, sent = sending(3)
    assert tally.receive(sent[1], 5) == 4
    assert [tally.expire(9), tally.expire(10), tally.expire(100)] == [0, 1, 1]
    assert tally.receive(sent[0], 101) is None
    assert counts(tally) == {"received": 1, "lost": 2, "late": 1}
    assert tally.receive(sent[0], 102) is tally.receive(sent[1], 103) is None
    assert counts(tally) == {"received": 1, "lost": 2, "late": 1, "duplicated": 2}


@pytest.mark.parametrize(
    ("order", "reordered"),
    [([0, 1, 2, 3], 0), ([0, 2, 1, 3], 1), ([3, 2, 1, 0], 3), ([3, 0, 1, 2], 3), ([1, 0, 3, 2], 2), ([0, 3], 0)],
)
def test_reordered(order: Sequence[int], reordered: int) -> None:
    """Each datagram after one with a higher number is reordered, as in RFC 4737. A gap is not."""
    tally, sent = sending(4)
    for number in order:
        tally.receive(sent[number], 4)
        tally.receive(sent[number], 4)  # a duplicate is never reordered
    assert (tally.reordered, tally.duplicated) == (reordered, len(order))


def test_corrupted() -> None:
    """An echo with wrong bytes or another length counts as received and corrupted. The first mismatch is kept."""
    tally, sent = sending(3)
    tally.receive(sent[0][:20] + b"\xff" + sent[0][21:], 3)
    assert (tally.mismatch, counts(tally)) == ((20, sent[0][20], 255), {"received": 1, "corrupted": 1, "in_flight": 2})
    tally.receive(sent[1][:30], 3)
    tally.receive(sent[2] + b"!", 3)
    tally.receive(sent[2] + b"!", 3)
    assert counts(tally) == {"received": 3, "duplicated": 1, "corrupted": 4}
    assert tally.mismatch == (20, sent[0][20], 255)


def test_foreign() -> None:
    """Datagrams of another session, or with a number that was not sent, are foreign. The first one is kept."""
    tally, _ = sending(2)
    other = payloads(session=b"others").datagram(0)
    for datagram in (other, b"", b"hello", payloads().datagram(2)):
        assert tally.receive(datagram, 2) is None
    assert (tally.stranger, counts(tally)) == (other, {"foreign": 4, "in_flight": 2})


def test_small_datagrams() -> None:
    """An echo of a datagram without a complete number belongs to the oldest one in flight with the same bytes."""
    tally, sent = sending(600, size=1)
    assert tally.receive(sent[300], 600) == 600 - 44
    assert tally.receive(sent[300], 600) == 600 - 300
    assert tally.receive(sent[300], 600) == 600 - 556
    assert tally.receive(sent[300], 600) is None
    assert counts(tally) == {"received": 3, "duplicated": 1, "in_flight": 597}
    tally, _ = sending(2, size=0)
    assert [tally.receive(b"", 2), tally.receive(b"", 2), tally.receive(b"", 2)] == [2, 1, None]
    assert counts(tally) == {"received": 2, "duplicated": 1}
    tally.receive(b"x", 3)
    assert tally.foreign == 1


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest lost datagrams are forgotten, so their echoes count as duplicated."""
    monkeypatch.setattr(module, "_REMEMBERED", 3)
    tally, sent = sending(5)
    assert tally.expire(100) == 5
    for datagram in sent:
        tally.receive(datagram, 101)
    assert counts(tally) == {"lost": 5, "late": 3, "duplicated": 2}


class Model:
    """The same rules, with a state for each datagram."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.states: list[str] = []
        self.received: list[int] = []
        self.counts = dict.fromkeys(("late", "duplicated", "reordered"), 0)

    def receive(self, number: int) -> None:
        if self.states[number] == "flying":
            self.counts["reordered"] += any(number < earlier for earlier in self.received)
            self.received.append(number)
            self.states[number] = "received"
        elif self.states[number] == "lost":
            self.counts["late"] += 1
            self.states[number] = "late"
        else:
            self.counts["duplicated"] += 1

    def expire(self, now: int) -> None:
        for number, sent in enumerate(self.sent):
            if self.states[number] == "flying" and sent + TIMEOUT <= now:
                self.states[number] = "lost"


STEPS = st.lists(
    st.one_of(st.just("send"), st.just("expire"), st.integers(0, 30)).flatmap(
        lambda step: st.tuples(st.just(step), st.integers(0, 6))
    ),
    max_size=120,
)


@settings(derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(STEPS)
def test_against_the_model(steps: Sequence[tuple[str | int, int]]) -> None:
    """For any order of events, both agree on each counter, and no datagram is counted twice or forgotten."""
    tally, model, datagrams, now = Tally(payloads(), TIMEOUT), Model(), list[bytes](), 0
    for step, delay in steps:
        now += delay
        if step == "send":
            datagrams.append(tally.send(now, now))
            model.sent.append(now)
            model.states.append("flying")
        elif step == "expire":
            tally.expire(now)
            model.expire(now)
        elif isinstance(step, int) and datagrams:
            number = step % len(datagrams)
            first = model.states[number] == "flying"
            model.receive(number)
            assert tally.receive(datagrams[number], now) == (now - model.sent[number] if first else None)
        states = model.states
        assert tally.sent == tally.received + tally.lost + tally.in_flight == len(states)
        assert tally.received == states.count("received")
        assert tally.lost == states.count("lost") + states.count("late")
        assert {name: getattr(tally, name) for name in model.counts} == model.counts
        flying = [sent for sent, state in zip(model.sent, states, strict=True) if state == "flying"]
        assert tally.expiry == (min(flying) + TIMEOUT if flying else None)
