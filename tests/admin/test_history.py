"""The history: samples by reports, and by the admin listener itself in between."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock, Mock

import pytest

import echod
from echod.admin.history import History
from echod.admin.notable import Notable
from echod.admin.snapshot import Count, DaemonView
from echod.admin.status import Reporter
from echod.server.ledger import Counters
from echod.settings.model import Config, Settings
from echod.settings.resources import Resources
from harness import PATIENCE, receive, until
from virtual_time import run_virtually
from watching import WATCHED, ask, get, place, status

if TYPE_CHECKING:
    from harness import Start

pytestmark = pytest.mark.once


class Traffic:
    """Stands for a `Snapshot`: two listeners with one client each, which together receive 30 bytes per second."""

    workers = ()

    def __init__(self) -> None:
        self.taken: list[float] = []

    def count(self) -> dict[str, Count]:
        now = asyncio.get_running_loop().time()
        return {
            name: Count(Counters(), received=round(rate * now), sent=round(rate * now / 2), states=Counter(open=1))
            for name, rate in (("one", 10), ("other", 20))
        }

    async def take(self) -> dict[str, Count]:
        self.taken.append(asyncio.get_running_loop().time())
        return self.count()


def test_samples_without_reports() -> None:
    """Without reports, a sample is taken each ten seconds. Those of the last ten minutes are kept."""

    async def main() -> None:
        traffic: Any = Traffic()
        history = History(traffic)
        assert history.series() == {"seconds_ago": [], "clients": [], "received_per_second": [], "sent_per_second": []}
        task = asyncio.create_task(history.run())
        await asyncio.sleep(25)
        assert traffic.taken == [10, 20]
        assert history.series() == {
            "seconds_ago": [15, 5],
            "clients": [2, 2],
            "received_per_second": [30, 30],
            "sent_per_second": [15, 15],
        }
        await asyncio.sleep(3600)
        series = history.series()
        assert series["seconds_ago"] == list(range(595, 0, -10))
        assert {len(column) for column in series.values()} == {60}
        task.cancel()

    run_virtually(main())


def test_samples_with_reports() -> None:
    """Reports add samples, at most one per two seconds, and then no further ones are taken. Their number is bounded."""

    async def main() -> None:
        traffic: Any = Traffic()
        history = History(traffic)
        task = asyncio.create_task(history.run())
        await asyncio.sleep(4)
        for _ in range(1200):
            history.add(traffic.count())
            await asyncio.sleep(1)
        assert traffic.taken == []
        series = history.series()
        assert series["seconds_ago"] == list(range(600, 0, -2))
        assert set(series["received_per_second"]) == {30}
        time, totals = history.last(1203.1)
        assert (time, totals["one"]) == (1202, (12020, 6010))
        time, totals = history.last(1201.5)
        assert (time, totals["other"]) == (1200, (24000, 12000))
        assert history.last(-1)[0] == pytest.approx(1202 - 2 * 332)
        await asyncio.sleep(11)
        assert traffic.taken == [1212]
        task.cancel()

    run_virtually(main())


def test_failed_sample() -> None:
    """A sample that fails is reported to the loop, and the next one is taken ten seconds later."""

    async def main() -> None:
        failures: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["exception"]))
        traffic, error = Traffic(), MemoryError()
        snapshot = Mock(take=AsyncMock(side_effect=[error, error, traffic.count()]))
        history = History(snapshot)
        task = asyncio.create_task(history.run())
        await asyncio.sleep(31)
        assert failures == [error, error]
        assert history.series()["seconds_ago"] == [1]
        task.cancel()

    run_virtually(main())


def test_first_report() -> None:
    """Before the first sample, rates cover the time since the start."""

    async def main() -> None:
        traffic: Any = Traffic()
        history = History(traffic)
        await asyncio.sleep(0.5)
        assert history.last(-0.4) == (0, {})

    run_virtually(main())


def test_slow_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener's rates cover the time since an earlier sample, even if its report takes longer than that."""

    async def notable(*_: object) -> tuple[list[object], list[object]]:
        await asyncio.sleep(2)
        return [], []

    async def main() -> None:
        async with echod.Server.listen() as server:
            traffic: Any = Traffic()
            history = History(traffic)
            resources = Resources(Config(Settings(), {}, {}), {}, {})
            view = DaemonView(
                servers={"one": server, "other": server},
                udp_servers={},
                addresses={"one": [], "other": []},
                resources=lambda: resources,
                draining=lambda: False,
                restart_needed=list,
                reloads={},
                log_lines_dropped=lambda: 0,
            )
            await asyncio.sleep(10)
            report: Any = await Reporter(view, traffic, history).report()
            assert [listener["received_per_second"] for listener in report["listeners"]] == [10, 20]

    monkeypatch.setattr(Notable, "take", notable)
    run_virtually(main())


def test_history_over_http(start: Start) -> None:
    """Reports add to the history, which is one line of JSON and the same for each browser."""
    daemon = start(*WATCHED)
    with daemon.connect() as client, closing(http.client.HTTPConnection(*place(daemon), timeout=PATIENCE)) as watcher:
        client.sendall(b"x" * 10_000)
        assert len(receive(client, 10_000)) == 10_000

        def sampled() -> bool:
            status(daemon)
            return 1 in json.loads(ask(watcher, "/history").body)["clients"]

        until(sampled)
        answer = get(daemon, "/history")
        assert (answer.headers["Content-Type"], answer.body.count(b"\n")) == ("application/json", 1)
        series = json.loads(answer.body)
        assert max(series["received_per_second"]) > 0
        assert series["sent_per_second"] == series["received_per_second"]
        again = json.loads(ask(watcher, "/history").body)
        assert again["received_per_second"][: len(series["clients"])] == series["received_per_second"]
    assert daemon.stop() == 0
