"""Keep samples of the last ten minutes, so that the page shows them from its first moment in every browser."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from echod.admin.snapshot import Count, Source

# Seconds between two samples: at least, and at most. A sample costs nothing if a report has read all clients anyway.
_SHORTEST_STEP = 1.8
_LONGEST_STEP = 10.0

_SECONDS_KEPT = 600.0
_SAMPLES_KEPT = round(_SECONDS_KEPT / _SHORTEST_STEP)


class _Sample(NamedTuple):
    time: float
    clients: int
    totals: Mapping[str, tuple[int, int]]
    """Bytes received and sent since the start, by listener name."""

    @property
    def received(self) -> int:
        return sum(received for received, _ in self.totals.values())

    @property
    def sent(self) -> int:
        return sum(sent for _, sent in self.totals.values())


class History:
    """The samples of the last ten minutes. Each report adds one; without reports, `run` does."""

    def __init__(self, snapshot: Source) -> None:
        self._snapshot = snapshot
        self._loop = asyncio.get_running_loop()
        self._samples = deque([_Sample(self._loop.time(), 0, {})], _SAMPLES_KEPT)

    async def run(self) -> None:
        """Take the samples that no report adds, until cancelled."""
        while True:
            if (left := self._samples[-1].time + _LONGEST_STEP - self._loop.time()) > 0:
                await asyncio.sleep(left)
                continue
            try:
                self.add(await self._snapshot.take())
            except Exception as error:  # noqa: BLE001  (such as a lack of memory, which must not stop the daemon)
                self._loop.call_exception_handler({"message": "a sample of the history failed", "exception": error})
                await asyncio.sleep(_LONGEST_STEP)

    def add(self, counts: Mapping[str, Count]) -> None:
        """Add a sample of these counts, which were just taken. Does nothing if there is a recent sample."""
        now = self._loop.time()
        if now - self._samples[-1].time >= _SHORTEST_STEP:
            clients = sum(sum(count.states.values()) for count in counts.values())
            totals = {name: (count.received, count.sent) for name, count in counts.items()}
            self._samples.append(_Sample(now, clients, totals))

    def last(self, latest: float) -> tuple[float, Mapping[str, tuple[int, int]]]:
        """Return the time and the totals of the last sample up to this time, or of the first sample."""
        sample = next((sample for sample in reversed(self._samples) if sample.time <= latest), self._samples[0])
        return sample.time, sample.totals

    def series(self) -> dict[str, list[float]]:
        """Return the samples in columns, oldest first. A rate covers the time since the previous sample."""
        now = self._loop.time()
        ages: list[float] = []
        clients: list[float] = []
        received: list[float] = []
        sent: list[float] = []
        for before, after in pairwise(self._samples):
            seconds = after.time - before.time
            if now - after.time <= _SECONDS_KEPT:
                ages.append(round(now - after.time, 1))
                clients.append(after.clients)
                received.append(round((after.received - before.received) / seconds))
                sent.append(round((after.sent - before.sent) / seconds))
        return {"seconds_ago": ages, "clients": clients, "received_per_second": received, "sent_per_second": sent}
