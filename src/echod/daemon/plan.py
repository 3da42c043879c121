"""Derive the listeners, and the settings of their servers, from the settings of the daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Self

from echod.connection.tls import TlsEnd
from echod.datagram.settings import DatagramSettings
from echod.net import addresses
from echod.net.listeners import ListenerSpec
from echod.server.settings import ServerSettings
from echod.settings.model import ONE_PROCESS, ListenerSettings, changes
from echod.settings.problems import Problem, SettingsError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from echod.connection.tls import TlsBuffers
    from echod.net.addresses import InheritedAddress
    from echod.settings.model import Config, Settings
    from echod.settings.resources import Resources
    from echod.settings.types import Key

ADMIN = "admin"
"""The name of the admin listener."""

ADMIN_CLOSE = 5.0
"""Seconds that the admin listener may take to close."""


class Plan(NamedTuple):
    """The listeners and their settings. The start and each reload derive them in the same way."""

    resources: Resources
    listeners: Mapping[str, ListenerSettings]
    """By name, without the admin listener."""

    @classmethod
    def derive(cls, resources: Resources, inherited: Collection[InheritedAddress]) -> Self:
        """Return the plan for settings and the addresses of the inherited sockets.

        Raises:
            SettingsError: an inherited socket has the name of the admin listener, or is for UDP with several workers.

        """
        return cls(resources, _listeners(resources.config, inherited))

    @property
    def settings(self) -> Settings:
        """The settings that the plan was derived from."""
        return self.resources.config.settings

    def specs(self) -> list[ListenerSpec]:
        """Return the listeners to open, the admin listener last."""
        specs = [ListenerSpec(name, one.parsed_address, one.permissions) for name, one in self.listeners.items()]
        if self.settings.admin.address:
            specs.append(ListenerSpec(ADMIN, addresses.parse(self.settings.admin.address)))
        return specs

    def server_settings(self, name: str, max_connections: int, buffers: TlsBuffers) -> ServerSettings:
        """Return the settings of one listener's server.

        Args:
            name: of the listener.
            max_connections: the cap, which may be lower than that of the settings.
            buffers: those of the loop.

        """
        tls = self.resources.tls.get(name)
        end = None if tls is None else TlsEnd(tls.context, buffers)
        settings, listener = self.settings, self.listeners[name]
        limits = settings.limits.model_copy(update={"max_connections": max_connections})
        return ServerSettings(listener, limits, settings.shutdown, settings.faults.get(listener.fault), end)

    def datagram_settings(self, name: str) -> DatagramSettings:
        """Return the settings of one UDP listener's server."""
        settings, listener = self.settings, self.listeners[name]
        return DatagramSettings(listener, settings.limits, settings.shutdown, settings.faults.get(listener.fault))

    def open_reflectors(self) -> Iterator[str]:
        """Yield the names of the UDP listeners that answer everyone, whatever host a datagram's source address belongs to."""
        return (name for name, listener in self.listeners.items() if listener.is_open_reflector)

    def restart_needed(self, initial: Plan) -> list[str]:
        """Return the settings that differ from those of the start, and take effect only at a start."""
        return sorted({".".join(key) for key in _fixed_changes(initial.settings, self.settings)})


def _listeners(config: Config, inherited: Collection[InheritedAddress]) -> Mapping[str, ListenerSettings]:
    """Return every listener by name. Inherited sockets are the listeners if the settings contain no address."""
    if inherited and ("listen",) not in config.origins and not config.settings.listeners:
        names = {f"udp:{one.name}" if one.datagram else one.name: one for one in inherited}
        if config.settings.admin.address and ADMIN in names:
            message = (
                f"the admin listener is named {ADMIN!r}, and so is an inherited socket: give the socket another name "
                "(FileDescriptorName=), or add an address to listen on"
            )
            raise SettingsError([Problem(config.origins["admin", "address"], "admin.address", message)])
        if config.settings.workers != 1 and any(one.datagram for one in inherited):
            raise SettingsError([Problem(config.origins["workers",], "workers", ONE_PROCESS)])
        return {name: ListenerSettings(address=str(one)) for name, one in names.items()}
    return config.settings.all_listeners()


def _fixed_changes(initial: Settings, settings: Settings) -> Iterator[Key]:
    for key in changes(initial, settings):
        if key[0] in {"loop", "workers", "listen", "admin"}:
            yield key
        elif key[0] == "listeners" and not (key[1] in initial.listeners and key[1] in settings.listeners):
            yield key[:2]
        elif key[0] == "listeners" and key[2] in {"address", "socket_mode"}:
            yield key
