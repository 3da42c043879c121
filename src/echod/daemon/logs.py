"""Render the log: each structlog event is one line, written by a thread."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import re
import stat
import sys
import time
from datetime import UTC, datetime
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from echod import threads
from echod.daemon.log_writer import CLOSE_TIMEOUT, LogWriter
from echod.settings.problems import Problem
from echod.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TextIO

    from structlog.typing import EventDict, ExcInfo, FilteringBoundLogger, Processor

    from echod.settings.model import Config, LogSettings

_STDOUT, _STDERR = 1, 2

# Values with one of these are quoted in logfmt.
_LOGFMT_QUOTED = frozenset(' ="')

# Priorities of the levels: sd-daemon(3), syslog(3).
_PRIORITIES = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}


class _Target:
    """A descriptor for the lines, and the thread that writes them.

    Args:
        descriptor: owned by this object from now on.

    Raises:
        ThreadError: the thread cannot be started, and the descriptor has been closed.

    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.processors: list[Processor] = []
        try:
            # Only the thread closes it: during a blocked write, a client's socket could get its number.
            self.writer = LogWriter(descriptor, self._notice, partial(os.close, descriptor))
        except threads.ThreadError:
            os.close(descriptor)
            raise

    def render(self, form: str) -> None:
        """Render lines in a format that `log.format` allows."""
        terminal = os.isatty(self._descriptor)
        if form == "auto":
            form = "console" if terminal else "json"
        self.processors = [_order, *_renderers(form, colors=terminal)]
        if _is_journal(self._descriptor):
            self.processors.append(_prefix)

    def _notice(self, lines: int) -> bytes:
        return _notice(self.processors, lines)


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

    Raises:
        OSError: the file cannot be opened for appending.
        ThreadError: the writer thread cannot be started.

    """

    def __init__(self, settings: LogSettings) -> None:
        self.logger: FilteringBoundLogger
        self._retired: list[LogWriter] = []
        self._lost_before = 0
        self._reopen_failed = False
        self._target = _Target(_open(settings.file))
        self._configure(settings)
        self._bridge = _Bridge(self)

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
            self._target = _Target(descriptor)
            self._lost_before += before.lost
            before.end()
            self._retired = [*(writer for writer in self._retired if not writer.ended), before]
        self._reopen_failed = False
        self._configure(settings)

    def _configure(self, settings: LogSettings) -> None:
        self.settings = settings
        """The settings in force."""
        self._target.render(settings.format)
        self.logger = structlog.wrap_logger(
            _Lines(self),
            processors=self._target.processors,
            wrapper_class=structlog.make_filtering_bound_logger(settings.level),
        ).bind()

    def write(self, line: bytes) -> None:
        """Queue one rendered line, newline included."""
        self._target.writer.write(line)

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
        for writer in (self._target.writer, *self._retired):  # together, and the receipt goes to the first
            writer.close(max(0.0, deadline - time.monotonic()))


def problem(config: Config, error: OSError) -> Problem:
    """Return the problem of a log file that cannot be opened."""
    message = f"{config.settings.log.file!r} cannot be written: {error.strerror}"
    return Problem(config.origins["log", "file"], "log.file", message)


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
        self._log.write(_encode(line))

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


def _renderers(form: str, *, colors: bool) -> list[Processor]:
    if form == "console":
        # The default formatter may show local variables, which can contain payload.
        console = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=_plain_traceback, sort_keys=False)
        return [_escape, console]
    if form == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_json)]
    return [structlog.processors.format_exc_info, _logfmt]


class _Escaped:
    """A text with control characters. The console renderer shows its `repr`."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return repr(self._text)


def _escape(_: object, __: str, event: EventDict) -> EventDict:
    """Escape control characters: a terminal would act on them, and a line break would forge a line."""
    name = printable(event.pop("event"))
    values = (_Escaped(item) if isinstance(item, str) and not item.isprintable() else item for item in event.values())
    return {"event": name, **dict(zip(map(printable, event), values, strict=True))}


def _plain_traceback(output: TextIO, exc_info: ExcInfo) -> None:
    """Write a traceback, and escape all control characters except its line breaks."""
    text = io.StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    output.write("\n".join(map(printable, text.getvalue().split("\n"))))


def _logfmt(_: object, __: str, event: EventDict) -> str:
    """Render one line of logfmt, in printable characters only."""
    return " ".join(f"{_logfmt_key(key)}={_logfmt_value(value)}" for key, value in event.items())


def _logfmt_key(key: str) -> str:
    # logfmt has no escapes in keys.
    return key if key.isidentifier() else re.sub(r"\W", "_", key)


def _logfmt_value(value: object) -> str:
    if value is None:
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if text.isprintable() and _LOGFMT_QUOTED.isdisjoint(text):
        return text
    # JSON escapes only the ASCII control characters.
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in quoted)


def _json(event: EventDict, default: Callable[[object], object]) -> str:
    # json.dumps() would create an encoder for each line.
    return _encoder(default).encode(event)


@cache
def _encoder(default: Callable[[object], object]) -> json.JSONEncoder:
    return json.JSONEncoder(default=default)


@lru_cache(maxsize=1)
def _second(when: int) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _order(_: object, level: str, event: EventDict) -> EventDict:
    """Put the time, the level and the event first."""
    second, fraction = divmod(time.time_ns() // 1000, 1_000_000)
    timestamp = f"{_second(second)}.{fraction:06}Z"
    return {"timestamp": timestamp, "level": level, "event": event.pop("event"), **event}


def _is_journal(descriptor: int) -> bool:
    """Tell whether a descriptor is connected to the journal (JOURNAL_STREAM in systemd.exec(5))."""
    file = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{file.st_dev}:{file.st_ino}"


def _prefix(_: object, level: str, line: Any) -> str:
    """Put the level first as in sd-daemon(3). The journal removes it, and stores it as PRIORITY."""
    return f"<{_PRIORITIES[level]}>{line}"


def _notice(processors: list[Processor], lines: int) -> bytes:
    event: Any = {"event": "log_lines_dropped", "lines": lines}
    for processor in processors:
        event = processor(None, "warning", event)
    return _encode(event)


def _encode(line: str) -> bytes:
    return line.encode(errors="backslashreplace") + b"\n"
