"""The sections of the settings that one server runs with."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from echod.settings.model import LimitsSettings, ShutdownSettings

if TYPE_CHECKING:
    from echod.connection.tls import TlsEnd
    from echod.settings.model import FaultSettings, ListenerSettings


class ServerSettings(NamedTuple):
    """The sections of the settings that one server runs with, and its loaded certificates."""

    listener: ListenerSettings
    limits: LimitsSettings = LimitsSettings()
    shutdown: ShutdownSettings = ShutdownSettings()
    fault: FaultSettings | None = None
    """The fault that `listener.fault` names."""
    tls: TlsEnd | None = None
