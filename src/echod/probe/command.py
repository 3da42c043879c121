"""Run `echod probe`: a quick check or a measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echod.probe import check
from echod.probe.model import Outcome, ProbeResult

if TYPE_CHECKING:
    from echod.probe.model import ProbeOptions


def run(options: ProbeOptions) -> ProbeResult:
    """Run the probe."""
    if not options.measure:
        return check.run(options)
    try:
        from echod.probe import measure  # noqa: PLC0415  (a quick check does not need it)
    except ModuleNotFoundError:
        from echod.extras import missing  # noqa: PLC0415  (as above)

        if not (message := missing("hdrhistogram", "rich")):
            raise
        return ProbeResult(Outcome.FAILED, problem=f"a measurement {message}")
    return measure.run(options)
