"""Choose the event loop: uvloop or asyncio."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


def has_uvloop() -> bool:
    """Tell whether uvloop is installed."""
    return importlib.util.find_spec("uvloop") is not None


def loop_factory(choice: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return the factory of the chosen loop.

    Args:
        choice: "uvloop", "asyncio", or "auto" for uvloop if it is installed.

    Raises:
        ImportError: uvloop was chosen and is not installed.

    """
    if choice == "asyncio" or (choice == "auto" and not has_uvloop()):
        return asyncio.SelectorEventLoop
    import uvloop  # noqa: PLC0415  (an optional dependency)

    return uvloop.new_event_loop


def run(choice: str, main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run a coroutine in a new loop, and return its exit code.

    Args:
        choice: as in `loop_factory`.
        main: creates the coroutine.

    """
    exit_code: int | None = None
    try:
        with asyncio.Runner(loop_factory=loop_factory(choice)) as runner:
            exit_code = runner.run(main())
    except (OSError, RuntimeError):
        # uvloop opens a pair of sockets to close itself. If the system refuses them, the stop is complete nonetheless.
        if exit_code is None:
            raise
    assert exit_code is not None
    return exit_code
