"""Start threads that block all signals. A refusal by the system is one kind of error."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

T = TypeVar("T")

# Seconds between two looks at `stopped`.
_PATIENCE = 0.1


class ThreadError(Exception):
    """A thread could not be started."""


def start(work: Callable[[], object], name: str) -> threading.Thread:
    """Start a daemon thread that blocks all signals.

    Only the main thread runs handlers, and a signal to another thread would not wake it.

    Raises:
        ThreadError: the system refused, because of the process limit or a lack of memory.

    """

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        msg = f"{error}: raise the process limit (ulimit -u, pids.max, TasksMax=), or free memory"
        raise ThreadError(msg) from error
    return thread


def call(loop: asyncio.AbstractEventLoop, work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Call a function in a thread of its own, and return the future of its result.

    The caller may settle the future first, to give up the result. The thread cannot be ended.
    Unlike the threads of an executor, this one is not awaited at the end of the process.

    Raises:
        ThreadError: as `start`.

    """
    future: asyncio.Future[T] = loop.create_future()

    def settle(outcome: Callable[[], None]) -> None:
        if not future.done():  # otherwise the caller has given up the result
            outcome()

    def run() -> None:
        try:
            outcome = partial(future.set_result, work())
        except Exception as error:  # noqa: BLE001  (the future raises it)
            outcome = partial(future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop was closed in between
            loop.call_soon_threadsafe(settle, outcome)

    start(run, name)
    return future


def wait(
    work: Callable[[], T],
    name: str,
    stopped: Callable[[], bool] = lambda: False,
    *,
    timeout: float = math.inf,
    grace: float = 0.0,
) -> T:
    """Call a function in a thread of its own, and return its result unless the wait ends first.

    Args:
        work: the function; it may never return.
        name: of the thread.
        stopped: called every 100 ms. True ends the wait.
        timeout: seconds until the wait ends.
        grace: seconds that the function still has once `stopped` has returned True.

    Raises:
        InterruptedError: `stopped` returned True, and the function did not return in time.
        TimeoutError: the function did not return within the timeout.
        ThreadError: as `start`.

    """
    outcomes: list[Callable[[], T]] = []

    def fail(error: Exception) -> T:
        raise error

    def run() -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  (it is raised in the caller's thread)
            outcomes.append(partial(fail, error))
        else:
            outcomes.append(lambda: result)

    thread = start(run, name)
    deadline = time.monotonic() + timeout
    while thread.is_alive() and not stopped():
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        thread.join(min(left, _PATIENCE))
    thread.join(grace)
    if thread.is_alive():
        raise InterruptedError
    return outcomes[0]()
