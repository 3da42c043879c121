"""Run `echod probe`: a quick check, or a measurement and its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echod.net.addresses import UdpAddress
from echod.probe import check
from echod.probe.model import Outcome, ProbeResult

if TYPE_CHECKING:
    from echod.probe.model import ProbeOptions


def run(options: ProbeOptions) -> ProbeResult:
    """Run the probe."""
    if not options.measure:
        if isinstance(options.target, UdpAddress):
            from echod.probe.udp import check as udp_check  # noqa: PLC0415  (of UDP only)

            return udp_check.run(options)
        return check.run(options)
    try:
        return _measure(options)
    except ModuleNotFoundError:
        from echod.extras import missing  # noqa: PLC0415  (a quick check does not need it)

        if not (message := missing("hdrhistogram", "rich")):
            raise
        return ProbeResult(Outcome.FAILED, problem=f"a measurement {message}")


def _measure(options: ProbeOptions) -> ProbeResult:
    # A quick check needs none of these.
    from echod.net import kernel  # noqa: PLC0415
    from echod.probe import progress, report  # noqa: PLC0415
    from echod.probe.load import Interrupt, LoadGenerator  # noqa: PLC0415

    interrupt = Interrupt()
    interrupt.install()
    kernel.raise_descriptor_limit()
    # Check before the measurement, so that no result is lost.
    if options.plot is not None and (problem := report.unwritable(options.plot)):
        return ProbeResult(Outcome.FAILED, problem=problem)
    with progress.Display(options) as display:
        if isinstance(options.target, UdpAddress):
            from echod.probe.udp import measure  # noqa: PLC0415  (of UDP only)
            from echod.probe.udp import report as udp_report  # noqa: PLC0415  (as above)

            return udp_report.result(options, measure.Measurement(options, interrupt, display).run())
        generator = LoadGenerator(options, interrupt, display)
        generator.connect()
        results = generator.run()
    return report.result(options, results)
