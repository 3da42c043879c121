"""Servers that run in a loop of the test itself."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from echod.loops import loop_factory
from echod.server.settings import ServerSettings
from echod.settings.model import FaultSettings, LimitsSettings, ListenerSettings, ShutdownSettings
from harness import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping


def server_settings(
    *,
    limits: Mapping[str, Any] | None = None,
    shutdown: Mapping[str, Any] | None = None,
    fault: Mapping[str, Any] | None = None,
    **listener: Any,
) -> ServerSettings:
    """Return the settings of a server, with the keys of each section that differ from the defaults."""
    if fault is not None:
        listener["fault"] = "fault"
    return ServerSettings(
        ListenerSettings(address="127.0.0.1:0", **listener),
        LimitsSettings(**limits or {}),
        ShutdownSettings(**shutdown or {}),
        None if fault is None else FaultSettings(**fault),
    )


def run_in_loop(loop_name: str, scene: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine in a loop of that name, and fail if it takes too long."""

    async def main() -> None:
        await asyncio.wait_for(scene(), PATIENCE)

    with asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
        runner.run(main())


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until a condition is true that no event reports."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)
