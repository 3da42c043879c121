"""The pytest plugin: a server for each test that uses the fixture `echod`. Other modules are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echod.settings.problems import Problem
    from echod.testing import ServerThread, ThreadOptions

_MARKER = (
    "echod(mode=..., limits={...}, shutdown={...}, proxy_protocol=..., proxy_trusted=[...], tls=True, fault={...}, "
    "loop=...): options of the server that the fixture echod starts."
)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture
def echod(request: pytest.FixtureRequest) -> Iterator[ServerThread]:
    """Start an echo server on a free port: `echod.address`, `echod.connections`. Configure it with `@pytest.mark.echod`."""
    from echod.settings.problems import SettingsError  # noqa: PLC0415
    from echod.testing import ServerThread  # noqa: PLC0415

    wrong: list[Problem] = []
    try:
        server = ServerThread(**_options(request.node))
    except SettingsError as error:
        wrong = error.problems
    if wrong:
        pytest.fail("\n".join(f"@pytest.mark.echod: {problem}" for problem in wrong), pytrace=False)
    yield server
    server.stop()


def _options(node: pytest.Item) -> ThreadOptions:
    """Return the options of all markers. Those of a function override those of its class and module."""
    options: dict[str, Any] = {}
    for mark in node.iter_markers("echod"):
        if mark.args:
            pytest.fail(f"@pytest.mark.echod takes options by name, not {mark.args[0]!r}", pytrace=False)
        options = {**mark.kwargs, **options}
    return cast("ThreadOptions", options)  # the server checks it
