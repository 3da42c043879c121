"""The pytest plugin: the fixtures `echod` and `echod_factory`. Other modules are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

if TYPE_CHECKING:
    from typing import Unpack

    from echod.options import ThreadOptions
    from echod.settings.problems import Problem
    from echod.testing import ServerFactory, ServerThread

_MARKER = (
    "echod(mode=..., limits={...}, shutdown={...}, proxy_protocol=..., proxy_trusted=[...], tls=True, fault={...}, "
    "loop=...): options of the server that the fixture echod starts."
)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", _MARKER)


def with_options(**options: Unpack[ThreadOptions]) -> pytest.MarkDecorator:
    """Return the marker `echod`. A type checker knows its options, unlike those of `pytest.mark.echod`."""
    return pytest.mark.echod(**options)


@pytest.fixture
def echod(request: pytest.FixtureRequest, echod_factory: ServerFactory) -> ServerThread:
    """Start an echo server on a free port: `echod.address`, `echod.connections`. Configure it with `@pytest.mark.echod`."""
    from echod.settings.problems import SettingsError  # noqa: PLC0415

    wrong: list[Problem] = []
    try:
        return echod_factory(**_options(request.node))
    except SettingsError as error:
        wrong = error.problems
    pytest.fail("\n".join(f"@pytest.mark.echod: {problem}" for problem in wrong), pytrace=False)


@pytest.fixture
def echod_factory(request: pytest.FixtureRequest) -> ServerFactory:
    """Return a function that starts an echo server with the given options. The test may start several."""
    from echod.testing import ServerThread  # noqa: PLC0415

    def start(**options: Unpack[ThreadOptions]) -> ServerThread:
        server = ServerThread(**options)
        request.addfinalizer(server.stop)  # the last one first; pytest reports the errors of all
        return server

    return start


def _options(node: pytest.Item) -> ThreadOptions:
    """Return the options of all markers. Those of a function override those of its class and module."""
    options: dict[str, Any] = {}
    for mark in node.iter_markers("echod"):
        if mark.args:
            pytest.fail(f"@pytest.mark.echod takes options by name, not {mark.args[0]!r}", pytrace=False)
        options = {**mark.kwargs, **options}
    return cast("ThreadOptions", options)  # the server checks it
