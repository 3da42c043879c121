"""The log: structlog events, each one line, written by a thread so that no reader of the log can stop the echo."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import re
import select
import stat
import sys
import threading
import time
from datetime import UTC, datetime
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from echod import threads
from echod.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    from structlog.typing import EventDict, ExcInfo, FilteringBoundLogger, Processor

    from echod.settings.model import LogSettings

STDERR = 2
_STDOUT = 1

# Lines of at most this many bytes wait to be written; as many again may be in the write that is under way.
_QUEUE_BYTES = 1024 * 1024

# Seconds waited before lines are taken from the queue: under load, one write and one wake-up then do for many.
_GATHER = 0.005

_CLOSE_TIMEOUT = 1.0

# Values with one of these are quoted in logfmt.
_LOGFMT_QUOTED = frozenset(' ="')

# What sd-daemon(3) and syslog(3) have for the levels.
_PRIORITIES = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}


class LogWriter:
    """Writes lines to a descriptor, from a thread of its own.

    `write` never waits. While the descriptor takes nothing, a mebibyte of lines is kept and what comes then is
    dropped; a line that cannot be written (a closed pipe, a full disk) is dropped too. When lines flow again, one more
    says how many there were.

    Args:
        descriptor: to be written to, blocking or not.
        notice: renders the line that tells of so many dropped ones.
        at_end: called, from the thread, when nothing more is going to be written.

    Raises:
        ThreadError: the thread cannot be started.

    """

    def __init__(self, descriptor: int, notice: Callable[[int], bytes], at_end: Callable[[], object] = int) -> None:
        self._descriptor = descriptor
        self._notice = notice
        self._at_end = at_end
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._lines: list[bytes] = []
        self._size = 0
        self._dropped = 0
        self.lost = 0
        """Lines dropped since the beginning."""
        self._torn = False
        self._closing = False
        self._thread = threads.start(self._run, "log")

    def write(self, line: bytes) -> None:
        """Queue one line, newline included, or drop it."""
        with self._lock:
            if self._size + len(line) > _QUEUE_BYTES:
                self._dropped += 1
                self.lost += 1
                return
            self._lines.append(line)
            self._size += len(line)
            first = len(self._lines) == 1
        if first:
            self._wake.set()

    @property
    def prompt(self) -> bool:
        """Whether each write ends soon: to a regular file it does, to a pipe, a socket or a terminal it may not."""
        return stat.S_ISREG(os.fstat(self._descriptor).st_mode)

    def writes_to(self, descriptor: int) -> bool:
        """Tell whether a descriptor is of the file that lines are written to."""
        return os.path.samestat(os.fstat(descriptor), os.fstat(self._descriptor))

    def redirect(self, descriptor: int) -> None:
        """Write to another file from now on, queued lines included. The descriptor is this object's from then on."""
        os.dup2(descriptor, self._descriptor, inheritable=False)
        os.close(descriptor)

    def end(self) -> None:
        """Write what is queued, and nothing after it; not waited for."""
        self._closing = True
        self._wake.set()

    @property
    def ended(self) -> bool:
        """Whether all is written, after `end`."""
        return not self._thread.is_alive()

    def close(self, timeout: float = _CLOSE_TIMEOUT) -> None:
        """Write what is queued, giving up after `timeout` seconds."""
        self.end()
        self._thread.join(timeout)

    def _run(self) -> None:
        closing = False
        while not closing:
            self._wake.wait()
            if not self._closing:
                time.sleep(_GATHER)
            self._wake.clear()
            # After the clearing, or close() would wake nobody; before the lines are taken, so that none stays behind.
            closing = self._closing
            with self._lock:
                lines, self._lines, self._size = self._lines, [], 0
                dropped, self._dropped = self._dropped, 0
            lost = self._write_lines(lines)
            dropped += lost
            if lost:
                with self._lock:
                    self.lost += lost
            if dropped and (lost or self._write_lines([self._notice(dropped)])):
                with self._lock:
                    self._dropped += dropped
        self._at_end()

    def _write_lines(self, lines: list[bytes]) -> int:
        """Write lines, and return how many of them were not wholly written."""
        if self._torn:
            lines = [b"\n", *lines]  # the end of the line that an error cut short
        data = rest = memoryview(b"".join(lines))
        try:
            while rest:
                rest = rest[self._write_some(rest) :]
        except OSError:
            written = len(data) - len(rest)
            whole = 0
            while written >= len(lines[whole]):
                written -= len(lines[whole])
                whole += 1
            lost = len(lines) - whole - (self._torn and not whole)
            self._torn = written > 0 or (self._torn and not whole)
            return lost
        self._torn = False
        return 0

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # somebody who shares the descriptor made it non-blocking
            poll = select.poll()
            poll.register(self._descriptor, select.POLLOUT)
            poll.poll()
            return 0


class _Target:
    """A descriptor that lines go to, and the thread that writes them.

    Args:
        descriptor: this object's from now on.

    Raises:
        ThreadError: the thread cannot be started; the descriptor is closed then.

    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.processors: list[Processor] = []
        try:
            # Closed by the thread only: during a write that blocks, the number would become the next client's.
            self.writer = LogWriter(descriptor, self._notice, partial(os.close, descriptor))
        except threads.ThreadError:
            os.close(descriptor)
            raise

    def render(self, form: str) -> None:
        """Render lines in a format of `log.format` from now on."""
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

    Standard output and standard error are duplicated if they cannot be opened by name: a socket never can, and a pipe
    only by its owner.

    Raises:
        OSError: it cannot be opened, or is a pipe without a reader.

    """
    if file == "-":
        return os.dup(STDERR)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | create, 0o666)
    except OSError:
        with contextlib.suppress(OSError):
            found = Path(file).stat()
            for standard in (_STDOUT, STDERR):
                if os.path.samestat(os.fstat(standard), found):
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
        ThreadError: the thread that writes cannot be started.

    """

    def __init__(self, settings: LogSettings) -> None:
        self.logger: FilteringBoundLogger
        self._retired: list[LogWriter] = []
        self._lost_before = 0
        self._target = _Target(_open(settings.file))
        self._configure(settings)
        self._bridge = _Bridge(self)

    def reopen(self) -> None:
        """Open the file again, as it is wanted after a rotation. Standard error stays as it is.

        Raises:
            OSError: the file cannot be opened for appending; lines still go to the one that is open.
            ThreadError: likewise, for want of a thread.

        """
        if self.settings.file != "-":
            self._retarget(self.settings)

    def change(self, settings: LogSettings) -> None:
        """Apply other settings, and open their file if it is another one; `logger` is another one then.

        Raises:
            OSError: the file cannot be opened for appending; nothing has changed then.
            ThreadError: likewise, for want of a thread.

        """
        if settings.file != self.settings.file:
            self._retarget(settings)
        else:
            self._configure(settings)

    def _retarget(self, settings: LogSettings) -> None:
        descriptor, before = _open(settings.file), self._target.writer
        if not before.prompt and before.writes_to(descriptor):
            os.close(descriptor)  # the same pipe: another thread would wait for its reader as this one does
        elif before.prompt:
            before.redirect(descriptor)
        else:
            # Its thread may wait for a reader for ever, so new lines need another one. The old one writes its queue.
            self._target = _Target(descriptor)
            self._lost_before += before.lost
            before.end()
            self._retired = [*(writer for writer in self._retired if not writer.ended), before]
        self._configure(settings)

    def _configure(self, settings: LogSettings) -> None:
        self.settings = settings
        """Those in force."""
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
        """How many lines were dropped since the start, but for those of a file that was being closed."""
        return self._lost_before + self._target.writer.lost

    def capture(self) -> None:
        """Bring Python's warnings, the lines of `logging`, and exceptions that nobody can catch, into the log."""
        logging.captureWarnings(capture=True)
        logging.getLogger().addHandler(self._bridge)
        sys.unraisablehook = self._unraisable

    def _unraisable(self, args: sys.UnraisableHookArgs) -> None:
        # A client may ask for a server name that is no ASCII; the ssl module ends its handshake, and cannot raise that.
        if not (isinstance(args.exc_value, UnicodeDecodeError) and isinstance(args.object, bytes)):
            self.logger.error("exception_ignored", message=args.err_msg, exc_info=args.exc_value)

    def close(self) -> None:
        """Write what is queued, within a second, and close the file; what is captured later goes to standard error."""
        sys.unraisablehook = sys.__unraisablehook__
        logging.captureWarnings(capture=False)
        logging.getLogger().removeHandler(self._bridge)
        deadline = time.monotonic() + _CLOSE_TIMEOUT
        for writer in (self._target.writer, *self._retired):  # together, and the receipt goes to the first
            writer.close(max(0.0, deadline - time.monotonic()))


def is_fifo(file: str) -> bool:
    """Tell whether a log file is a pipe."""
    with contextlib.suppress(OSError):  # the opening tells of it
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
            return error if error.errno != errno.EOPNOTSUPP else None  # not on every file system, but checked on all
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
        # The default formatter may show local variables, and these can hold payload.
        console = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=_plain_traceback, sort_keys=False)
        return [_escape, console]
    if form == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_json)]
    return [structlog.processors.format_exc_info, _logfmt]


class _Escaped:
    """A text with control characters, which the console renderer shows by `repr`."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return repr(self._text)


def _escape(_: object, __: str, event: EventDict) -> EventDict:
    """Escape control characters, as a terminal would act on them, and a line break would forge a line."""
    name = printable(event.pop("event"))
    values = (_Escaped(item) if isinstance(item, str) and not item.isprintable() else item for item in event.values())
    return {"event": name, **dict(zip(map(printable, event), values, strict=True))}


def _plain_traceback(output: TextIO, exc_info: ExcInfo) -> None:
    """Write a traceback with its line breaks, and with all other control characters escaped."""
    text = io.StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    output.write("\n".join(map(printable, text.getvalue().split("\n"))))


def _logfmt(_: object, __: str, event: EventDict) -> str:
    """Render one line of logfmt, in printable characters only."""
    return " ".join(f"{_logfmt_key(key)}={_logfmt_value(value)}" for key, value in event.items())


def _logfmt_key(key: str) -> str:
    # A key has no escapes.
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
    # As json.dumps(), which would make an encoder for each line.
    return _encoder(default).encode(event)


@cache
def _encoder(default: Callable[[object], object]) -> json.JSONEncoder:
    return json.JSONEncoder(default=default)


@lru_cache(maxsize=1)
def _second(when: int) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _order(_: object, level: str, event: EventDict) -> EventDict:
    """Put the time, the level and the event in front, where a reader looks for them."""
    second, fraction = divmod(time.time_ns() // 1000, 1_000_000)
    timestamp = f"{_second(second)}.{fraction:06}Z"
    return {"timestamp": timestamp, "level": level, "event": event.pop("event"), **event}


def _is_journal(descriptor: int) -> bool:
    """Tell whether systemd's journal reads what is written there: JOURNAL_STREAM of systemd.exec(5)."""
    found = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _prefix(_: object, level: str, line: Any) -> str:
    """Put the level in front as sd-daemon(3) has it; the journal takes it off and keeps it as PRIORITY."""
    return f"<{_PRIORITIES[level]}>{line}"


def _notice(processors: list[Processor], lines: int) -> bytes:
    event: Any = {"event": "log_lines_dropped", "lines": lines}
    for processor in processors:
        event = processor(None, "warning", event)
    return _encode(event)


def _encode(line: str) -> bytes:
    return line.encode(errors="backslashreplace") + b"\n"
