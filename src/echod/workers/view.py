"""The state of all workers, as the admin listener reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echod.admin.histograms import Histograms
from echod.admin.snapshot import Count, WorkerState
from echod.server.ledger import Counters
from echod.workers.figures import sums

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echod.server.settings import ServerSettings
    from echod.workers.supervisor import Supervisor


class WorkersSource:
    """Add up the counts of all workers.

    Args:
        supervisor: asks the workers.
        names: of the listeners.

    """

    def __init__(self, supervisor: Supervisor, names: Sequence[str]) -> None:
        self._supervisor = supervisor
        self._names = names
        self.workers: Sequence[WorkerState] = ()
        """The workers as of the last count."""
        self.log_lines_dropped = 0
        """Number of lines that the workers have dropped, as of the last count."""
        self.paused: Sequence[str] = ()
        """The listeners of which a worker paused accepting at the last count."""

    async def take(self) -> dict[str, Count]:
        """Return the count of each listener by its name. A worker that does not answer in time counts as before."""
        supervisor = self._supervisor
        answered = await supervisor.take_figures()
        self.workers = [
            WorkerState(number, supervisor.pid_of(number), supervisor.clients_of(number), answers)
            for number, answers in answered.items()
        ]
        total = sums(supervisor.figures())
        if not total:  # no worker has answered yet
            return {name: Count(Counters(), 0, 0, histograms=Histograms.empty()) for name in self._names}
        self.log_lines_dropped = total[0].log_lines_dropped
        self.paused = [name for name, paused in zip(self._names, total[0].accept_paused, strict=True) if paused]
        return dict(zip(self._names, total[0].counts, strict=True))


class ListenerState:
    """The servers of one listener in all workers.

    Args:
        name: of the listener.
        settings: returns the settings in force.
        source: the counts of the workers.
        deadlines: returns the times of a stop, as `Server.stop_deadlines`.

    """

    def __init__(
        self,
        name: str,
        settings: Callable[[], ServerSettings],
        source: WorkersSource,
        deadlines: Callable[[], tuple[float, float] | None],
    ) -> None:
        self._name = name
        self._settings = settings
        self._source = source
        self._deadlines = deadlines

    @property
    def settings(self) -> ServerSettings:
        """The settings in force."""
        return self._settings()

    @property
    def accept_paused(self) -> bool:
        """Whether a worker paused accepting at the last count."""
        return self._name in self._source.paused

    @property
    def stop_deadlines(self) -> tuple[float, float] | None:
        """The loop's times at which a stop ends its delay and its drain, or None before the stop."""
        return self._deadlines()
