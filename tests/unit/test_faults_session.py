"""A session with a fault, over a TCP connection, in a loop with a clock that only the test moves."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING, Any, Literal

import pytest
from pydantic import ByteSize

from echod.connection.faults.profile import FaultProfile
from echod.connection.faults.session import FaultSession, InjectedFault
from echod.settings.model import FaultSettings, LimitsSettings, ShutdownSettings
from harness import PATIENCE, receive, reset
from pairs import Pair

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class ManualLoop(asyncio.SelectorEventLoop):
    """A loop with a clock of its own."""

    now = 1000.0

    def time(self) -> float:
        return self.now


class Bench:
    """A session with a fault, and its client."""

    def __init__(
        self, loop: ManualLoop, receive_buffer: int | None, mode: Literal["stream", "line"], **fault: Any
    ) -> None:
        self._loop = loop
        self.pair = Pair(receive_buffer)
        self.client = self.pair.client
        self.session = FaultSession(
            self.pair.sock,
            LimitsSettings(),
            ShutdownSettings(linger_timeout=10),
            loop.create_future(),
            FaultProfile("test", FaultSettings(**fault)),
            mode,
            1,
        )
        self.pair.session = self.session

    async def send(self, data: bytes) -> None:
        """Send data that the session reads."""
        total = self.session.received + len(data)
        self.client.sendall(data)
        await self.until(lambda: self.session.received == total)

    async def receive(self, size: int) -> bytes:
        return await asyncio.to_thread(receive, self.client, size)

    def reason(self) -> str | None:
        return self.session.reason

    async def advance(self, seconds: float) -> None:
        """Move the clock, and let the loop call the timers that are due."""
        self._loop.now += seconds
        for _ in range(3):
            await asyncio.sleep(0)

    async def until(self, condition: Callable[[], object]) -> None:
        """Run the loop until the condition holds, at the same time by its clock."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline
            await asyncio.sleep(0)

    async def advance_until(self, condition: Callable[[], object]) -> float:
        """Move the clock by steps of 1 ms until the condition holds. Return the seconds."""
        began = self._loop.now
        while not condition():
            assert self._loop.now < began + 100
            await self.advance(0.001)
        return self._loop.now - began

    async def end(self) -> None:
        """Close the client, and wait for the end of the session."""
        self.client.close()
        await self.advance_until(self.session.ended.done)


def bench(
    scene: Callable[[Bench], Awaitable[None]],
    *,
    receive_buffer: int | None = None,
    mode: Literal["stream", "line"] = "stream",
    **fault: Any,
) -> None:
    """Run a scene with a session and its client."""
    loop = ManualLoop()

    async def main() -> None:
        bench = Bench(loop, receive_buffer, mode, **fault)
        await bench.pair.connect()
        try:
            await scene(bench)
        finally:
            bench.client.close()

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())


def test_delay() -> None:
    """Echo is held for the delay. Messages sent without waiting come back in order, each after its own delay."""

    async def scene(bench: Bench) -> None:
        await bench.send(b"a")
        await bench.advance(0.1)
        await bench.send(b"b")
        await bench.advance(0.098)
        session = bench.session
        assert (session.written, session.owed, session.undelivered()) == (0, 2, 2)
        await bench.advance(0.002)
        assert await bench.receive(1) == b"a"
        assert (session.written, session.owed) == (1, 2)
        await bench.advance(0.1)
        assert await bench.receive(1) == b"b"
        assert session.fault == "test"
        await bench.end()
        assert (session.reason, session.delivery and session.delivery.acked) == ("eof", 2)

    bench(scene, delay=0.2)


def test_delay_of_some_messages() -> None:
    """A message that does not match is echoed at once."""

    async def scene(bench: Bench) -> None:
        await bench.send(b"now")
        assert (await bench.receive(3), bench.session.fault) == (b"now", None)
        await bench.send(b"late")
        assert await bench.advance_until(lambda: bench.session.written == 7) == pytest.approx(0.4, abs=0.002)
        assert await bench.receive(4) == b"late"
        await bench.end()

    bench(scene, trigger="late", delay=0.4)


def test_rate() -> None:
    """Echo takes its size divided by the rate, less the burst allowance."""

    async def scene(bench: Bench) -> None:
        await bench.send(bytes(10_800))
        assert await bench.advance_until(lambda: bench.session.written == 10_800) == pytest.approx(1.5, rel=0.05)
        assert await bench.receive(10_800) == bytes(10_800)
        await bench.end()

    bench(scene, rate=7200)


def test_slices_at_a_rate() -> None:
    """The client receives each slice alone, and all of them at the rate."""

    async def scene(bench: Bench) -> None:
        await bench.send(bytes(1000))
        parts: list[bytes] = []
        while sum(map(len, parts)) < 1000:
            seconds = await bench.advance_until(lambda: bench.session.written > sum(map(len, parts)))
            parts.append(await asyncio.to_thread(bench.client.recv, 1000))
            assert seconds <= 0.003
        assert {len(part) for part in parts[1:]} == {10}  # the first has the burst allowance
        await bench.end()

    bench(scene, rate=10_000, slice=10)


@pytest.mark.parametrize("first", ["bytes", "seconds"])
def test_reset_after_bytes_and_seconds(first: str) -> None:
    """Both conditions must hold, whichever comes last. The client can read the echo that arrived before."""

    async def scene(bench: Bench) -> None:
        if first == "bytes":
            await bench.send(bytes(1200))
            await bench.advance(0.49)
            assert bench.reason() is None
            assert await bench.receive(1200) == bytes(1200)
            await bench.advance(0.01)
        else:
            await bench.send(bytes(999))
            await bench.advance(0.7)
            assert bench.reason() is None
            assert await bench.receive(999) == bytes(999)
            bench.client.sendall(b"x")
        await bench.until(bench.session.ended.done)
        assert (bench.reason(), bench.session.fault) == ("fault", "test")
        with pytest.raises(ConnectionResetError):
            await bench.receive(2)

    bench(scene, after_bytes=1000, after_seconds=0.5, action="reset")


def test_close_at_a_time() -> None:
    """A client that sends nothing gets EOF at that time."""

    async def scene(bench: Bench) -> None:
        await bench.advance(0.499)
        assert bench.reason() is None
        await bench.advance(0.001)
        assert bench.reason() == "fault"
        assert await bench.receive(1) == b""
        await bench.end()

    bench(scene, after_seconds=0.5, action="close")


def test_time_that_comes_after_the_close() -> None:
    """A session that closes does not start its action any more."""

    async def scene(bench: Bench) -> None:
        bench.session.close("quiet")
        await bench.advance(0.5)
        await bench.end()
        assert (bench.reason(), bench.session.fault) == ("quiet", None)

    bench(scene, after_seconds=0.5, action="reset")


def test_action_on_a_lost_connection() -> None:
    """If the echo before the action fails, the connection has ended for that reason, and not for the fault."""

    async def scene(bench: Bench) -> None:
        reset(bench.client)
        bench.session.data_received(b"hello")
        await bench.until(bench.session.ended.done)
        assert (bench.reason(), bench.session.fault) == ("reset", None)

    bench(scene, after_bytes=5, action="close")


def test_trigger_before_its_time() -> None:
    """Before its time, a trigger is a message like any other."""

    async def scene(bench: Bench) -> None:
        await bench.send(b"x\n")
        assert await bench.receive(2) == b"x\n"
        await bench.advance(0.6)
        await bench.send(b"y\nx\n")
        assert await bench.receive(6) == b"y\nx\nx\n"
        await bench.end()

    bench(scene, mode="line", trigger="x\n", after_seconds=0.6, action="duplicate")


@pytest.mark.parametrize("action", ["close", "raise", "half_close"])
def test_end_after_held_echo(action: str) -> None:
    """Held echo goes out in its own time before the FIN of the fault."""

    async def scene(bench: Bench) -> None:
        await bench.send(b"." * 1500)
        seconds = await bench.advance_until(lambda: bench.session.written == 1000)
        assert seconds == pytest.approx(0.5, abs=0.03)
        assert await bench.receive(1001) == b"." * 1000
        bench.client.close()
        if action == "raise":
            with pytest.raises(InjectedFault, match="'test'"):
                await bench.session.ended
        else:
            await bench.session.ended
        assert bench.reason() == "fault"
        assert bench.session.delivery is not None
        assert bench.session.delivery[:3] == (1500, 1000, 1000)

    bench(scene, after_bytes=1000, action=action, rate=2000)


@pytest.mark.parametrize("ending", [False, True])
def test_urgent_close(ending: bool) -> None:
    """A close that cannot wait sends held echo at once, even after the client's EOF. It is not sent again later."""

    async def scene(bench: Bench) -> None:
        await bench.send(b"x")
        if ending:
            bench.client.shutdown(socket.SHUT_WR)
            await bench.until(lambda: bench.reason() == "eof")
            assert bench.session.written == 0
        bench.session.close("cut")
        assert await bench.receive(2) == b"x"
        await bench.advance(2)
        assert bench.session.written == 1
        await bench.end()
        assert bench.reason() == ("eof" if ending else "cut")
        assert bench.session.delivery is not None
        assert bench.session.delivery.acked == 1

    bench(scene, delay=1)


def test_reset_of_a_stalled_session() -> None:
    """A stalled session reads nothing, and notices its client's reset within a second."""

    async def scene(bench: Bench) -> None:
        await bench.send(b"x")
        bench.client.sendall(b"unread")
        await bench.advance(5)
        assert (bench.session.received, bench.session.unread()) == (1, False)
        reset(bench.client)
        assert await bench.advance_until(bench.session.ended.done) <= 1.01
        assert bench.reason() == "reset"

    bench(scene, action="stall")


def test_half_close_of_a_client_that_does_not_read() -> None:
    """FIN comes after the echo, however long the client takes. Further data is read."""
    size = 20_000_000

    async def scene(bench: Bench) -> None:
        sender = asyncio.create_task(asyncio.to_thread(bench.client.sendall, bytes(size)))
        await bench.until(lambda: bench.session.paused)
        await bench.advance(1)
        assert bench.session.fault == "test"
        assert not sender.done()
        echoed = len(await bench.receive(size))
        assert echoed < size
        await sender
        await bench.end()
        assert bench.reason() == "fault"
        assert bench.session.delivery is not None
        assert bench.session.delivery[:3] == (size, echoed, echoed)

    bench(scene, receive_buffer=4096, after_seconds=1, action="half_close")


def test_new_write_buffer() -> None:
    """A reload changes the number of bytes above which reading pauses."""

    async def scene(bench: Bench) -> None:
        bench.session.reconfigure(LimitsSettings(write_buffer=ByteSize(100)), ShutdownSettings())
        await bench.send(b"." * 101)
        bench.client.sendall(b"more")
        await bench.advance(0.5)
        assert bench.session.received == 101
        await bench.advance(0.5)
        assert await bench.receive(101) == b"." * 101
        await bench.until(lambda: bench.session.received == 105)
        bench.session.close("cut")
        assert await bench.receive(5) == b"more"
        await bench.end()

    bench(scene, delay=1)


def test_due_echo_of_a_client_that_does_not_read() -> None:
    """Above the high-water mark, no more held echo is written, even if it is due."""
    messages = [b"%03d" % number + b"." * 997 for number in range(60)]

    async def scene(bench: Bench) -> None:
        bench.pair.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for message in messages:
            await bench.send(message)
        bench.session.reconfigure(LimitsSettings(write_buffer=ByteSize(5000)), ShutdownSettings())
        await bench.advance(1)
        assert bench.session.paused
        assert bench.session.unsent() <= 6000
        assert bench.session.written < bench.session.owed == 60_000
        assert await bench.receive(60_000) == b"".join(messages)
        await bench.end()

    bench(scene, receive_buffer=4096, delay=1)
