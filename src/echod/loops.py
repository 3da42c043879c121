"""Choose the event loop: uvloop or asyncio."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


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
