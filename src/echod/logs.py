"""The log: structlog events, each one line, written by a thread so that no reader of the log can stop the echo."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import EventDict, FilteringBoundLogger, Processor

    from echod.settings import LogSettings

STDERR = 2

# Lines of at most this many bytes wait to be written; as many again may be in the write that is under way.
_QUEUE_BYTES = 1024 * 1024

# Seconds waited before lines are taken from the queue: under load, one write and one wake-up then do for many.
_GATHER = 0.005

_CLOSE_TIMEOUT = 1.0


class LogWriter:
    """Writes lines to a descriptor, from a thread of its own.

    `write` never waits. While the descriptor takes nothing, a mebibyte of lines is kept and what comes then is
    dropped; a line that cannot be written (a closed pipe, a full disk) is dropped too. When lines flow again, one more
    says how many there were.

    Args:
        descriptor: to be written to, blocking or not; it stays open.
        notice: renders the line that tells of so many dropped ones.

    """

    def __init__(self, descriptor: int, notice: Callable[[int], bytes]) -> None:
        self._descriptor = descriptor
        self._notice = notice
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

    def close(self, timeout: float = _CLOSE_TIMEOUT) -> None:
        """Write what is queued, giving up after `timeout` seconds."""
        self._closing = True
        self._wake.set()
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
        self.file = None if file == "-" else open(file, "ab", buffering=0)  # noqa: SIM115, PTH123
        descriptor = STDERR if self.file is None else self.file.fileno()
        self.terminal = os.isatty(descriptor)
        self.processors: list[Processor] = []
        self.writer = LogWriter(descriptor, lambda lines: _notice(self.processors, lines))

    def close(self) -> None:
        self.writer.close()
        if self.file is not None:
            self.file.close()


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
        self._retired: list[threading.Thread] = []
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
        if before is None or before.file is not None or settings.file != "-":
            self._target = _Target(settings.file)
            if before is not None:
                self._lost_before += before.writer.lost
                closing = threading.Thread(target=before.close, name="log end", daemon=True)
                closing.start()
                self._retired = [thread for thread in self._retired if thread.is_alive()] + [closing]
        target = self._target
        assert target is not None
        form = settings.format
        if form == "auto":
            form = "console" if target.terminal else "json"
        target.processors = [_order, *_renderers(form, colors=target.terminal)]
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
        sys.unraisablehook = lambda args: self.logger.error(
            "exception_ignored", message=args.err_msg, exc_info=args.exc_value
        )

    def close(self) -> None:
        """Write what is queued, within a second, and close the file; what is captured later goes to standard error."""
        sys.unraisablehook = sys.__unraisablehook__
        logging.captureWarnings(capture=False)
        logging.getLogger().removeHandler(self._bridge)
        assert self._target is not None
        self._target.close()
        for thread in self._retired:
            thread.join()


def unusable(file: str) -> str | None:
    """Tell why a log file cannot be appended to, as far as that shows without creating it; None if it can."""
    path = Path(file)
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
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    return [structlog.processors.format_exc_info, structlog.processors.LogfmtRenderer()]


def _order(_: object, level: str, event: EventDict) -> EventDict:
    """Put the time, the level and the event in front, where a reader looks for them."""
    timestamp = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return {"timestamp": timestamp, "level": level, "event": event.pop("event"), **event}


def _notice(processors: list[Processor], lines: int) -> bytes:
    event: Any = {"event": "log_lines_dropped", "lines": lines}
    for processor in processors:
        event = processor(None, "warning", event)
    return _encode(event)


def _encode(line: str) -> bytes:
    return line.encode(errors="backslashreplace") + b"\n"
