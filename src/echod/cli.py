"""The command: parses, and is the only place where an error becomes an exit code."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys

from echod.daemon.signals import Signals

TYPE_CHECKING = False  # that of typing would have to be imported, and the signal handlers are to be installed first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from echod.settings.resources import Resources

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_UNAVAILABLE = 69
EXIT_CONFIG = 78

# What a shell makes of a signal's number.
_SIGNALLED = 128

_STDOUT = 1
_STDERR = 2


def main() -> int:
    """Run the `echod` command, and return its exit code."""
    signals = Signals()
    _fill_standard_descriptors()
    if sys.argv[1:2] == ["probe"]:
        signals.release()
        return _probe(sys.argv[2:])
    # Nearly all that a start makes stays; the collector would go over it again and again.
    gc.disable()
    # Nor are there plugins that would have to do with the settings; Pydantic would ask every package that is installed.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # Imported below and not at the top, here and in _serve: these take a quarter of a second, and a signal in that time
    # is to be honoured too.
    import echod  # noqa: PLC0415
    from echod.settings import (  # noqa: PLC0415
        options,
        resources,
        sources,
    )
    from echod.settings.problems import SettingsError  # noqa: PLC0415

    command, config, values = options.parse(sys.argv[1:], echod.__version__)
    if command != "serve":
        signals.release()
    if config is None:
        config = os.environ.get(sources.CONFIG_VARIABLE) or None

    def load(before: Resources | None = None) -> Resources:
        return resources.acquire(sources.load(values, config, None if before is None else before.loaded.origins))

    try:
        found = load()
    except SettingsError as error:
        return _fail(EXIT_CONFIG, error.problems)
    if command == "serve":
        return _serve(found, signals, load)
    return _tell(found, command)


def _tell(found: Resources, command: str) -> int:
    from datetime import UTC, datetime  # noqa: PLC0415

    from echod.settings import resources, toml  # noqa: PLC0415
    from echod.text import printable  # noqa: PLC0415

    if command == "check" and (problems := list(resources.log_problems(found.loaded))):
        return _fail(EXIT_CONFIG, problems)
    for variable in found.loaded.unknown_variables:
        _say(printable(f"warning: {variable} names no setting"))
    for listener, warning in found.warnings(datetime.now(UTC)):
        _say(printable(f"warning: listeners.{listener}.tls.{warning.key}: {warning.text}"))
    try:
        _write(
            _STDOUT,
            "configuration OK\n" if command == "check" else toml.document(found.loaded.settings, found.loaded.origins),
        )
    except OSError as error:
        return _fail(EXIT_FAILURE, [f"standard output: {error.strerror}"])
    return EXIT_OK


def _fill_standard_descriptors() -> None:
    """Open 0, 1 and 2 where whoever started us has closed them, or a socket would be the next to get that number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(descriptor, True)  # noqa: FBT003  (its parameter is positional)
    os.close(descriptor)


def _probe(arguments: Sequence[str]) -> int:
    try:
        # Before all else that this command imports: a health check runs it every few seconds.
        from echod.probe import command  # noqa: PLC0415
        from echod.probe.result import Outcome  # noqa: PLC0415

        outcome, text, problem = command.run(arguments)
    except KeyboardInterrupt:
        return _SIGNALLED + signal.SIGINT
    if problem:
        _say(problem)
    try:
        _write(_STDOUT, text)
    except OSError as error:
        return _fail(EXIT_FAILURE, [f"standard output: {error.strerror}"])
    return {
        Outcome.RIGHT: EXIT_OK,
        Outcome.FAILED: EXIT_FAILURE,
        Outcome.UNREACHABLE: EXIT_UNAVAILABLE,
        Outcome.INTERRUPTED: _SIGNALLED + signal.SIGINT,
        Outcome.TERMINATED: _SIGNALLED + signal.SIGTERM,
    }[outcome]


def _serve(found: Resources, signals: Signals, load: Callable[[Resources], Resources]) -> int:
    from echod import threads  # noqa: PLC0415
    from echod.daemon import daemon, logs  # noqa: PLC0415
    from echod.net import listeners  # noqa: PLC0415
    from echod.settings import resources  # noqa: PLC0415

    try:
        log = logs.Log(found.loaded.settings.log)
    except OSError as error:
        return _fail(EXIT_CONFIG, [resources.log_problem(found.loaded, error)])
    except threads.ThreadError as error:
        return _fail(EXIT_FAILURE, [f"the log: {error}"])
    try:
        log.capture()
        return daemon.serve(found, log, signals, load)
    except listeners.ListenError as error:
        return _fail(EXIT_UNAVAILABLE, error.problems)
    except Exception:
        log.logger.exception("crashed")
        return EXIT_FAILURE
    finally:
        log.close()
        signals.ignore()


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
