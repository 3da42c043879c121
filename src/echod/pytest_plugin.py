"""The pytest plugin: a server for each test that asks for one. What it takes is imported at the first use."""

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
    """Start an echod on a free port, in a thread: `echod.address`, `echod.connections`; `@pytest.mark.echod` sets it up."""
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
    """Return the options of all markers, those of a function before those of its class and its module."""
    options: dict[str, Any] = {}
    for mark in node.iter_markers("echod"):
        if mark.args:
            pytest.fail(f"@pytest.mark.echod takes options by name, not {mark.args[0]!r}", pytrace=False)
        options = {**mark.kwargs, **options}
    return cast("ThreadOptions", options)  # which is for the server to check
