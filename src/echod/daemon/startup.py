"""The first steps of a daemon: find the service manager, take over sockets, and open the listeners."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from echod.daemon import systemd
from echod.daemon.plan import Plan
from echod.net import addresses, kernel
from echod.net.inherited import inherit, inherited_addresses
from echod.net.listeners import open_listeners

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from socket import socket

    from echod.daemon.logs import Log
    from echod.daemon.signals import Signals
    from echod.daemon.systemd import Manager
    from echod.net.addresses import InheritedAddress
    from echod.net.listeners import Listener
    from echod.settings.resources import Resources


class Startup(NamedTuple):
    """The result of the first steps."""

    plan: Plan
    inherited: Mapping[str, Sequence[socket]]
    """The inherited sockets by name."""
    inherited_names: Collection[InheritedAddress]
    """Their addresses."""
    listeners: list[Listener]
    """All open listeners, the admin listener last. Empty if a signal has stopped the start."""
    descriptors: int
    """The limit of descriptors."""
    manager: Manager | None


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
    inherited_names = inherited_addresses(inherited)
    plan = Plan.derive(resources, inherited_names)
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
    used = {spec.address for spec in specs}
    for address in inherited_names:
        if address not in used:
            log.logger.warning("inherited_socket_unused", name=address.name, address=str(address))
    return Startup(plan, inherited, inherited_names, listeners, descriptors, manager)


def socket_addresses(listener: Listener) -> list[str]:
    """Return the addresses of a listener's sockets."""
    sockets = (listening.sock for listening in listener.sockets)
    return [str(addresses.of_socket(sock) or sock.getsockname()) for sock in sockets]
