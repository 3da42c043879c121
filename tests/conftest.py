"""What all tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from certificates import Certificates
from harness import Daemon

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Start

pytest_plugins = ["pytester"]


@pytest.fixture(params=["uvloop", "asyncio"])
def loop_name(request: pytest.FixtureRequest) -> str:
    """Return each loop's name in turn."""
    return str(request.param)


@pytest.fixture
def start(loop_name: str) -> Iterator[Start]:
    """Return a function that starts a daemon on the loop under test; it is ended after the test."""
    daemons: list[Daemon] = []

    def start(*arguments: str, **options: Any) -> Daemon:
        daemon = Daemon("--loop", loop_name, *arguments, **options)
        daemons.append(daemon)
        return daemon

    yield start
    for daemon in daemons:
        daemon.end()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Return certificates, made once."""
    return Certificates(tmp_path_factory.mktemp("certificates"))
