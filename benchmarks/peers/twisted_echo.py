"""An echo server on Twisted, its default reactor.

Usage: twisted_echo.py PORT
"""

from __future__ import annotations

import resource
import sys

from twisted.internet import protocol, reactor
from twisted.internet.interfaces import IHalfCloseableProtocol
from zope.interface import implementer


@implementer(IHalfCloseableProtocol)
class Echo(protocol.Protocol):
    """The transport is its own producer: when its buffer is full, it stops reading."""

    def connectionMade(self) -> None:
        """Begin."""
        self.transport.setTcpNoDelay(True)
        self.transport.registerProducer(self.transport, streaming=True)

    def dataReceived(self, data: bytes) -> None:
        """Send it back."""
        self.transport.write(data)

    def readConnectionLost(self) -> None:
        """Close once all is written; a producer would keep it open."""
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def writeConnectionLost(self) -> None:
        """Leave the end to the reading side."""


def main() -> None:
    """Serve until a signal."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    reactor.listenTCP(int(sys.argv[1]), protocol.Factory.forProtocol(Echo), backlog=4096, interface="127.0.0.1")
    reactor.run()


if __name__ == "__main__":
    main()
