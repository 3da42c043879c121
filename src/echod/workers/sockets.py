"""The listening sockets of the parent, which its workers share or divide."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Self

from echod.net.listen_errors import explain
from echod.net.listeners import ListenError, open_sibling
from echod.workers.messages import ListenerPart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echod.net.addresses import Address
    from echod.net.listeners import Listener, ListeningSocket
    from echod.workers.messages import Loaded


class ListenerSockets:
    """The sockets of one listener.

    A TCP address of its own has a socket for each worker. The parent keeps all of them open: connections in the queue of a
    worker that has died are served by its successor. Unix sockets and inherited ones are shared.

    Args:
        name: of the listener.
        sockets: by the number of the worker. If all workers share the sockets, each item is the same list.

    """

    def __init__(self, name: str, sockets: Sequence[list[ListeningSocket]]) -> None:
        self.name = name
        self._sockets = sockets
        self._is_shared = sockets[0] is sockets[-1]

    @classmethod
    def open(cls, listener: Listener, address: Address, workers: int, backlog: int) -> Self:
        """Open the sockets of the other workers.

        Args:
            listener: the sockets of the first worker, opened with `share_ports`.
            address: as in the settings.
            workers: at least 2.
            backlog: of each socket.

        Raises:
            ListenError: the kernel refused a socket. All sockets of this listener are closed.

        """
        first = listener.sockets
        if first[0].inherited or first[0].sock.family == socket.AF_UNIX:
            return cls(listener.name, [first] * workers)
        sockets = [first]
        with contextlib.ExitStack() as opened:
            for listening in first:
                opened.callback(listening.close)
            for _ in range(1, workers):
                sockets.append([])
                for listening in first:
                    try:
                        sibling = open_sibling(listening, backlog)
                    except OSError as error:
                        raise ListenError([f"cannot listen on {address}: {explain(error, address, ())}"]) from error
                    opened.callback(sibling.close)
                    sockets[-1].append(sibling)
            opened.pop_all()
        return cls(listener.name, sockets)

    def part(self, worker: int, removed_from: Loaded | None) -> ListenerPart:
        """Describe the sockets of one worker. `removed_from` is as in `ListenerPart`."""
        own = self._sockets[worker]
        return ListenerPart(
            self.name, len(own), is_inherited=own[0].inherited, is_shared=self._is_shared, removed_from=removed_from
        )

    def descriptors(self, worker: int) -> list[int]:
        """Return the descriptors of one worker's sockets."""
        return [listening.sock.fileno() for listening in self._sockets[worker]]

    def set_backlog(self, backlog: int) -> None:
        """Set the backlog of the sockets, except inherited ones.

        Raises:
            OSError: the kernel refused; earlier sockets have the new one already.

        """
        for listening in self._each():
            if not listening.inherited:
                listening.sock.listen(backlog)

    def close(self) -> None:
        """Close the parent's copies. The file of a unix socket is unlinked first, so that no new client finds it."""
        for listening in self._each():
            listening.close()

    def _each(self) -> list[ListeningSocket]:
        if self._is_shared:
            return self._sockets[0]
        return [listening for own in self._sockets for listening in own]
