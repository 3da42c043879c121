"""A wait for a function that may never return."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import pytest

from echod import threads
from harness import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.once


@contextlib.contextmanager
def endless() -> Iterator[threading.Event]:
    """Yield an event for a thread that the test gives up. Set it afterwards, and wait until the thread has ended."""
    event = threading.Event()
    yield event
    event.set()
    for thread in threading.enumerate():
        if thread.name == "endless":
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_result() -> None:
    """Return the result, or raise the exception, in the caller's thread."""
    assert threads.wait(lambda: threading.current_thread().name, "worker") == "worker"
    with pytest.raises(ZeroDivisionError):
        threads.wait(lambda: 1 // 0, "worker")


def test_result_within_the_grace_period() -> None:
    """Return a result after the stop, if the function returns within the grace period."""
    returned = threading.Event()
    timer = threading.Timer(0.2, returned.set)

    def stopped() -> bool:
        timer.start()
        return True

    assert threads.wait(lambda: returned.wait(PATIENCE), "worker", stopped, grace=PATIENCE) is True


def test_stop() -> None:
    """Give up a function that does not return within the grace period."""
    for grace in (0, 0.05):
        with endless() as event, pytest.raises(InterruptedError):
            threads.wait(event.wait, "endless", lambda: True, grace=grace)


def test_timeout() -> None:
    """Give up a function that does not return within the timeout."""
    with endless() as event, pytest.raises(TimeoutError):
        threads.wait(event.wait, "endless", timeout=0.05)
    with endless() as event, pytest.raises(TimeoutError):
        threads.wait(event.wait, "endless", timeout=0.25)
