"""Render the log: each structlog event is one line, written by a thread."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from echod import threads
from echod.daemon import log_formats
from echod.daemon.console import Console, columns
from echod.daemon.log_writer import CLOSE_TIMEOUT, LogWriter
from echod.settings.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from structlog.typing import EventDict, FilteringBoundLogger

    Render = Callable[[object, str, EventDict], str]

    from echod.settings.model import Config, LogSettings

_STDOUT, _STDERR = 1, 2

# Clears the line of a terminal: carriage return, and EL of ECMA-48.
_CLEAR = "\r\x1b[K"

# Priorities of the levels: sd-daemon(3), syslog(3).
_PRIORITIES = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}


class _Target:
    """A descriptor for the lines, and the thread that writes them.

    Args:
        descriptor: owned by this object from now on.
        console: renders the lines of format "console".
        worker: the number of this process if it is a worker.
        is_shared: whether other processes of the daemon write to it.

    Raises:
        ThreadError: the thread cannot be started, and the descriptor has been closed.

    """

    def __init__(self, descriptor: int, console: Console, worker: int | None, *, is_shared: bool) -> None:
        self._descriptor = descriptor
        self._worker = worker
        # Another process may show a status line.
        self._clear = _CLEAR if is_shared and _is_screen(descriptor) else ""
        self._console = console
        self._status = ""
        self._form: Render = console
        self._is_journal = _is_journal(descriptor)
        try:
            # Only the thread closes it: during a blocked write, a client's socket could get its number.
            self.writer = LogWriter(descriptor, self._notice, partial(os.close, descriptor), is_shared=is_shared)
        except threads.ThreadError:
            os.close(descriptor)
            raise

    def use(self, form: str) -> None:
        """Render lines in a format that `log.format` allows."""
        if form == "auto":
            form = "console" if os.isatty(self._descriptor) else "json"
        if form == "console":
            self._console.use(self._descriptor)
            self._form = self._console
        else:
            self._form = log_formats.renderer(form)

    def render(self, _: object, level: str, event: EventDict) -> str:
        """Render one line. This is the last processor of structlog."""
        line = self._form(_, level, event)
        # The level first, as in sd-daemon(3). The journal removes it, and stores it as PRIORITY.
        return f"<{_PRIORITIES[level]}>{line}" if self._is_journal else line

    @property
    def is_screen(self) -> bool:
        """Whether it can show a status line."""
        return _is_screen(self._descriptor)

    def write(self, line: str) -> None:
        """Queue one rendered line, above the status line if there is one."""
        self.writer.write(self._framed(line))

    def show_status(self, text: str) -> None:
        """Show a status line below all other lines, or remove it if the text is empty. Only for a terminal."""
        # A line that is wrapped could not be cleared.
        self._status = f"{_CLEAR}{text[: (columns(self._descriptor) or 80) - 1]}" if text else ""
        self.writer.write((self._status or _CLEAR).encode())

    def _notice(self, lines: int) -> bytes:
        event = {"event": "log_lines_dropped", "lines": lines, **_origin(self._worker)}
        return self._framed(self.render(None, "warning", event))

    def _framed(self, line: str) -> bytes:
        text = f"{_CLEAR}{line}\n{self._status}" if self._status else f"{self._clear}{line}\n"
        return text.encode(errors="backslashreplace")


def _open(file: str, create: int = os.O_CREAT) -> int:
    """Open a file for appending, without waiting for the reader of a pipe.

    Standard output and standard error are duplicated if they cannot be opened by name. A socket never can, and a pipe
    only by its owner.

    Raises:
        OSError: the file cannot be opened, or is a pipe without a reader.

    """
    if file == "-":
        return os.dup(_STDERR)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | create, 0o666)
    except OSError:
        with contextlib.suppress(OSError):
            status = Path(file).stat()
            for standard in (_STDOUT, _STDERR):
                if os.path.samestat(os.fstat(standard), status):
                    return os.dup(standard)
        raise
    os.set_blocking(descriptor, True)
    return descriptor


class Log:
    """The log of the process.

    Args:
        settings: level, format and file.
        worker: the number of this process if it is a worker, which each line contains.
        is_shared: whether other processes of the daemon write to the same file.

    Raises:
        OSError: the file cannot be opened for appending.
        ThreadError: the writer thread cannot be started.

    """

    def __init__(self, settings: LogSettings, worker: int | None = None, *, is_shared: bool = False) -> None:
        self.logger: FilteringBoundLogger
        self._retired: list[LogWriter] = []
        self._lost_before = 0
        self._reopen_failed = False
        self._console = Console()
        self._worker = worker
        self._is_shared = is_shared
        self._target = self._new_target(_open(settings.file))
        self._screen: _Target | None = None
        self._configure(settings)
        self._bridge = _Bridge(self)

    def _new_target(self, descriptor: int) -> _Target:
        return _Target(descriptor, self._console, self._worker, is_shared=self._is_shared)

    def reopen(self) -> None:
        """Open the file again after a rotation. Standard error is not reopened.

        Raises:
            OSError: the file cannot be opened for appending. Lines still go to the open one.
            ThreadError: the writer thread cannot be started. Lines still go to the open file.

        """
        if self.settings.file != "-":
            try:
                self._retarget(self.settings)
            except OSError:
                self._reopen_failed = True
                raise

    def change(self, settings: LogSettings) -> None:
        """Apply other settings: replace `logger`. Open the file if it is a different one, or could not be reopened.

        Raises:
            OSError: the file cannot be opened for appending. Nothing has changed.
            ThreadError: the writer thread cannot be started. Nothing has changed.

        """
        if settings.file != self.settings.file or self._reopen_failed:
            self._retarget(settings)
        else:
            self._configure(settings)

    def _retarget(self, settings: LogSettings) -> None:
        descriptor, before = _open(settings.file), self._target.writer
        if not before.is_regular_file and before.writes_to(descriptor):
            os.close(descriptor)  # the same pipe: another thread would wait for its reader too
        elif before.is_regular_file:
            before.redirect(descriptor)
        else:
            # Its thread may wait for a reader for ever, so new lines need another thread. The old one writes its queue.
            self._target = self._new_target(descriptor)
            self._lost_before += before.lost
            before.end()
            self._retired = [*(writer for writer in self._retired if not writer.ended), before]
        self._reopen_failed = False
        self._configure(settings)

    def _configure(self, settings: LogSettings) -> None:
        self.settings = settings
        """The settings in force."""
        self._target.use(settings.format)
        self.logger = structlog.wrap_logger(
            _Lines(self),
            processors=[structlog.processors.format_exc_info, self._target.render],
            wrapper_class=structlog.make_filtering_bound_logger(settings.level),
        ).bind(**_origin(self._worker))

    def write(self, line: str) -> None:
        """Queue one rendered line."""
        self._target.write(line)

    def line(self, event: str, **fields: object) -> Callable[[EventDict], None]:
        """Return a function that logs one kind of event at level info, with these fields and those of its argument.

        It does the same as `logger`, for a quarter of the time. Get another one after `change`.
        """
        fields = _origin(self._worker) | fields
        if logging.getLevelNamesMapping()[self.settings.level.upper()] > logging.INFO:
            return lambda _: None

        def write(values: EventDict) -> None:
            target = self._target
            target.write(target.render(None, "info", {"event": event, **fields, **values}))

        return write

    def show_status(self, text: str) -> None:
        """Show a line on the terminal, below the log, in place of the last one. An empty text removes it.

        The terminal is that of the log. If the log is a regular file, it is that of standard error. Without a terminal,
        nothing is shown.
        """
        if self._target.is_screen:
            self._target.show_status(text)
        elif self._target.writer.is_regular_file and _is_screen(_STDERR):
            with contextlib.suppress(OSError, threads.ThreadError):  # without resources, the drain goes on unseen
                self._screen = self._screen or self._new_target(os.dup(_STDERR))
                self._screen.show_status(text)

    @property
    def lost(self) -> int:
        """Number of lines dropped since the start, except those of a file that was being closed."""
        return self._lost_before + self._target.writer.lost

    def capture(self) -> None:
        """Log Python's warnings, messages of `logging`, and exceptions that cannot be caught."""
        logging.captureWarnings(capture=True)
        logging.getLogger().addHandler(self._bridge)
        sys.unraisablehook = self._unraisable

    def _unraisable(self, args: sys.UnraisableHookArgs) -> None:
        # If a client asks for a server name that is not ASCII, the ssl module ends the handshake and raises this here.
        if not (isinstance(args.exc_value, UnicodeDecodeError) and isinstance(args.object, bytes)):
            self.logger.error("exception_ignored", message=args.err_msg, exc_info=args.exc_value)

    def close(self) -> None:
        """Write the queued lines within a second, and close the file. Later warnings and messages go to standard error."""
        sys.unraisablehook = sys.__unraisablehook__
        logging.captureWarnings(capture=False)
        logging.getLogger().removeHandler(self._bridge)
        deadline = time.monotonic() + CLOSE_TIMEOUT
        screen = [] if self._screen is None else [self._screen.writer]
        for writer in (self._target.writer, *screen, *self._retired):  # together, and the receipt goes to the first
            writer.close(max(0.0, deadline - time.monotonic()))


def reopen(log: Log) -> None:
    """Reopen the log file. This is separate from a reload, so that invalid settings cannot prevent it."""
    try:
        log.reopen()
    except OSError as error:
        reason = explain(log.settings.file, error)
    except threads.ThreadError as error:
        reason = str(error)
    else:
        return
    log.logger.error("log_reopen_failed", file=log.settings.file, error=reason)


def problem(config: Config, error: OSError) -> Problem:
    """Return the problem of a log file that cannot be opened."""
    file = config.settings.log.file
    return Problem(config.origins["log", "file"], "log.file", f"{file!r} cannot be written: {explain(file, error)}")


def explain(file: str, error: OSError) -> str:
    """Return the reason that a log file cannot be opened and, if possible, what to do about it."""
    reason = error.strerror or str(error)
    folder = Path(file).resolve().parent
    if error.errno == errno.ENOENT and not folder.exists():
        return f"{reason}: create the folder {os.fspath(folder)!r}"
    if error.errno == errno.ENXIO and is_fifo(file):
        return f"{reason}: no process reads this FIFO; start its reader first"
    return reason


def problems(config: Config) -> Iterator[Problem]:
    """Open the log file for a moment, and yield the problem if that fails."""
    if (error := refusal(config.settings.log.file)) is not None:
        yield problem(config, error)


def is_fifo(file: str) -> bool:
    """Tell whether a log file is a pipe."""
    with contextlib.suppress(OSError):  # reported when the file is opened
        return stat.S_ISFIFO(Path(file).stat().st_mode)
    return False


def refusal(file: str) -> OSError | None:
    """Return the error with which a log file cannot be opened for appending, or None. The file is not created."""
    try:
        os.close(_open(file, create=0))
    except FileNotFoundError:
        # With O_TMPFILE the kernel checks whether a file can be created in the folder, and leaves none.
        folder = Path(file).resolve().parent
        try:
            os.close(os.open(folder, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC))
        except OSError as error:
            # Some file systems do not support O_TMPFILE. They check the permission first.
            return error if error.errno != errno.EOPNOTSUPP else None
    except OSError as error:
        return error
    return None


class _Lines:
    """What structlog calls an output: takes rendered lines of any level."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def info(self, line: str) -> None:
        self._log.write(line)

    debug = warning = error = critical = info


class _Bridge(logging.Handler):
    """Passes the records of `logging` on to structlog."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        # structlog has names for the standard levels only.
        level = min(record.levelno // 10, 5) * 10
        self._log.logger.log(level, record.getMessage().strip(), logger=record.name, exc_info=record.exc_info)


def _origin(worker: int | None) -> dict[str, object]:
    """Return the field that says which worker wrote a line."""
    return {} if worker is None else {"worker": worker}


def _is_screen(descriptor: int) -> bool:
    """Tell whether a descriptor is a terminal on which a line can be cleared."""
    return os.isatty(descriptor) and os.environ.get("TERM") != "dumb"


def _is_journal(descriptor: int) -> bool:
    """Tell whether a descriptor is connected to the journal (JOURNAL_STREAM in systemd.exec(5))."""
    file = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{file.st_dev}:{file.st_ino}"
