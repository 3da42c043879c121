"""Sessions that misbehave on purpose. A listener without a fault never sees this module's classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from echod.session import EchoSession, SessionSettings

if TYPE_CHECKING:
    import asyncio
    import socket


class InjectedFault(Exception):  # noqa: N818  (it is no error of echod's)
    """Raised in a session because a fault profile says so."""


class Fault(NamedTuple):
    """A fault profile: what sets it off."""

    name: str
    trigger: bytes

    def strike(self, message: bytes) -> None:
        """Raise `InjectedFault` where the message equals the trigger."""
        if message == self.trigger:
            msg = f"fault {self.name!r}: its trigger was received"
            raise InjectedFault(msg)


class FaultSession(EchoSession):
    """A session in which a message that equals the profile's trigger raises.

    A message is what one read returned; TCP may split or join what the client wrote.
    """

    __slots__ = ("_fault",)

    def __init__(
        self,
        sock: socket.socket,
        settings: SessionSettings,
        ended: asyncio.Future[None],
        fault: Fault,
    ) -> None:
        super().__init__(sock, settings, ended)
        self._fault = fault

    def data_received(self, data: bytes) -> None:
        """Echo, or fail and close without losing the echo of what came before."""
        try:
            self._fault.strike(data)
        except InjectedFault as fault:
            self.received += len(data)
            self.failure = fault
            self.finish("fault")
        else:
            super().data_received(data)
