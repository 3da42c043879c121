"""The sections of the settings that one UDP server runs with."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from echod.settings.model import LimitsSettings, ShutdownSettings

if TYPE_CHECKING:
    from echod.settings.model import FaultSettings, ListenerSettings


class DatagramSettings(NamedTuple):
    """The sections of the settings that one UDP server runs with."""

    listener: ListenerSettings
    limits: LimitsSettings = LimitsSettings()
    shutdown: ShutdownSettings = ShutdownSettings()
    fault: FaultSettings | None = None
    """The fault that `listener.fault` names."""
