"""Settings loaded from a command line and a file, for the tests of their sources and problems."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from echod.settings.options import parse
from echod.settings.problems import SettingsError
from echod.settings.sources import load

if TYPE_CHECKING:
    from echod.settings.model import Config

Write = Callable[[str], str]

# The end of the list of addresses in messages.
UDP_FORMS = "; for UDP udp:HOST:PORT, udp:[V6]:PORT, udp::PORT or udp:systemd:NAME"


def loaded(*arguments: str, config: str | None = None) -> Config:
    """Return the settings of a command line."""
    line = parse([*arguments, *(("--config", config) if config else ())], "0.0.0")
    return load(line.options, line.config)


def problems(*arguments: str, config: str | None = None, places: bool = False) -> list[str]:
    """Return the problems with the settings of a command line.

    Args:
        arguments: those of the command line.
        config: the settings file, which is called FILE in the problems.
        places: keep the line and column behind FILE.

    """
    with pytest.raises(SettingsError) as caught:
        loaded(*arguments, config=config)
    lines = [str(problem) for problem in caught.value.problems]
    assert str(caught.value) == "\n".join(lines)
    if config is None:
        return lines
    lines = [line.replace(config, "FILE") for line in lines]
    return lines if places else [re.sub(r"^FILE(:\d+)+", "FILE", line) for line in lines]
