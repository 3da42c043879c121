"""Provide the fixtures that all tests share."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from admin_thread import AdminThread
from certificates import Certificates
from echod import cli
from echod.daemon.signals import HANDLED
from harness import Daemon, clean_environment
from issuing import Authorities, Issued, named
from pairs import runner

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from admin_thread import StartAdmin
    from harness import Command, Start
    from loading import Write
    from pairs import InLoop

pytest_plugins = ["pytester"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run container tests first, as they take minutes and would otherwise delay the end."""
    items.sort(key=lambda item: item.get_closest_marker("container") is None)


@pytest.fixture(params=["uvloop", "asyncio"])
def loop_name(request: pytest.FixtureRequest) -> str:
    """Return the name of each event loop in turn."""
    return str(request.param)


@pytest.fixture
def start(loop_name: str) -> Iterator[Start]:
    """Return a function that starts a daemon on the loop under test. Daemons are terminated after the test."""
    daemons: list[Daemon] = []

    def start(*arguments: str, **options: Any) -> Daemon:
        daemon = Daemon("--loop", loop_name, *arguments, **options)
        daemons.append(daemon)
        return daemon

    yield start
    for daemon in daemons:
        daemon.end()


@pytest.fixture
def start_admin(loop_name: str) -> Iterator[StartAdmin]:
    """Return a function that starts an `AdminThread` on the loop under test. It is stopped after the test."""
    threads: list[AdminThread] = []

    def start_admin(*arguments: Any, **options: Any) -> AdminThread:
        threads.append(AdminThread(loop_name, *arguments, **options))
        return threads[-1]

    yield start_admin
    for thread in threads:
        thread.stop()
        assert thread.errors == []


@pytest.fixture
def in_loop(loop_name: str) -> InLoop:
    """Return a function that runs a scene in the loop under test, with no exception left to its handler."""
    return runner(loop_name)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """Return a function that runs the command in this process, for tests with many cases."""
    for name in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYDANTIC_DISABLE_PLUGINS", "__all__")  # the command sets it too, for its whole process
    handlers = {number: signal.getsignal(number) for number in HANDLED}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["echod", *arguments])
        try:
            code = cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        output = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, output.out, output.err)

    yield command
    gc.enable()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Return the certificates of the test run."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the settings in the environment of the test run."""
    for name in list(os.environ):
        if name.startswith("ECHOD_"):
            monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a settings file and returns its name."""
    path = tmp_path / "echo.toml"

    def write(text: str) -> str:
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture(scope="session")
def authorities() -> Authorities:
    root = Issued(named("root"), ca=True)
    return Authorities(root, Issued(named("intermediate"), root, ca=True))
