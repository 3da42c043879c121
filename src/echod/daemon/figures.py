"""Figures of the daemon as a whole, from the counters of its listeners."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echod.datagram.server import UdpServer
    from echod.server.ledger import Counters


def totals(counters: Sequence[Counters], udp_servers: Sequence[UdpServer] = ()) -> dict[str, object]:
    """Return the totals since the start, for the last line of the log."""
    of_flows = (server.ledger.counters.faults for server in udp_servers)
    faults = sum(chain((one.faults for one in counters), of_flows), Counter[str]())
    return {
        "connections": sum(one.accepted for one in counters),
        "empty": sum(one.empty for one in counters),
        "accept_pauses": sum(one.accept_pauses for one in counters),
        "accept_failures": sum(one.accept_failures for one in counters),
        "received": sum(one.received for one in counters),
        "sent": sum(one.sent for one in counters),
        "acked": sum(one.acked for one in counters),
        "discarded_bytes": sum(one.discarded for one in counters),
        **({"faults": dict(faults)} if faults else {}),
        **(_datagram_totals(udp_servers) if udp_servers else {}),
    }


def _datagram_totals(servers: Sequence[UdpServer]) -> dict[str, object]:
    counters = [server.ledger.counters for server in servers]
    return {
        "flows": sum(one.flows for one in counters),
        "datagrams_received": sum(one.received_datagrams for one in counters),
        "datagrams_sent": sum(one.sent_datagrams for one in counters),
        "datagrams_refused": sum(one.refused.total() for one in counters),
        "datagrams_dropped": sum(one.dropped.total() for one in counters),
        "kernel_drops": sum(server.kernel_drops() for server in servers),
    }
