"""What all tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from certificates import Certificates
from echod import cli
from harness import Daemon, clean_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Check, Start

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


@pytest.fixture
def check(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Check:
    """Return a function that is `echod check` within this process, for so many cases that a process for each takes long."""
    for name in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)

    def check(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["echod", "check", *arguments])
        code = cli.main()
        said = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, said.out, said.err)

    return check


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Return certificates, made once."""
    return Certificates(tmp_path_factory.mktemp("certificates"))
