"""The first steps of a daemon: find the service manager, take over sockets, and open the listeners."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from echod.daemon import systemd
from echod.daemon.plan import Plan
from echod.net import addresses, kernel
from echod.net.inherited import inherit
from echod.net.listeners import open_listeners

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from socket import socket

    from echod.daemon.logs import Log
    from echod.daemon.signals import Signals
    from echod.daemon.systemd import Manager
    from echod.net.listeners import Listener
    from echod.settings.resources import Resources


class Startup(NamedTuple):
    """The result of the first steps."""

    plan: Plan
    inherited: Mapping[str, Sequence[socket]]
    """The inherited sockets by name."""
    listeners: list[Listener]
    """All open listeners, the admin listener last. Empty if a signal has stopped the start."""
    descriptors: int
    """The limit of descriptors."""
    manager: Manager | None

    def addresses_in_use(self) -> dict[str, list[str]]:
        """Return the addresses of each listener's sockets, by its name."""
        return {listener.name: socket_addresses(listener) for listener in self.listeners}


def start_up(resources: Resources, log: Log, signals: Signals, *, share_ports: bool = False) -> Startup:
    """Open the listeners.

    Args:
        resources: the settings and the loaded certificates.
        log: of the process.
        signals: a stop ends the wait for a name server.
        share_ports: as in `open_listeners`.

    Raises:
        ListenError: an address cannot be opened; none is open then.
        SettingsError: the settings do not fit the inherited sockets; no address is open then.

    """
    for variable, meant in resources.config.unknown_variables.items():
        log.logger.warning("unknown_variable", variable=variable, **({"did_you_mean": meant} if meant else {}))
    manager = systemd.find_manager(log.logger.warning)
    descriptors = kernel.raise_descriptor_limit()
    inherited = inherit()
    plan = Plan.derive(resources, inherited)
    specs = plan.specs()
    if plan.settings.admin.address:
        # Before anything listens, because this import is slow.
        import echod.admin.http  # noqa: F401, PLC0415  (an extra)
    try:
        listeners = open_listeners(
            specs, plan.settings.limits.backlog, inherited, signals.is_stopping, share_ports=share_ports
        )
    except InterruptedError:
        listeners = []  # the stop begins once there is a loop
    used = {spec.address.name for spec in specs if isinstance(spec.address, addresses.InheritedAddress)}
    for name in inherited.keys() - used:
        log.logger.warning("inherited_socket_unused", name=name)
    return Startup(plan, inherited, listeners, descriptors, manager)


def socket_addresses(listener: Listener) -> list[str]:
    """Return the addresses of a listener's sockets."""
    names = (listening.sock.getsockname() for listening in listener.sockets)
    return [addresses.text(name) for name in names]
