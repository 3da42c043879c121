"""Test the limits that several workers share."""

from __future__ import annotations

import asyncio
import os

import pytest

from echod.server.shared_limit import SharedLimit
from echod.server.shared_quota import QuotaTable, SharedQuota
from echod.workers.slots import Slots
from echod.workers.tokens import Tokens
from serving import run_in_loop, until

pytestmark = pytest.mark.once

ANYONE = "192.0.2.1"


def test_tokens(loop_name: str) -> None:
    """A lower limit takes tokens as clients return them."""

    async def scene() -> None:
        tokens = Tokens(2)
        for _ in range(2):
            os.eventfd_read(tokens.descriptor)
        tokens.set_limit(1)
        tokens.give(0)
        os.eventfd_write(tokens.descriptor, 1)
        await until(lambda: not tokens._debt)
        tokens.set_limit(1)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(tokens.descriptor)
        tokens.set_limit(3)
        assert [os.eventfd_read(tokens.descriptor) for _ in range(2)] == [1, 1]
        with pytest.raises(BlockingIOError):
            os.eventfd_read(tokens.descriptor)
        os.close(tokens.descriptor)

    run_in_loop(loop_name, scene)


def limits(workers: int, limit: int, *, shares_queue: bool = True) -> list[SharedLimit]:
    """Return the limit of each worker of one listener. All workers are alive."""
    descriptor = Slots.create(workers, 1)
    slots = Slots(descriptor, workers, 1)
    os.close(descriptor)
    slots.limits[0] = limit
    for worker in range(workers):
        slots.beat(worker)
    semaphore = os.eventfd(limit, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    return [
        SharedLimit(semaphore, slots.clients(0), slots.limits, worker, slots.is_alive, shares_queue=shares_queue)
        for worker in range(workers)
    ]


def test_shared_limit(loop_name: str) -> None:
    """A worker that waits for room is resumed when another worker's client leaves."""

    async def scene() -> None:
        one, other = limits(2, 1)
        resumed = asyncio.Event()
        assert one.acquire(resumed.set)
        assert not other.acquire(resumed.set)  # the client is not counted yet
        one.count(1)
        assert not other.acquire(resumed.set)
        one.count(0)
        one.release()
        await resumed.wait()
        assert other.acquire(resumed.set)
        assert not one.acquire(resumed.set)
        one.close()
        one.close()

    run_in_loop(loop_name, scene)


def test_lower_limit(loop_name: str) -> None:
    """After a reload has lowered the limit, tokens of the old one are no room."""

    async def scene() -> None:
        one, other = limits(2, 3)
        one._limit[0] = 1
        assert one.acquire(pytest.fail)
        resumed = asyncio.Event()
        assert not other.acquire(resumed.set)
        one.give_back()
        await resumed.wait()
        assert other.acquire(pytest.fail)
        one.close()

    run_in_loop(loop_name, scene)


def test_share() -> None:
    """A worker is ahead if it has clearly more clients of a shared queue than the one with the fewest."""
    one, other = limits(2, 1000)
    one.count(4)
    assert not one.is_ahead()
    one.count(5)
    assert one.is_ahead()
    assert not other.is_ahead()
    other.count(160)
    one.count(174)
    assert not one.is_ahead()
    one.count(175)
    assert one.is_ahead()
    assert not limits(2, 1000, shares_queue=False)[0].is_ahead()


def test_share_without_others() -> None:
    """A worker does not wait for workers that do not answer."""
    descriptor = Slots.create(2, 1)
    slots = Slots(descriptor, 2, 1)
    os.close(descriptor)
    limit = SharedLimit(0, slots.clients(0), slots.limits, 0, slots.is_alive, shares_queue=True)
    limit.count(100)
    assert not limit.is_ahead()


def quotas(workers: int, limit: int) -> list[SharedQuota]:
    """Return the quota of each worker."""
    descriptor = QuotaTable.create(workers)
    tables = [QuotaTable(descriptor, workers) for _ in range(workers)]
    os.close(descriptor)
    return [SharedQuota(limit, table, worker) for worker, table in enumerate(tables)]


def test_shared_quota() -> None:
    """The clients of an address count in all workers."""
    one, other = quotas(2, 2)
    assert one.acquire(ANYONE)
    assert other.acquire(ANYONE)
    assert not one.acquire(ANYONE)
    assert one.acquire("192.0.2.2")
    other.release(ANYONE)
    assert one.acquire(ANYONE)
    assert not other.acquire(ANYONE)


def test_shared_quota_that_is_set_later() -> None:
    """A limit that a reload sets counts the clients that are there already. One that is removed and set again, too."""
    one, other = quotas(2, 0)
    assert all(one.acquire(ANYONE) for _ in range(3))
    one.release(ANYONE)
    for limit in (3, 0, 3, 4):
        one.reconfigure(limit)
        other.reconfigure(limit)
    assert other.acquire(ANYONE)
    assert other.acquire(ANYONE)
    assert not other.acquire(ANYONE)


def test_simultaneous_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """If two workers count a client of one address at the same time, one tries again when the other has given up."""
    one, other = quotas(2, 1)
    total, outcomes = QuotaTable.total, list[bool]()

    def compete(table: QuotaTable, key: int) -> int:
        if not outcomes:
            outcomes.append(False)
            outcomes[0] = other.acquire(ANYONE)
        return total(table, key)

    monkeypatch.setattr(QuotaTable, "total", compete)
    assert one.acquire(ANYONE) != outcomes[0]


def test_livelock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker gives up after many tries."""
    (one,) = quotas(1, 1)
    sums = iter([2, 0] * 100)
    monkeypatch.setattr(QuotaTable, "total", lambda *_: next(sums))
    assert not one.acquire(ANYONE)
    assert next(sums, None) is None


def test_full_table() -> None:
    """Addresses that do not fit into the table are limited in their own worker only."""
    descriptor = QuotaTable.create(1)
    table = QuotaTable(descriptor, 1)
    os.close(descriptor)
    step = 2**17 - 16  # keys with the same place
    for number in range(17):
        table.write(0, 1 + number * step, 1)
    assert [table.total(1 + number * step) for number in range(17)] == [1] * 16 + [0]
    table.write(0, 1, 0)
    table.write(0, 1 + 16 * step, 5)
    assert table.total(1 + 16 * step) == 5
    table.clear(0)
    assert table.total(1 + 16 * step) == 0
