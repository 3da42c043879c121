"""The receive path of one socket when system calls fail, and the server of a UDP listener in a loop."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import pytest
import structlog
from structlog.testing import capture_logs
from test_datagram_flows import new_registry

from echod.datagram import server
from echod.datagram.echo import DatagramEcho, _destination
from echod.datagram.guards import OwnAddresses
from echod.datagram.ledger import FlowLedger
from echod.datagram.server import UdpServer
from echod.datagram.settings import DatagramSettings
from echod.net import kernel
from echod.net.addresses import UdpAddress
from echod.net.listeners import ListenerSpec, open_listeners
from echod.settings.model import LimitsSettings, ListenerSettings, ShutdownSettings
from harness import PATIENCE
from serving import run_in_loop, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from echod.datagram.registry import FlowRegistry


class Bench:
    """A receive path with a client on another socket.

    Args:
        registry: of the flows.
        capacity: of the buffer.
        host: to bind.
        asked: the address that the client asks, if it is not `host`.

    """

    def __init__(
        self, registry: FlowRegistry, capacity: int = 100, host: str = "127.0.0.1", asked: str | None = None
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.registry = registry
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        if family == socket.AF_INET6:
            self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self.sock.bind((host, 0))
        self.sock.setblocking(False)
        self.client = socket.socket(family, socket.SOCK_DGRAM)
        self.client.settimeout(PATIENCE)
        self.client.connect((asked or host, self.sock.getsockname()[1]))
        self.echo = DatagramEcho(self.sock, registry, time.monotonic_ns, lambda: None, capacity)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        self.client.close()

    def read(self, data: bytes) -> list[Any]:
        """Send a datagram to the path, let it read, and return the log."""
        self.client.send(data)
        with capture_logs() as log:
            assert not self.echo.read()
        return log


@pytest.mark.once
def test_truncated_datagram() -> None:
    """A datagram longer than the buffer is refused, and the flow has it as refused."""
    with Bench(new_registry()) as bench:
        (line,) = bench.read(b"x" * 101)
        assert (line["event"], line["cause"]) == ("datagrams_refused", "truncated")
        assert bench.read(b"x" * 100) == []
        assert bench.client.recv(200) == b"x" * 100
        (flow,) = bench.registry.flows.all()
        assert (flow.refused, flow.received_datagrams) == (1, 1)


@pytest.mark.once
@pytest.mark.parametrize(
    ("number", "cause", "detail"),
    [
        (errno.EAGAIN, "would_block", None),
        (errno.ENOBUFS, "would_block", None),
        (errno.EPERM, "error", "Operation not permitted"),
    ],
)
@pytest.mark.parametrize("fault", [None, {"action": "corrupt"}])
def test_send_that_fails(number: int, cause: str, detail: str | None, fault: dict[str, Any] | None) -> None:
    """An answer that the kernel does not take is dropped and counted, and the next one is sent."""
    with Bench(new_registry(fault=fault)) as bench:
        send = bench.echo._sendto

        def fail(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        bench.echo._sendto = fail
        (line,) = bench.read(b"x")
        assert (line["event"], line["cause"], line["datagrams"], line.get("error")) == (
            "datagrams_dropped",
            cause,
            1,
            detail,
        )
        bench.echo._sendto = send
        assert bench.read(b"y") == []
        assert len(bench.client.recv(10)) == 1
        (flow,) = bench.registry.flows.all()
        assert (flow.received_datagrams, flow.sent_datagrams, flow.dropped) == (2, 1, 1)
        assert bench.registry.ledger.counters.dropped == {cause: 1}


@pytest.mark.once
def test_copy_that_fails() -> None:
    """A copy is extra: if the kernel does not take it, the answer itself still counts."""
    with Bench(new_registry(fault={"action": "duplicate"})) as bench:
        send, calls = bench.echo._sendto, []

        def fail_later(*arguments: Any) -> int:
            calls.append(arguments)
            if len(calls) > 1:
                raise BlockingIOError
            return send(*arguments)

        bench.echo._sendto = fail_later
        assert bench.read(b"x") == []
        assert bench.client.recv(10) == b"x"
        (flow,) = bench.registry.flows.all()
        assert (flow.sent_datagrams, flow.copies, flow.dropped) == (1, 0, 0)


@pytest.mark.once
def test_receive_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure of the system call is counted and logged, and more may be waiting."""

    class Failing(socket.socket):
        def recvfrom_into(self, *_: object) -> Any:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(socket, "socket", Failing)
    with Bench(new_registry()) as bench:
        with capture_logs() as log:
            assert bench.echo.read()
        assert [(line["event"], line["cause"]) for line in log] == [("receive_failed", "Cannot allocate memory")]
        assert bench.registry.ledger.counters.receive_errors == 1


@pytest.mark.once
def test_full_queue_of_delayed_answers() -> None:
    """If the delayed answers take too much memory, further ones are dropped and counted."""
    with Bench(new_registry(fault={"delay": 3600})) as bench:
        held = bench.registry.held
        held._bytes = 16 * 1024 * 1024 - 260
        assert bench.read(b"abcd") == []
        (line,) = bench.read(b"e")
        assert (line["event"], line["cause"]) == ("datagrams_dropped", "hold_limit")
        (flow,) = bench.registry.flows.all()
        assert (flow.received_datagrams, flow.held, flow.dropped) == (2, 1, 1)


@pytest.mark.once
def test_batch() -> None:
    """A wake-up answers at most 64 datagrams, so that others get their turn."""
    with Bench(new_registry({"datagram_rate": 0})) as bench:
        for _ in range(100):
            bench.client.send(b"x")
        assert bench.echo.read()
        (flow,) = bench.registry.flows.all()
        assert flow.sent_datagrams == 64
        assert not bench.echo.read()
        assert flow.sent_datagrams == 100


@pytest.mark.once
@pytest.mark.parametrize(
    ("host", "asked"), [("127.0.0.1", None), ("0.0.0.0", "127.0.0.7"), ("::1", None), ("::", "::1")]
)
def test_seal(host: str, asked: str | None) -> None:
    """A sealed socket takes nothing more from the network. Everything in its queue is still read and answered."""
    with Bench(new_registry(), host=host, asked=asked) as bench:
        for number in range(5):
            bench.client.send(b"%d" % number)
        bench.echo.seal()
        bench.client.send(b"late")
        with pytest.raises(ConnectionRefusedError):
            bench.client.send(b"the error of the datagram before")
        assert not bench.echo.read()
        assert [bench.client.recv(10) for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.once
def test_link_local_destination() -> None:
    """An answer from a link-local address needs its interface. Without information, the guards refuse the datagram."""
    address = socket.inet_pton(socket.AF_INET6, "fe80::1")
    host, ((_, _, data),) = _destination(address + (7).to_bytes(4, "little"))
    assert (host, data[:16], int.from_bytes(data[16:], "little")) == ("fe80::1", address, 7)
    host, ((_, _, data),) = _destination(socket.inet_pton(socket.AF_INET6, "2001:db8::1") + (7).to_bytes(4, "little"))
    assert (host, data[16:]) == ("2001:db8::1", bytes(4))
    assert _destination(b"") == ("255.255.255.255", [])


# The server


def new_server(limits: dict[str, Any] | None = None, **shutdown: Any) -> UdpServer:
    (listener,) = open_listeners([ListenerSpec("x", UdpAddress("127.0.0.1", 0))], 1)
    listening = ListenerSettings(address="udp:127.0.0.1:0")
    settings = DatagramSettings(listening, LimitsSettings(**limits or {}), ShutdownSettings(**shutdown))
    ledger = FlowLedger(structlog.get_logger(), "all")
    return UdpServer(listener.sockets, settings, ledger, OwnAddresses([], lambda _: False))


@pytest.fixture
def owned() -> Iterator[ExitStack]:
    """Yield a stack that closes the sockets of the test."""
    with ExitStack() as stack:
        yield stack


def connected(udp: UdpServer) -> socket.socket:
    (address,) = udp.addresses
    assert isinstance(address, UdpAddress)
    sock = socket.socket(type=socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.connect((address.host, address.port))
    return sock


def test_sweep_that_fails(loop_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect in the sweep is reported, and the server can still be stopped."""

    def fail(_: int) -> None:
        msg = "a defect"
        raise RuntimeError(msg)

    async def scene() -> None:
        udp = new_server({"flow_timeout": 0.01})
        monkeypatch.setattr(udp.ledger, "flush", fail)
        udp.start()
        assert udp.stop_deadlines is None
        assert str(await udp.wait_failed()) == "a defect"
        receipt = await udp.shutdown()
        assert (receipt.flows, receipt.datagrams_received) == (0, 0)
        assert udp.begin_stop() == 0

    run_in_loop(loop_name, scene)


def test_refusals_are_logged_by_the_sweep(loop_name: str, owned: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that were held back appear without another refusal: from the sweep, or from the end of the server."""
    monkeypatch.setattr("echod.datagram.ledger.SECOND", 1)

    async def scene() -> None:
        udp = new_server({"datagram_rate": 1, "datagram_burst": 1, "flow_timeout": 3600}, quiet_period=0)
        monkeypatch.setattr(server, "_LONGEST_SWEEP", 0.01)
        sock = owned.enter_context(connected(udp))
        for _ in range(4):
            sock.send(b"x")
        with capture_logs() as log:
            udp.start()
            refused = udp.ledger.counters.refused
            await until(lambda: refused["rate"] == 3)
            await until(lambda: sum(line.get("datagrams", 0) for line in log) == 3)
        await udp.shutdown()

    run_in_loop(loop_name, scene)


def test_nothing_arrives_during_the_last_reading(
    loop_name: str, owned: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a stop reads the queue to its end, the socket takes nothing more. A late client is refused."""

    async def scene() -> None:
        udp = new_server(quiet_period=0, drain_timeout=0)
        sock = owned.enter_context(connected(udp))
        udp.start()
        read = DatagramEcho.read

        def read_after_a_late_datagram(echo: DatagramEcho) -> bool:
            with contextlib.suppress(ConnectionRefusedError):
                sock.send(b"late")
            return read(echo)

        monkeypatch.setattr(DatagramEcho, "read", read_after_a_late_datagram)
        receipt = await udp.shutdown()
        assert receipt.datagrams_received == 0
        with pytest.raises(ConnectionRefusedError):
            sock.recv(1)

    run_in_loop(loop_name, scene)


def test_seal_that_fails(loop_name: str, owned: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel does not let the socket be sealed, the last reading ends all the same, also under a flood."""
    monkeypatch.setattr(DatagramEcho, "seal", lambda _: None)
    monkeypatch.setattr(server, "_LAST_BATCHES", 3)

    async def scene() -> None:
        udp = new_server({"datagram_rate": 0}, quiet_period=0, drain_timeout=0)
        sock = owned.enter_context(connected(udp))
        monkeypatch.setattr(DatagramEcho, "read", lambda echo: original(echo) or bool(sock.send(b"x")))
        udp.start()
        sock.send(b"x")
        receipt = await udp.shutdown()
        assert receipt.datagrams_unanswered == 0

    original = DatagramEcho.read
    run_in_loop(loop_name, scene)


@pytest.mark.once
def test_drops_that_the_kernel_does_not_tell() -> None:
    """If the kernel refuses the count of drops, it is 0."""
    sock = socket.socket(type=socket.SOCK_DGRAM)
    assert kernel.datagram_drops(sock) == 0
    sock.close()
    assert kernel.datagram_drops(sock) == 0
