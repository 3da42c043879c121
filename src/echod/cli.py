"""The command: parses, and is the only place where an error becomes an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from echod.signals import StopSignals

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from echod.sources import Loaded, Problem

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_UNAVAILABLE = 69
EXIT_CONFIG = 78

_STDOUT = 1
_STDERR = 2


def main() -> int:
    """Run the `echod` command, and return its exit code."""
    signals = StopSignals()
    _fill_standard_descriptors()
    # Imported below and not at the top, here and in _serve: these take a third of a second, and a signal in that time
    # is to be honoured too.
    from echod import options, render, sources  # noqa: PLC0415

    command, config, values = options.parse(sys.argv[1:])
    if command != "serve":
        signals.release()
    try:
        loaded = sources.load(values, os.environ.get(sources.CONFIG_VARIABLE) or None if config is None else config)
    except sources.SettingsError as error:
        return _fail(EXIT_CONFIG, error.problems)
    if problems := list(_unusable(loaded)):
        return _fail(EXIT_CONFIG, problems)
    if command == "serve":
        return _serve(loaded, signals)
    for variable in loaded.unknown_variables:
        _say(render.printable(f"warning: {variable} names no setting"))
    try:
        _write(_STDOUT, "configuration OK\n" if command == "check" else render.toml(loaded))
    except OSError as error:
        return _fail(EXIT_FAILURE, [f"standard output: {error.strerror}"])
    return EXIT_OK


def _fill_standard_descriptors() -> None:
    """Open 0, 1 and 2 where whoever started us has closed them, or a socket would be the next to get that number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(descriptor, True)  # noqa: FBT003  (its parameter is positional)
    os.close(descriptor)


def _serve(loaded: Loaded, signals: StopSignals) -> int:
    from echod import daemon, listeners, logs  # noqa: PLC0415

    log = logs.Log(loaded.settings.log)
    try:
        log.capture()
        return daemon.serve(loaded, log.logger, signals)
    except listeners.ListenError as error:
        return _fail(EXIT_UNAVAILABLE, error.problems)
    except Exception:
        log.logger.exception("crashed")
        return EXIT_FAILURE
    finally:
        log.close()
        signals.ignore()


def _unusable(loaded: Loaded) -> Iterator[Problem]:
    """Yield what is right by itself, and yet cannot be had on this machine."""
    from echod import daemon, logs  # noqa: PLC0415
    from echod.sources import Problem  # noqa: PLC0415

    settings = loaded.settings
    if settings.loop == "uvloop" and not daemon.has_uvloop():
        message = "uvloop is not installed: install it, or choose auto or asyncio"
        yield Problem(loaded.origins["loop",], "loop", message)
    if (reason := logs.unusable(settings.log.file)) is not None:
        yield Problem(loaded.origins["log", "file"], "log.file", reason)


def _fail(code: int, problems: Iterable[object]) -> int:
    for problem in problems:
        _say(str(problem))
    return code


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # whether anybody reads it or not, the exit code tells
        _write(_STDERR, f"echod: {line}\n")


def _write(descriptor: int, text: str) -> None:
    # sys.stdout and sys.stderr are None where they were closed at the start, and not UTF-8 everywhere, as TOML is.
    with open(descriptor, "wb", closefd=False) as file:
        file.write(text.encode())
