"""Flows: the datagrams between one peer and one local address. Without I/O: the caller passes the time."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from echod.datagram.bucket import Bucket
    from echod.datagram.shaping import FlowFault

Reason = Literal["idle", "evicted", "refused", "quiet", "cut", "aborted", "handed_over"]
"""Reasons for the end of a flow."""

# Flows that a search for one to evict spares because they were used since the last search.
_SPARED = 16


class Flow:
    """One flow and its figures. Each received datagram is answered, dropped or held.

    Args:
        key: in the table.
        peer: the peer's address for sendto(2).
        ends: the host and port of the peer, and the address of this host that it asked.
        names: the peer and the local address as text.
        source: the key of its bucket.
        bucket: the tokens of its source.
        now: the time in nanoseconds.
        control: the control messages for sendmsg(2) that choose the source address of an answer; empty if the socket is
            bound to it.
        fault: the fault to show, or None.

    """

    __slots__ = (
        "_seen",
        "bucket",
        "control",
        "copies",
        "dropped",
        "ends",
        "fault",
        "held",
        "key",
        "last",
        "names",
        "opened",
        "peer",
        "received",
        "received_datagrams",
        "refused",
        "sent",
        "sent_datagrams",
        "source",
    )

    def __init__(
        self,
        key: Hashable,
        peer: Any,
        ends: tuple[str, int, str],
        names: tuple[str, str],
        source: Hashable,
        bucket: Bucket,
        now: int,
        control: Sequence[tuple[int, int, bytes]] = (),
        fault: FlowFault | None = None,
    ) -> None:
        self.key = key
        self.peer = peer
        self.ends = ends
        self.names = names
        self.source = source
        self.bucket = bucket
        self.control = control
        self.fault = fault
        self.opened = self.last = now
        self._seen = 1
        self.received_datagrams = 0
        self.received = 0
        """Bytes, as in `sent`."""
        self.sent_datagrams = 0
        """Received datagrams that have been answered. Copies of an answer do not count."""
        self.sent = 0
        self.refused = 0
        """Datagrams above the rate, and truncated ones."""
        self.dropped = 0
        """Received datagrams without an answer."""
        self.held = 0
        """Received datagrams whose answer is delayed on purpose."""
        self.copies = 0
        """Answers that were sent a second time on purpose."""

    def refuse(self, now: int) -> None:
        """Count a datagram that is refused."""
        self.last = now
        self.refused += 1

    def receive(self, size: int, now: int) -> None:
        """Count a datagram that is to be answered."""
        self.last = now
        self.received_datagrams += 1
        self.received += size

    def echo(self, size: int, now: int) -> None:
        """Count a datagram that was answered at once."""
        self.last = now
        self.received_datagrams += 1
        self.received += size
        self.sent_datagrams += 1
        self.sent += size

    def answer(self, size: int) -> None:
        """Count the answer to a datagram that was counted before."""
        self.sent_datagrams += 1
        self.sent += size

    def copy(self) -> None:
        """Count a second copy of an answer."""
        self.copies += 1

    def drop(self) -> None:
        """Count a received datagram that gets no answer."""
        self.dropped += 1

    def hold(self) -> None:
        """Count an answer that is delayed."""
        self.held += 1

    def release(self) -> None:
        """Count a delayed answer that is now sent or dropped."""
        self.held -= 1

    def end(self) -> int:
        """Give up the delayed answers, and return their number."""
        held, self.held = self.held, 0
        return held

    def spare(self) -> bool:
        """Tell whether a datagram arrived since the last call of this method, or since the first datagram."""
        seen, self._seen = self._seen, self.received_datagrams + self.refused
        return self._seen > seen

    def is_silent(self, now: int, timeout: int) -> bool:
        """Tell whether nothing arrived for `timeout` nanoseconds and nothing is held."""
        return now - self.last >= timeout and not self.held


class FlowTable:
    """The flows of a listener, at most `capacity`.

    A further flow replaces the oldest one that was not used since the last search (the second-chance algorithm). So a
    datagram of a known flow costs no bookkeeping.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._flows: OrderedDict[Hashable, Flow] = OrderedDict()
        self.find = self._flows.get
        """Return the flow of a key, or None."""

    def __len__(self) -> int:
        """Return the number of flows."""
        return len(self._flows)

    def all(self) -> list[Flow]:
        """Return all flows, which may end during the caller's loop."""
        return list(self._flows.values())

    def resize(self, capacity: int) -> None:
        """Change the capacity. Flows beyond it stay until `surplus` returns them."""
        self._capacity = capacity

    def surplus(self) -> Flow | None:
        """Return a flow to end before another one is added, or None if there is room."""
        if len(self._flows) < self._capacity:
            return None
        for _ in range(_SPARED):
            flow = next(iter(self._flows.values()))
            if not flow.spare():
                break
            self._flows.move_to_end(flow.key)
        return next(iter(self._flows.values()))

    def add(self, flow: Flow) -> None:
        """Add a flow."""
        self._flows[flow.key] = flow

    def remove(self, flow: Flow) -> None:
        """Remove a flow."""
        del self._flows[flow.key]
