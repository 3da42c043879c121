"""Run `echod probe`: a quick check or a measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echod.probe import check
from echod.probe.model import Outcome, ProbeResult

if TYPE_CHECKING:
    from echod.probe.model import ProbeOptions

# The packages of the extra `probe`, by the module that is imported.
_EXTRA = {"rich": "rich", "hdrh": "hdrhistogram"}


def run(options: ProbeOptions) -> ProbeResult:
    """Run the probe."""
    if not options.measure:
        return check.run(options)
    try:
        from echod.probe import measure  # noqa: PLC0415  (a quick check does not need it)
    except ModuleNotFoundError as error:
        if (package := _EXTRA.get(str(error.name).partition(".")[0])) is None:
            raise
        message = f"a measurement needs {package}, which is not installed: pip install 'echod[probe]'"
        return ProbeResult(Outcome.FAILED, problem=message)
    return measure.run(options)
