"""Run an echo server on Twisted with its default reactor.

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
    """Echo. The transport is registered as its own producer, so it stops reading while its write buffer is full."""

    def connectionMade(self) -> None:
        """Set TCP_NODELAY and register the producer."""
        self.transport.setTcpNoDelay(True)
        self.transport.registerProducer(self.transport, streaming=True)

    def dataReceived(self, data: bytes) -> None:
        """Echo the data."""
        self.transport.write(data)

    def readConnectionLost(self) -> None:
        """Close after the last write. A registered producer would keep the connection open."""
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def writeConnectionLost(self) -> None:
        """Ignore it: the reading side closes the connection."""


def main() -> None:
    """Serve until a signal arrives."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    reactor.listenTCP(int(sys.argv[1]), protocol.Factory.forProtocol(Echo), backlog=4096, interface="127.0.0.1")
    reactor.run()


if __name__ == "__main__":
    main()
