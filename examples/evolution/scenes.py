"""Provide the four scenes of docs/explanation/evolution.md, which both the measurement and the tests use."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    from types import TracebackType

HERE = Path(__file__).parent
STEPS = (
    *("step1_one_client", "step2_in_turn", "step3_busy_loop", "step4_selectors", "step5_tasks", "step6_shutdown"),
    "step7_protocol",
)
# Upper bound of any single wait, in seconds. Only a failure reaches it.
PATIENCE = 30.0
# A line of 512 bytes with numbered fields. A lost byte shifts the rest, so a comparison detects it.
MESSAGE = b"".join(b"%07d," % number for number in range(63)) + b"512 by\r\n"
_ECHO = MESSAGE * 129


class DaemonView(Protocol):
    """A server as the scenes see it: a step, or the tests' daemon."""

    @property
    def pid(self) -> int: ...

    @property
    def address(self) -> tuple[str, int]: ...

    def send_signal(self, number: int = ...) -> None: ...


class Step:
    """A running step. Its output is collected line by line.

    Args:
        step: The name of the step.
        arguments: Arguments after the port. The port is 0, so the kernel chooses a free one.

    """

    def __init__(self, step: str, *arguments: str) -> None:
        path = HERE / f"{step}.py"
        # The environment is empty, so that neither coverage nor a debug mode changes the figures.
        self.process = subprocess.Popen(
            [sys.executable, path, "0", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={}
        )
        self.lines: list[str] = []
        self._ended = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE)
        if self.process.stdout:
            self.process.stdout.close()
        if error is not None:
            sys.stderr.write(self.output)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def address(self) -> tuple[str, int]:
        """Return the listening address."""
        host, _, port = self.wait_for("listening on ").split()[-1].rpartition(":")
        return host, int(port)

    @property
    def output(self) -> str:
        """Return the output so far."""
        return "".join(self.lines)

    def wait_for(self, text: str, count: int = 1) -> str:
        """Wait for the `count`th line that contains `text`, and return it."""

        def found() -> list[str]:
            return [line for line in self.lines if text in line]

        with self._news:
            if not self._news.wait_for(lambda: len(found()) >= count or self._ended, PATIENCE) or len(found()) < count:
                message = f"no line with {text!r}:\n{self.output}"
                raise AssertionError(message)
        return found()[count - 1]

    def send_signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the process and its output to end, and return the exit code."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


def connect(server: DaemonView) -> socket.socket:
    """Return a connected client."""
    return socket.create_connection(server.address, timeout=PATIENCE)


def converse(client: socket.socket, message: bytes = b"hello\r\n") -> bytes:
    """Send a message, and return its echo. The echo is incomplete after EOF or a reset."""
    echo = b""
    with contextlib.suppress(ConnectionError):
        client.sendall(message)
        while len(echo) < len(message) and (data := client.recv(65536)):
            echo += data
    return echo


class Cpu(NamedTuple):
    """The CPU time of a process, and its time in the run queue, in seconds."""

    used: float
    waited: float

    @classmethod
    def of(cls, server: DaemonView) -> Self:
        """Read both clocks of a server."""
        waited = 0
        for thread in Path(f"/proc/{server.pid}/task").glob("*/schedstat"):
            waited += int(thread.read_text().split()[1])
        # The CPU clock of the process, as in clock_getcpuclockid(3).
        return cls(time.clock_gettime(~server.pid << 3 | 2), waited / 1e9)

    def since(self, before: Cpu) -> Cpu:
        """Return the difference."""
        return Cpu(self.used - before.used, self.waited - before.waited)


def idle(server: DaemonView, seconds: float) -> float:
    """Return the CPU use of a server with one silent client, as a share of the available CPU time.

    Time in the run queue does not count as available, so a busy machine does not change the figure.
    """
    with connect(server) as client:
        assert converse(client) == b"hello\r\n"
        before, began = Cpu.of(server), time.monotonic()
        time.sleep(seconds)
        cpu = Cpu.of(server).since(before)
        return cpu.used / (time.monotonic() - began - cpu.waited)


class Wait(NamedTuple):
    """The wait of a second client for its echo."""

    seconds: float
    """Infinite if the client gets no echo."""
    outlasted: bool
    """Whether the first client left before the echo came."""


def second_client(server: DaemonView, silence: float) -> Wait:
    """Return the wait of a second client while the first is silent. The first one leaves after `silence` seconds."""
    with connect(server) as first, connect(server) as second:
        left = threading.Event()

        def leave() -> None:
            left.set()
            first.shutdown(socket.SHUT_RDWR)

        leaving = threading.Timer(silence, leave)
        leaving.start()
        began = time.monotonic()
        echo = converse(second)
        waited = time.monotonic() - began
        leaving.cancel()
        leaving.join()
        return Wait(waited if echo else float("inf"), left.is_set())


class Peer:
    """A client that keeps a number of bytes outstanding, and compares each byte of the echo."""

    def __init__(self, server: DaemonView, window: int) -> None:
        self.sock = connect(server)
        self.sock.setblocking(False)
        self.window = window
        self.sent = self.received = 0
        self.until = float("inf")
        """The time of its half-close, on the monotonic clock."""
        self.done = False
        self.failed = ""
        """The name of its socket error, or the empty string."""
        self.ended = False

    @property
    def whole(self) -> bool:
        """Whether the client half-closed without an error and received the echo of all its data."""
        return self.done and not self.failed and self.sent == self.received

    def write(self) -> None:
        """Send until the window is full. After an error, there may still be echo to read."""
        try:
            while not (self.done or self.failed) and self.sent - self.received + len(MESSAGE) <= self.window:
                self.sent += self.sock.send(MESSAGE)
        except OSError as error:
            self.failed = type(error).__name__

    def read(self) -> int:
        """Receive once, and return the number of bytes."""
        try:
            data = self.sock.recv(65536)
        except OSError as error:
            self.failed = type(error).__name__
            data = b""
        start = self.received % len(MESSAGE)
        assert data == _ECHO[start : start + len(data)], "the echo differs from the data"
        self.received += len(data)
        self.ended = not data
        return len(data)

    def finish(self) -> None:
        """Stop sending, and half-close."""
        self.done = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)


class Crowd:
    """Many clients of one server."""

    def __init__(self, server: DaemonView, clients: int, window: int) -> None:
        self.peers = {peer.sock.fileno(): peer for peer in (Peer(server, window) for _ in range(clients))}
        self._epoll = select.epoll()
        for number in self.peers:
            self._epoll.register(number, select.EPOLLIN)

    def __enter__(self) -> Self:
        for peer in self.peers.values():
            peer.write()
        return self

    def __exit__(self, *_: object) -> None:
        self._epoll.close()
        for peer in self.peers.values():
            peer.sock.close()

    def turn(self) -> int:
        """Receive from all ready clients, and refill their windows. Wait at most 10 ms. Return the number of bytes."""
        size = 0
        for number, _ in self._epoll.poll(0.01):
            peer = self.peers[number]
            size += peer.read()
            if peer.ended:
                self._epoll.unregister(number)
            else:
                peer.write()
        return size


def cost(server: DaemonView, clients: int, messages: int) -> float:
    """Return the CPU time of a server per message of 512 bytes, in seconds. Each client has one outstanding."""
    before, size = Cpu.of(server), 0
    deadline = time.monotonic() + PATIENCE
    with Crowd(server, clients, len(MESSAGE)) as crowd:
        while size < messages * len(MESSAGE):
            assert time.monotonic() < deadline, f"only {size} bytes were echoed"
            size += crowd.turn()
        return Cpu.of(server).since(before).used * len(MESSAGE) / size


class Loss(NamedTuple):
    """The loss at a stop."""

    clients: int
    """Clients that did not receive their complete echo."""
    size: int
    """Bytes sent by these clients and not echoed."""


def stop(server: DaemonView, clients: int, short: float, long: float) -> Loss:
    """Send SIGTERM under load, and return the loss.

    Each client keeps 16 KiB outstanding. Half of the clients half-close `short` seconds after the signal, the others after
    `long` seconds. Then they receive the rest of their echo.
    """
    began = time.monotonic()
    with Crowd(server, clients, 16384) as crowd:
        peers = list(crowd.peers.values())
        while time.monotonic() < began + 0.3:
            crowd.turn()
        server.send_signal(signal.SIGTERM)
        began = time.monotonic()
        for number, peer in enumerate(peers):
            peer.until = began + (short if number % 2 else long)
        while not all(peer.ended for peer in peers):
            assert time.monotonic() < began + PATIENCE, f"only {sum(peer.ended for peer in peers)} clients have ended"
            crowd.turn()
            for peer in peers:
                if not peer.done and time.monotonic() > peer.until:
                    peer.finish()
        lost = [peer for peer in peers if not peer.whole]
        return Loss(len(lost), sum(peer.sent - peer.received for peer in lost))
