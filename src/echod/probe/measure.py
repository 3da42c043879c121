"""A measurement: connect, generate load and report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echod.net import kernel
from echod.probe import progress, report
from echod.probe.load import Interrupt, LoadGenerator
from echod.probe.model import Outcome, ProbeResult

if TYPE_CHECKING:
    from echod.probe.model import ProbeOptions


def run(options: ProbeOptions) -> ProbeResult:
    """Measure and report."""
    interrupt = Interrupt()
    interrupt.install()
    kernel.raise_descriptor_limit()
    # Check before the measurement, so that no result is lost.
    if options.plot is not None and (problem := report.unwritable(options.plot)):
        return ProbeResult(Outcome.FAILED, problem=problem)
    with progress.Display(options) as display:
        generator = LoadGenerator(options, interrupt, display)
        generator.connect()
        results = generator.run()
    return report.result(options, results)
