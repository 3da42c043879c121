"""Provide the fixtures that all tests share."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from certificates import Certificates
from echod import cli
from echod.signals import STOP_SIGNALS
from harness import Daemon, clean_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Command, Start

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
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """Return a function that runs the command in this process, for tests with many cases."""
    for name in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYDANTIC_DISABLE_PLUGINS", "__all__")  # the command sets it too, for its whole process
    handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGHUP)}

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
