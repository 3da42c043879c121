"""Live progress on a terminal, drawn by a separate process.

Drawing takes milliseconds, which would show in the latencies if the measuring process did it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from echod.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from echod.probe.model import ProbeOptions

# Latencies that are enough for the figures shown.
_SAMPLE = 256

# Columns of the target at most, so that the figures fit on a terminal of 80 columns.
_TARGET = 22


class Display:
    """Shows the state of a running measurement if standard error is a terminal."""

    def __init__(self, options: ProbeOptions) -> None:
        self._options = options
        self._pipe: int | None = None
        self._child = 0

    def __enter__(self) -> Self:
        if sys.stderr is not None and sys.stderr.isatty():
            reading, self._pipe = os.pipe()
            try:
                self._child = os.fork()
            except OSError:  # the process limit: measure without progress
                os.close(reading)
                os.close(self._pipe)
                self._pipe = None
                return self
            if self._child == 0:
                os.close(self._pipe)
                try:
                    _draw(self._options, reading)
                finally:
                    os._exit(0)
            os.close(reading)
            os.set_blocking(self._pipe, False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            os.waitpid(self._child, 0)

    def show(
        self, *, seconds: float, messages: int, received: int, errors: int, sample: Sequence[int], lost: int = 0
    ) -> None:
        """Show the state.

        Args:
            seconds: time since the start.
            messages: messages answered so far.
            received: bytes received so far.
            errors: errors so far.
            sample: some recent latencies in nanoseconds.
            lost: datagrams lost so far.

        """
        if self._pipe is None:
            return
        some = sorted(sample[:_SAMPLE])
        median, largest = (some[len(some) // 2], some[-1]) if some else (0, 0)
        state = (seconds, messages, received, errors, lost, median, largest)
        # A write below PIPE_BUF is atomic. A slow terminal misses some states.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, json.dumps(state).encode() + b"\n")


def _draw(options: ProbeOptions, reading: int) -> None:
    """Draw each state that is read from the pipe, until EOF."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent closes the pipe soon
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=_TARGET)),
        BarColumn(None, table_column=Column(ratio=1)),
        TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
    )
    # Drawn for each state, without a thread that draws in between.
    bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False, expand=True)
    total = options.messages or options.duration
    task = bar.add_task(str(options.target), total=total, text="connecting")
    before, then = 0, 0.0
    with Live(bar, console=bar.console, auto_refresh=False, transient=True) as live, open(reading, "rb") as states:
        live.refresh()
        for line in states:
            seconds, messages, received, errors, lost, median, largest = json.loads(line)
            counted = received if options.stream else messages
            speed = (counted - before) / max(seconds - then, 0.001)
            before, then = counted, seconds
            parts = [f"{seconds:.1f} s", f"{bytes_text(speed)}/s" if options.stream else f"{speed:,.0f}/s"]
            if largest:
                parts.append(f"p50 {seconds_text(median / 1e9)}, max {seconds_text(largest / 1e9)}")
            if lost:
                parts.append(f"[red]{lost:,} lost[/red]")
            if errors:
                parts.append(f"[red]{errors} error{'s' if errors > 1 else ''}[/red]")
            bar.update(task, completed=messages if options.messages else seconds, text="  ".join(parts))
            live.refresh()
