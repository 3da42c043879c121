"""Flows and their table: bounded, with the flows in use kept."""

from __future__ import annotations

from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from echod.datagram.bucket import SECOND, Bucket, Rate
from echod.datagram.flows import Flow, FlowTable
from echod.datagram.guards import OwnAddresses
from echod.datagram.ledger import Event, FlowLedger, Limiter
from echod.datagram.receipt import FlowReceipt
from echod.datagram.registry import FlowRegistry
from echod.datagram.settings import DatagramSettings
from echod.settings.model import FaultSettings, LimitsSettings, ListenerSettings

pytestmark = pytest.mark.once


def new_flow(key: object, now: int = 0) -> Flow:
    return Flow(key, key, ("192.0.2.1", 5, "127.0.0.1"), ("peer", "local"), "source", Bucket(Rate.of(0, 1)), now)


def new_registry(
    limits: dict[str, Any] | None = None, fault: dict[str, Any] | None = None, connections: Any = "all", **listener: Any
) -> FlowRegistry:
    """Return a registry that logs to structlog's default logger."""
    if fault is not None:
        listener["fault"] = "x"
    settings = DatagramSettings(
        ListenerSettings(address="udp:127.0.0.1:7", **listener),
        LimitsSettings(**limits or {}),
        fault=None if fault is None else FaultSettings(**fault),
    )
    return FlowRegistry(settings, OwnAddresses([], lambda _: False), FlowLedger(structlog.get_logger(), connections))


def admit(registry: FlowRegistry, host: str, port: int = 5000, now: int = 1) -> Flow | None:
    return registry.admit((host, port), (host, port), (host, port, "127.0.0.1"), 7, (), now)


def test_unused_flow_is_evicted() -> None:
    """A full table gives up the oldest flow that was not used since the last search."""
    table = FlowTable(3)
    flows = [new_flow(key) for key in "abc"]
    for flow in flows:
        assert table.surplus() is None
        table.add(flow)
        flow.receive(1, 0)
    flows[0].refuse(0)
    assert table.surplus() is flows[1]
    table.remove(flows[1])
    assert table.surplus() is None
    assert table.find("a") is flows[0]
    assert table.find("b") is None
    assert len(table) == 2


def test_all_flows_are_used() -> None:
    """If every flow was used, the search ends all the same, and a flow is evicted."""
    table = FlowTable(20)
    for key in range(20):
        flow = new_flow(key)
        table.add(flow)
        for _ in range(2):
            flow.receive(1, 1)
    assert table.surplus() in table.all()


@settings(deadline=None)  # a busy machine pauses a test
@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=80))
def test_bound(capacity: int, datagrams: list[tuple[int, bool]]) -> None:
    """The table never has more flows than its capacity, whatever arrives, and knows each flow by its key."""
    table = FlowTable(capacity)
    for now, (key, again) in enumerate(datagrams, 1):
        flow = table.find(key)
        if flow is None:
            if (surplus := table.surplus()) is not None:
                table.remove(surplus)
            flow = new_flow(key, now)
            table.add(flow)
        if again:
            flow.receive(1, now)
        assert table.find(key) is flow
        assert len(table) <= capacity


@settings(deadline=None)  # a busy machine pauses a test
@given(st.lists(st.sampled_from(["echo", "receive", "answer", "drop", "hold", "release"]), max_size=60))
def test_figures(steps: list[str]) -> None:
    """Each received datagram is sent, dropped or held."""
    flow = new_flow("a")
    open_ones = 0
    for now, step in enumerate(steps):
        if step == "echo":
            flow.echo(3, now)
        elif step == "receive":
            flow.receive(3, now)
            open_ones += 1
        elif step == "release" and flow.held:
            flow.release()
            open_ones += 1
        elif open_ones and step in {"answer", "drop", "hold"}:
            open_ones -= 1
            {"answer": lambda: flow.answer(3), "drop": flow.drop, "hold": flow.hold}[step]()
        assert flow.received_datagrams == flow.sent_datagrams + flow.dropped + flow.held + open_ones
        assert flow.sent == 3 * flow.sent_datagrams


def test_silence() -> None:
    """A flow is silent if nothing arrived and nothing is held. A refused datagram ends the silence too."""
    flow = new_flow("a", 10)
    assert flow.is_silent(15, 5)
    flow.refuse(12)
    assert not flow.is_silent(15, 5)
    assert flow.is_silent(17, 5)
    flow.hold()
    assert not flow.is_silent(17, 5)
    assert flow.end() == 1
    assert flow.is_silent(17, 5)


def test_flood_of_sources() -> None:
    """10,000 forged sources leave no more flows and buckets than `max_flows`, and evict no flow that is in use."""
    registry = new_registry({"max_flows": 100}, connections="none")
    client = admit(registry, "192.0.2.1")
    assert client is not None
    client.echo(1, 1)
    for number in range(10_000):
        if number % 50 == 0:
            client.echo(1, number + 2)
        assert admit(registry, f"10.0.{number >> 8}.{number & 255}", now=number + 2) is not None
    assert len(registry.flows) == 100
    assert len(registry._sources) <= 201
    assert registry.flows.find(client.key) is client
    assert registry.ledger.counters.flows == 10_001
    assert registry.ledger.counters.reasons == {"evicted": 9_901}


def test_lower_limit() -> None:
    """After a reload with a lower `max_flows`, each new flow ends two, until the limit is reached."""
    registry = new_registry({"max_flows": 10})
    for number in range(10):
        assert admit(registry, f"192.0.2.{number}") is not None
    listener = ListenerSettings(address="udp:127.0.0.1:7")
    registry.reconfigure(DatagramSettings(listener, LimitsSettings(max_flows=8)), 2)
    sizes = []
    for number in range(4):
        assert admit(registry, f"192.0.2.{100 + number}") is not None
        sizes.append(len(registry.flows))
    assert sizes == [9, 8, 8, 8]


def test_rate_of_a_new_flow() -> None:
    """A source above its rate cannot begin another flow."""
    registry = new_registry({"datagram_rate": 1, "datagram_burst": 1})
    flow = admit(registry, "192.0.2.1")
    assert flow is not None
    assert flow.bucket.take(1)
    with capture_logs() as log:
        assert admit(registry, "192.0.2.1", 5001) is None
    assert log == [
        {
            "event": "datagrams_refused",
            "log_level": "warning",
            "cause": "rate",
            "datagrams": 1,
            "peer": "192.0.2.1:5001",
        }
    ]
    assert admit(registry, "192.0.2.1", 5001, SECOND + 2) is not None


def test_reload_ends_flows_that_are_no_longer_admitted() -> None:
    """A reload with other networks and ports ends the flows that they refuse. The others stay."""
    registry = new_registry()
    for host, port in (("192.0.2.1", 5000), ("192.0.2.1", 5001), ("198.51.100.1", 5000)):
        assert admit(registry, host, port) is not None
    listener = ListenerSettings(address="udp:127.0.0.1:7", allow=("192.0.2.0/24",), refuse_ports=("5001",))
    with capture_logs() as log:
        registry.reconfigure(DatagramSettings(listener, LimitsSettings(datagram_total_rate=10)), 2)
    assert [(line["event"], line["peer"], line["reason"]) for line in log] == [
        ("flow_closed", "192.0.2.1:5001", "refused"),
        ("flow_closed", "198.51.100.1:5000", "refused"),
    ]
    assert [flow.names[0] for flow in registry.flows.all()] == ["192.0.2.1:5000"]
    assert registry.take_total is not None
    assert [registry.take_total(1) for _ in range(3)] == [True, True, False]


def test_idle_flows() -> None:
    """A flow ends when it was silent for the timeout, once."""
    registry = new_registry()
    flows = [admit(registry, "192.0.2.1", 5000 + number) for number in range(3)]
    first, second, third = (flow for flow in flows if flow is not None)
    second.echo(1, SECOND)
    registry.end(third, "evicted", 1)
    registry.end_silent([first, second, third], 1, SECOND + 1)
    assert registry.flows.all() == [second]
    assert registry.ledger.counters.reasons == {"idle": 1, "evicted": 1}


def test_ended_flow_drops_what_is_held() -> None:
    """Delayed answers of a flow that ends are dropped and counted."""
    registry = new_registry(fault={"delay": 1})
    flow = admit(registry, "192.0.2.1")
    assert flow is not None
    flow.receive(1, 1)
    flow.hold()
    with capture_logs() as log:
        registry.end(flow, "evicted", 2)
    dropped, closed = log
    assert dropped == {
        "event": "datagrams_dropped",
        "log_level": "warning",
        "cause": "ended",
        "datagrams": 1,
        "peer": "192.0.2.1:5000",
    }
    assert (closed["received_datagrams"], closed["sent_datagrams"], closed["dropped"]) == (1, 0, 1)
    assert registry.ledger.counters.dropped == {"ended": 1}


@pytest.mark.parametrize(
    ("connections", "logged"),
    [
        ("all", ["plain", "refused", "dropped", "cut", "empty"]),
        ("nonempty", ["plain", "refused", "dropped", "cut"]),
        ("failed", ["refused", "dropped", "cut"]),
        ("none", []),
    ],
)
def test_logged_flows(connections: Any, logged: list[str]) -> None:
    """`log.connections` selects the flows that are logged."""
    registry = new_registry(connections=connections)
    names = ("plain", "refused", "dropped", "cut", "empty")
    with capture_logs() as log:
        for port, name in enumerate(names, 5000):
            flow = admit(registry, "192.0.2.1", port)
            assert flow is not None
            if name != "empty":
                flow.receive(1, 1)
            if name == "refused":
                flow.refuse(1)
            if name == "dropped":
                flow.drop()
            registry.end(flow, "cut" if name == "cut" else "idle", 2)
    assert [names[int(line["peer"].rpartition(":")[2]) - 5000] for line in log] == logged


def test_limited_events() -> None:
    """An event is logged at most once a second per cause, and no number is lost."""
    limiter = Limiter()
    one, other = Event("refused", "port"), Event("refused", "rate")
    assert limiter.count(one, 0) == 1
    assert [limiter.count(one, SECOND // 2), limiter.count(one, SECOND - 1), limiter.count(other, SECOND - 1)] == [
        0,
        0,
        1,
    ]
    assert limiter.due(SECOND - 1) == []
    assert limiter.count(one, SECOND) == 3
    assert limiter.count(one, SECOND + 1) == 0
    assert limiter.due(2 * SECOND) == [(one, 1)]
    assert limiter.count(one, 2 * SECOND + 1) == 0
    assert limiter.rest() == [(one, 1)]
    assert limiter.rest() == []


def test_receipt() -> None:
    """Receipts add up. The seconds are those of the longest stop."""
    one, other = FlowReceipt(1, 2, 3, 4, 0.5), FlowReceipt(10, 20, 30, 40, 0.2)
    assert FlowReceipt.total([one, other]) == FlowReceipt(11, 22, 33, 44, 0.5)
    assert FlowReceipt.total([]) == FlowReceipt(0, 0, 0, 0, 0.0)
