"""Check the host of a request against DNS rebinding."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

from echod.net.addresses import TcpAddress

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from echod.net.addresses import Address

# The authority of a target in absolute form.
_AUTHORITY = re.compile(r"[a-z][a-z0-9+.-]*://([^/?#]*)", re.IGNORECASE)


class HostCheck:
    """Check the host of requests to a loopback address.

    With DNS rebinding, a web page makes its own name resolve to 127.0.0.1, and reads this listener through the browser
    of a local user. The Host header then has that name. Requests to other addresses are not checked: their names are
    unknown, and clients in that network need no browser.

    Args:
        bound: the addresses of the listening sockets.
        configured: the address in the settings.

    """

    def __init__(self, bound: Collection[Address | None], configured: Address) -> None:
        hosts = [address.host for address in bound if isinstance(address, TcpAddress)]
        self._is_loopback = bool(hosts) and all(ipaddress.ip_address(host).is_loopback for host in hosts)
        self._configured = configured.host if isinstance(configured, TcpAddress) else ""

    def allows_request(self, target: str, hosts: Iterable[str]) -> bool:
        """Return whether a request may be answered.

        The authority in a target takes the place of the Host header (RFC 9112, section 3.2.2).

        Args:
            target: as the client sent it.
            hosts: the values of the Host headers.

        """
        absolute = _AUTHORITY.match(target)
        return all(map(self.allows, hosts if absolute is None else absolute.groups()))

    def allows(self, host: str) -> bool:
        """Return whether a request to this host may be answered."""
        if not self._is_loopback:
            return True
        match = re.fullmatch(r"\[([^\]]*)\](?::\d*)?|([^:]*)(?::\d*)?", host)
        if match is None:
            return False
        name = (match[1] or match[2] or "").lower().removesuffix(".")
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in {"localhost", self._configured} or name.endswith(".localhost")
        return True
