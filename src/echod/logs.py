"""The log: structlog events, each one line, written by a thread so that no reader of the log can stop the echo."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import EventDict, FilteringBoundLogger, Processor

    from echod.settings.model import LogSettings

STDERR = 2

# Lines of at most this many bytes wait to be written; as many again may be in the write that is under way.
_QUEUE_BYTES = 1024 * 1024

# Seconds waited before lines are taken from the queue: under load, one write and one wake-up then do for many.
_GATHER = 0.005

_CLOSE_TIMEOUT = 1.0

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
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

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
        # A signal that this thread took would meet no handler of Python's, and at the end of the process none at all.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
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
    """Where lines go, and the thread that writes them there."""

    def __init__(self, file: str) -> None:
        self.is_file = file != "-"
        descriptor = _open(file) if self.is_file else STDERR
        self.terminal = os.isatty(descriptor)
        self.journal = _is_journal(descriptor)
        self.processors: list[Processor] = []
        # Closed by the thread alone: it may be in the midst of a write to something that takes nothing, and the number
        # would be the next client's.
        at_end = partial(os.close, descriptor) if self.is_file else int
        self.writer = LogWriter(descriptor, lambda lines: _notice(self.processors, lines), at_end)


def _open(file: str) -> int:
    """Open a file for appending, without waiting for somebody to read what is a pipe.

    Raises:
        OSError: it cannot be opened, or is a pipe that nobody reads.

    """
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    os.set_blocking(descriptor, True)
    return descriptor


class Log:
    """The log of the process.

    Args:
        settings: level, format and file.

    Raises:
        OSError: the file cannot be opened for appending.

    """

    def __init__(self, settings: LogSettings) -> None:
        self.logger: FilteringBoundLogger
        self._target: _Target | None = None
        self._retired: list[LogWriter] = []
        self._lost_before = 0
        self.reopen(settings)
        self._bridge = _Bridge(self)

    def reopen(self, settings: LogSettings) -> None:
        """Go by other settings from now on, and open the file anew, as it is wanted after a rotation.

        `logger` is another one then. What is queued for the file before is still written, by a thread.

        Raises:
            OSError: the file cannot be opened for appending; nothing has changed then.

        """
        before = self._target
        if before is None or before.is_file or settings.file != "-":
            self._target = _Target(settings.file)
            if before is not None:
                self._lost_before += before.writer.lost
                before.writer.end()
                self._retired = [*(writer for writer in self._retired if not writer.ended), before.writer]
        target = self._target
        assert target is not None
        form = settings.format
        if form == "auto":
            form = "console" if target.terminal else "json"
        target.processors = [_order, *_renderers(form, colors=target.terminal)]
        if target.journal:
            target.processors.append(_prefix)
        self.logger = structlog.wrap_logger(
            _Lines(target.writer),
            processors=target.processors,
            wrapper_class=structlog.make_filtering_bound_logger(settings.level),
        ).bind()

    @property
    def lost(self) -> int:
        """How many lines were dropped since the start, but for those of a file that was being closed."""
        assert self._target is not None
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
        assert self._target is not None
        for writer in (*self._retired, self._target.writer):
            writer.close()


def unusable(file: str) -> str | None:
    """Tell why a log file cannot be appended to, as far as that shows without creating it; None if it can."""
    path = Path(file)
    with contextlib.suppress(OSError):  # a name that is too long, for one
        if file == "-" or (not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)):
            return None
    return f"{file!r} cannot be written"


class _Lines:
    """What structlog calls an output: takes rendered lines of any level."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer

    def info(self, line: str) -> None:
        self._writer.write(_encode(line))

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
        # Not its default formatter: that may show local variables, and they can hold payload.
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain, sort_keys=False)]
    if form == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_json)]
    return [structlog.processors.format_exc_info, structlog.processors.LogfmtRenderer()]


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
