"""Run `echod probe`: a quick check or a measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echod.probe import arguments, check
from echod.probe.model import Outcome, ProbeResult

if TYPE_CHECKING:
    from collections.abc import Sequence

# The packages of the extra `probe`, by the module that is imported.
_EXTRA = {"rich": "rich", "hdrh": "hdrhistogram"}


def run(command_line: Sequence[str]) -> ProbeResult:
    """Run the probe.

    Args:
        command_line: the arguments after `probe`.

    Raises:
        SystemExit: with code 2 for a usage error, with 0 after --help.

    """
    options = arguments.parse(command_line)
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
