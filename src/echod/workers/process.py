"""One process of a worker, as the parent sees it."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, TypeVar

from echod.workers import messages

if TYPE_CHECKING:
    from echod.workers.channel import Channel

T = TypeVar("T")


def describe(status: int) -> dict[str, object]:
    """Return the signal or the exit code of a wait status (wait(2)) as fields of an event."""
    code = os.waitstatus_to_exitcode(status)
    return {"signal": signal.Signals(-code).name} if code < 0 else {"code": code}


class WorkerProcess:
    """One process of a worker, from its start to its end.

    Args:
        pid: of the process.
        channel: to the process.

    """

    def __init__(self, pid: int, channel: Channel) -> None:
        self.pid = pid
        self._channel = channel
        self._answers: dict[type, asyncio.Future[object | None]] = {}
        self.ready = self.answer(messages.Ready)
        self.drained = self.answer(messages.Drained)
        self.figures: messages.Figures | None = None
        """The last answer to `TakeFigures`."""
        self._counting: asyncio.Future[messages.Figures | None] | None = None

    def send(self, message: object) -> None:
        """Send a message that has no answer."""
        self._channel.send(message)

    def answer(self, kind: type[T]) -> asyncio.Future[T | None]:
        """Return the next message of a kind, or None if the process ends first."""
        answer: asyncio.Future[object | None] = asyncio.get_running_loop().create_future()
        self._answers[kind] = answer
        return answer  # type: ignore[return-value]  # the key is the type of the result

    def ask(self, message: object, kind: type[T]) -> asyncio.Future[T | None]:
        """Send a message, and return its answer, or None if the process ends first."""
        answer = self.answer(kind)
        self.send(message)
        return answer

    async def count(self, patience: float) -> bool:
        """Ask for new figures, unless a question is open. Return whether they have arrived within this many seconds."""
        if self._counting is None or self._counting.done():
            self._counting = self.ask(messages.TakeFigures(), messages.Figures)
        await asyncio.wait([self._counting], timeout=patience)
        if not self._counting.done() or (figures := self._counting.result()) is None:
            return False
        self.figures = figures
        return True

    async def listen(self) -> None:
        """Receive messages until the process has ended."""
        while (message := await self._channel.receive()) is not None:
            answer = self._answers.pop(type(message), None)
            if answer is not None and not answer.done():
                answer.set_result(message)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(None)
        self._answers.clear()
        await self._channel.close()
