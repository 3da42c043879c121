"""Admit datagrams to the flows of one listener, and end flows. Without I/O: the caller passes the time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echod.connection.faults.profile import FaultProfile
from echod.datagram.bucket import SECOND, Bucket, Rate, Sources
from echod.datagram.flows import Flow, FlowTable
from echod.datagram.guards import Guards, source_of
from echod.datagram.held import HoldQueue
from echod.datagram.shaping import FlowFault
from echod.net.addresses import join_host_port

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from echod.datagram.flows import Reason
    from echod.datagram.guards import OwnAddresses
    from echod.datagram.ledger import FlowLedger
    from echod.datagram.settings import DatagramSettings
    from echod.settings.model import LimitsSettings

# Burst allowance of `datagram_total_rate`, as a part of a second.
_TOTAL_BURST = 5


class FlowRegistry:
    """The flows of a listener, with everything that decides about a datagram.

    Args:
        settings: of the listener.
        own: the addresses of all UDP listeners of the daemon.
        ledger: records refusals and the ends of flows.

    """

    def __init__(self, settings: DatagramSettings, own: OwnAddresses, ledger: FlowLedger) -> None:
        limits = settings.limits
        self._own = own
        self.ledger = ledger
        self.flows = FlowTable(limits.max_flows)
        self.held = HoldQueue()
        self._sources = Sources(_source_rate(limits), limits.max_flows)
        self._total = Bucket(_total_rate(limits))
        self._apply(settings)

    def _apply(self, settings: DatagramSettings) -> None:
        self.take_total: Callable[[int], bool] | None = (
            self._total.take if settings.limits.datagram_total_rate else None
        )
        """Takes a token of the listener's rate, as `Bucket.take` does. None: no limit."""
        listener = settings.listener
        self._guards = Guards(listener.refused_ports, listener.allowed_networks, self._own)
        self._profile = None if settings.fault is None else FaultProfile(listener.fault, settings.fault)

    def reconfigure(self, settings: DatagramSettings, now: int) -> None:
        """Apply other settings. Flows that are no longer admitted end; the others keep their fault."""
        limits = settings.limits
        self._apply(settings)
        self.flows.resize(limits.max_flows)
        self._sources.reconfigure(_source_rate(limits), limits.max_flows)
        self._total.reconfigure(_total_rate(limits))
        for flow in self.flows.all():
            host, port, local = flow.ends
            if self._guards.refusal(host, port, local) is not None:
                self.end(flow, "refused", now)

    def admit(
        self,
        key: Hashable,
        peer: Any,
        ends: tuple[str, int, str],
        local_port: int,
        control: Sequence[tuple[int, int, bytes]],
        now: int,
    ) -> Flow | None:
        """Begin a flow for the first datagram of a peer, or refuse it.

        Args:
            key: of the flow.
            peer: the address of the peer for sendto(2).
            ends: the host and port of the peer, and the address of this host that it asked.
            local_port: of the listener.
            control: the control messages of the flow's answers.
            now: nanoseconds.

        """
        host, port, local = ends
        name = join_host_port(host, port)
        if (cause := self._guards.refusal(*ends)) is not None:
            self.ledger.refuse(cause, name, now)
            return None
        source = source_of(host)
        bucket = self._sources.join(source)
        if not bucket.has_token(now):
            self._sources.leave(source, now)
            self.ledger.refuse("rate", name, now)
            return None
        for _ in range(2):  # one more than comes, so that a lower limit is reached
            if (surplus := self.flows.surplus()) is not None:
                self.end(surplus, "evicted", now)
        fault = None if self._profile is None else FlowFault(self._profile, now)
        flow = Flow(key, peer, ends, (name, join_host_port(local, local_port)), source, bucket, now, control, fault)
        self.flows.add(flow)
        self.ledger.open()
        return flow

    def end(self, flow: Flow, reason: Reason, now: int) -> None:
        """End a flow and record it. Its delayed answers are dropped."""
        for _ in range(flow.end()):
            self.ledger.drop(flow, "ended", now)
        self.flows.remove(flow)
        self._sources.leave(flow.source, now)
        self.ledger.close(flow, reason, now)

    def end_silent(self, flows: Sequence[Flow], timeout: float, now: int) -> None:
        """End those of some flows that have been silent for `timeout` seconds."""
        for flow in flows:
            # A flow may have ended since the caller listed it.
            if flow.is_silent(now, round(timeout * SECOND)) and self.flows.find(flow.key) is flow:
                self.end(flow, "idle", now)


def _source_rate(limits: LimitsSettings) -> Rate:
    return Rate.of(limits.datagram_rate, limits.datagram_burst)


def _total_rate(limits: LimitsSettings) -> Rate:
    return Rate.of(limits.datagram_total_rate, max(1, limits.datagram_total_rate // _TOTAL_BURST))
