"""Run the command. This is the only place where an error becomes an exit code."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import sys
from functools import partial

from echod.daemon.signals import Signals

TYPE_CHECKING = False  # importing typing would delay the signal handlers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import TypeVar

    from echod.daemon.logs import Log
    from echod.settings.resources import Resources
    from echod.settings.types import Key

    T = TypeVar("T")

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_UNAVAILABLE = 69
EXIT_CONFIG = 78

# Added to the number of a signal, as shells do.
_SIGNALLED = 128

# Seconds that the settings still have after a stop signal: a signal during the imports gets a receipt, too.
_GRACE = 3.0

_STDOUT = 1
_STDERR = 2


def main() -> int:
    """Run the `echod` command, and return its exit code."""
    signals = Signals()
    _fill_standard_descriptors()
    try:
        match _as_options(sys.argv[1:]):
            case ["probe", *rest]:
                signals.release()
                return _probe(rest)
            case ["completion", *rest]:
                signals.release()
                return _completion(rest)
            case arguments:
                return _with_settings(arguments, signals)
    except KeyboardInterrupt:  # not from `serve`, which handles SIGINT
        return _SIGNALLED + signal.SIGINT


def _as_options(arguments: Sequence[str]) -> Sequence[str]:
    """Replace the commands `help` and `version` by the options of that name."""
    match arguments:
        case ["help", *rest]:
            return [*(word for word in rest if word not in {"help", "version"}), "--help"]
        case ["version", *rest]:
            return ["--version", *rest]
        case _:
            return arguments


def _with_settings(arguments: Sequence[str], signals: Signals) -> int:
    """Run `serve`, `check` or `config`."""
    # Nearly all objects of a start stay, so collecting garbage meanwhile finds nothing.
    gc.disable()
    # To find plugins, Pydantic would read the metadata of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # Imports here and in _serve take a quarter of a second. Signals must be handled before.
    import echod  # noqa: PLC0415
    from echod.daemon import logs  # noqa: PLC0415
    from echod.settings import options, resources, sources, toml  # noqa: PLC0415
    from echod.settings.problems import SettingsError  # noqa: PLC0415

    command, file, values = _parse(lambda: options.parse(arguments, echod.__version__))
    if command != "serve":
        signals.release()
    if file is None:
        file = os.environ.get(sources.CONFIG_VARIABLE) or None

    def load(before: Resources | None = None) -> Resources:
        config = sources.load(values, file, None if before is None else before.config.origins)
        # Opening and closing a FIFO ends its reader's input, so only `check` tries it.
        tried = command == "check" or not logs.is_fifo(config.settings.log.file)
        return resources.acquire(config, logs.problems(config) if tried else ())

    try:
        loaded = _load_unless_stopped(load, signals) if command == "serve" else load()
    except InterruptedError:
        return signals.exit_code
    except SettingsError as error:
        return _fail(EXIT_CONFIG, error.problems)
    if command == "serve":
        return _serve(loaded, signals, load)
    _warn(loaded)
    if command == "config":
        return _print(toml.document(loaded.config.settings, loaded.config.origins))
    return _print(f"configuration OK: {_checked(loaded.config.origins, file, given=bool(values))}\n")


def _parse(parse: Callable[[], T]) -> T:
    """Parse the command line. Help and version are written here, because argparse hides the failure of a write.

    Raises:
        SystemExit: with 2 if the command line cannot be parsed. After help or version with 0, or with 1 if it could not be
            written.

    """
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            return parse()
        except SystemExit as end:
            raise SystemExit(end.code or _print(text.getvalue())) from None


def _load_unless_stopped(load: Callable[[], Resources], signals: Signals) -> Resources:
    """Load the settings in a thread, as a file may be a pipe without a writer.

    Raises:
        InterruptedError: a signal has stopped the start.
        SettingsError: the settings cannot be used.

    """
    from echod import threads  # noqa: PLC0415

    try:
        return threads.wait(load, "settings", signals.is_stopping, grace=_GRACE)
    except threads.ThreadError:
        return load()


def _checked(origins: Mapping[Key, str], file: str | None, *, given: bool) -> str:
    """Name the sources of the checked settings.

    Args:
        origins: those of the settings that are not defaults.
        file: the settings file, or None.
        given: whether the command line has settings.

    """
    from echod.text import printable  # noqa: PLC0415

    variables = dict.fromkeys(origin for origin in origins.values() if origin in os.environ)
    sources = ", ".join([*([file] if file else []), *variables, *(["the command line"] if given else [])])
    if not sources:
        return "only the defaults were checked; name a file with --config FILE"
    return printable(sources if file else f"{sources}; no file was checked")


def _warn(resources: Resources) -> None:
    """Print the warnings of `check` and `config`."""
    from datetime import UTC, datetime  # noqa: PLC0415

    from echod.text import printable  # noqa: PLC0415

    config = resources.config
    for variable, meant in config.unknown_variables.items():
        advice = f": did you mean {meant}?" if meant else ""
        _say(printable(f"warning: {variable} is not a setting{advice}"))
    for listener, warning in resources.warnings(datetime.now(UTC)):
        _say(printable(f"warning: listeners.{listener}.tls.{warning.key}: {warning.text}"))
    for name, table in config.settings.all_listeners().items():
        if table.is_open_reflector:
            place = f"listeners.{name}" if name in config.settings.listeners else "listen"
            _say(
                printable(
                    f"warning: {place}: udp_open_reflector: {table.address} answers everyone, and the source address "
                    "of a datagram may be forged: set allow in a table [listeners.NAME], or listen on loopback"
                )
            )


def _fill_standard_descriptors() -> None:
    """Open 0, 1 and 2 if the parent has closed them. Otherwise a socket could get one of these numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(descriptor, True)  # noqa: FBT003  (its parameter is positional)
    os.close(descriptor)


def _probe(command_line: Sequence[str]) -> int:
    # Nothing else is imported: a health check runs this command every few seconds.
    from echod.probe import arguments, command  # noqa: PLC0415
    from echod.probe.model import Outcome  # noqa: PLC0415

    outcome, text, problem = command.run(_parse(lambda: arguments.parse(command_line)))
    if problem:
        _say(problem)
    return (
        _print(text)
        or {
            Outcome.RIGHT: EXIT_OK,
            Outcome.FAILED: EXIT_FAILURE,
            Outcome.UNREACHABLE: EXIT_UNAVAILABLE,
            Outcome.INTERRUPTED: _SIGNALLED + signal.SIGINT,
            Outcome.TERMINATED: _SIGNALLED + signal.SIGTERM,
        }[outcome]
    )


def _completion(command_line: Sequence[str]) -> int:
    try:
        from echod import completion  # noqa: PLC0415
    except ModuleNotFoundError:
        from echod.extras import missing  # noqa: PLC0415

        if not (problem := missing("shtab")):
            raise
        return _fail(EXIT_FAILURE, [f"completion {problem}"])
    return _print(completion.script(_parse(lambda: completion.parse(command_line))))


def _serve(resources: Resources, signals: Signals, load: Callable[[Resources], Resources]) -> int:
    """Run the daemon in this process, or as the parent of workers."""
    from echod.daemon import daemon  # noqa: PLC0415

    if (workers := _workers(resources)) == 1:
        return _run(daemon.serve, resources, signals, load)
    from echod.loops import loop_factory  # noqa: PLC0415
    from echod.workers import parent, worker  # noqa: PLC0415
    from echod.workers.spawner import Spawner  # noqa: PLC0415

    loop_factory(resources.config.settings.loop)  # imports the loop, which the workers then share
    try:
        spawner = Spawner.start(worker.run)  # before the log has a thread
    except OSError as error:
        return _fail(EXIT_FAILURE, [f"the workers: {error.strerror}"])
    with spawner:
        return _run(partial(parent.serve, spawner=spawner, workers=workers), resources, signals, load)


def _run(
    serve: Callable[[Resources, Log, Signals, Callable[[Resources], Resources]], int],
    resources: Resources,
    signals: Signals,
    load: Callable[[Resources], Resources],
) -> int:
    """Open the log, serve, and close the log."""
    from echod.daemon import logs  # noqa: PLC0415
    from echod.net.listeners import ListenError  # noqa: PLC0415
    from echod.settings.problems import SettingsError  # noqa: PLC0415
    from echod.threads import ThreadError  # noqa: PLC0415

    try:
        log = logs.Log(resources.config.settings.log, is_shared=resources.config.settings.workers != 1)
    except OSError as error:
        return _fail(EXIT_CONFIG, [logs.problem(resources.config, error)])
    except ThreadError as error:
        return _fail(EXIT_FAILURE, [f"the log: {error}"])
    try:
        log.capture()
        return serve(resources, log, signals, load)
    except ListenError as error:
        return _fail(EXIT_UNAVAILABLE, error.problems)
    except SettingsError as error:  # they do not fit the inherited sockets
        return _fail(EXIT_CONFIG, error.problems)
    except Exception:
        log.logger.exception("crashed")
        return EXIT_FAILURE
    finally:
        log.close()
        signals.ignore()


def _workers(resources: Resources) -> int:
    """Return the number of workers."""
    if (workers := resources.config.settings.workers) != "auto":
        return workers
    from echod.workers import cpus  # noqa: PLC0415

    return cpus.usable()


def _print(text: str) -> int:
    """Write to standard output, and return the exit code."""
    try:
        _write(_STDOUT, text)
    except OSError as error:
        return _fail(EXIT_FAILURE, [f"standard output: {error.strerror}"])
    return EXIT_OK


def _fail(code: int, problems: Iterable[object]) -> int:
    for problem in problems:
        _say(str(problem))
    return code


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the exit code is enough
        _write(_STDERR, f"echod: {line}\n")


def _write(descriptor: int, text: str) -> None:
    # sys.stdout and sys.stderr are None if they were closed at the start, and are not always UTF-8, as TOML is.
    with open(descriptor, "wb", closefd=False) as file:
        file.write(text.encode())
