"""The four scenes in which each step and echod are measured, and tested: the figures and the tests are one code."""

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
STEPS = ("step1_one_client", "step2_in_turn", "step3_busy_loop", "step4_selectors", "step5_tasks", "step6_shutdown")
# The longest that any single wait may take, seconds: a bound for failures.
PATIENCE = 30.0
# A line of 512 bytes, all different in their place: a byte lost shifts what follows, and is noticed.
MESSAGE = b"".join(b"%07d," % number for number in range(63)) + b"512 by\r\n"
_ECHO = MESSAGE * 129


class Subject(Protocol):
    """What a scene needs of a server: a step, or the tests' daemon."""

    @property
    def pid(self) -> int: ...

    @property
    def address(self) -> tuple[str, int]: ...

    def send_signal(self, number: int = ...) -> None: ...


class Step:
    """A running script of this directory, or any other; its output is read line by line.

    Args:
        script: its path, or a step's name.
        arguments: behind the port, which is a free one.

    """

    def __init__(self, script: str | Path, *arguments: str) -> None:
        path = script if isinstance(script, Path) else HERE / f"{script}.py"
        # Without this process's environment: neither coverage nor a debug mode has a part in the figures.
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
        """Return where it listens."""
        host, _, port = self.wait_for("listening on ").split()[-1].rpartition(":")
        return host, int(port)

    @property
    def output(self) -> str:
        """Return all that it has printed."""
        return "".join(self.lines)

    def wait_for(self, text: str, count: int = 1) -> str:
        """Wait for the `count`th line that contains a text, and return it."""

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
        """Wait for the end of the process and of its output; return its exit code."""
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


def connect(server: Subject) -> socket.socket:
    """Return a connected client."""
    return socket.create_connection(server.address, timeout=PATIENCE)


def converse(client: socket.socket, message: bytes = b"hello\r\n") -> bytes:
    """Send a message, and return what comes back: all of it, less before EOF, nothing after a reset."""
    echo = b""
    with contextlib.suppress(ConnectionError):
        client.sendall(message)
        while len(echo) < len(message) and (data := client.recv(65536)):
            echo += data
    return echo


class Cpu(NamedTuple):
    """What a process has had of the CPU, and how long it stood in line for one, seconds."""

    used: float
    waited: float

    @classmethod
    def of(cls, server: Subject) -> Self:
        """Look now."""
        waited = 0
        for thread in Path(f"/proc/{server.pid}/task").glob("*/schedstat"):
            waited += int(thread.read_text().split()[1])
        # The process's CPU clock, as clock_getcpuclockid(3) makes its number.
        return cls(time.clock_gettime(~server.pid << 3 | 2), waited / 1e9)

    def since(self, before: Cpu) -> Cpu:
        """Return what came on top."""
        return Cpu(self.used - before.used, self.waited - before.waited)


def idle(server: Subject, seconds: float) -> float:
    """Return the CPU that a server takes with one silent client, as a share of what it could have had: 1 is a core.

    Its time in the queue for a CPU counts as not to be had, so that a busy machine does not change the figure.
    """
    with connect(server) as client:
        assert converse(client) == b"hello\r\n"
        before, began = Cpu.of(server), time.monotonic()
        time.sleep(seconds)
        cpu = Cpu.of(server).since(before)
        return cpu.used / (time.monotonic() - began - cpu.waited)


def second_client(server: Subject, silence: float) -> float | None:
    """Return how long a second client waits for its echo, seconds, while the first says nothing, and then leaves.

    None: it never comes. `silence` is how long the first one stays, seconds.
    """
    with connect(server) as first, connect(server) as second:
        leaving = threading.Timer(silence, first.shutdown, [socket.SHUT_RDWR])
        leaving.start()
        began = time.monotonic()
        echo = converse(second)
        waited = time.monotonic() - began
        leaving.join()
        return waited if echo else None


class Peer:
    """A client that keeps so many bytes of messages on their way, and looks at each byte of the echo."""

    def __init__(self, server: Subject, window: int) -> None:
        self.sock = connect(server)
        self.sock.setblocking(False)
        self.window = window
        self.sent = self.received = 0
        self.until = float("inf")
        """When it half-closes, on the monotonic clock."""
        self.done = False
        self.failed = ""
        """The name of its socket's error, if there was one."""
        self.ended = False

    @property
    def whole(self) -> bool:
        """Tell whether it said all it had to say, and all of it came back."""
        return self.done and not self.failed and self.sent == self.received

    def write(self) -> None:
        """Fill the window. Behind an error there may be echo to read still."""
        try:
            while not (self.done or self.failed) and self.sent - self.received + len(MESSAGE) <= self.window:
                self.sent += self.sock.send(MESSAGE)
        except OSError as error:
            self.failed = type(error).__name__

    def read(self) -> int:
        """Take what is there; return how many bytes."""
        try:
            data = self.sock.recv(65536)
        except OSError as error:
            self.failed = type(error).__name__
            data = b""
        start = self.received % len(MESSAGE)
        assert data == _ECHO[start : start + len(data)], "not what was sent"
        self.received += len(data)
        self.ended = not data
        return len(data)

    def finish(self) -> None:
        """Say no more, and half-close."""
        self.done = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)


class Crowd:
    """Peers of one server."""

    def __init__(self, server: Subject, clients: int, window: int) -> None:
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
        """Serve who has something to read, or wait 10 ms for one; return how many bytes came."""
        size = 0
        for number, _ in self._epoll.poll(0.01):
            peer = self.peers[number]
            size += peer.read()
            if peer.ended:
                self._epoll.unregister(number)
            else:
                peer.write()
        return size


def cost(server: Subject, clients: int, messages: int) -> float:
    """Return the CPU time that a server takes for a message of 512 bytes, seconds; each client has one on its way."""
    before, size = Cpu.of(server), 0
    deadline = time.monotonic() + PATIENCE
    with Crowd(server, clients, len(MESSAGE)) as crowd:
        while size < messages * len(MESSAGE):
            assert time.monotonic() < deadline, f"{size} bytes only"
            size += crowd.turn()
        return Cpu.of(server).since(before).used * len(MESSAGE) / size


class Loss(NamedTuple):
    """What a stop lost."""

    clients: int
    """Those that did not get all of their echo."""
    size: int
    """Bytes the clients had sent, and not got back."""


def stop(server: Subject, clients: int, short: float, long: float) -> Loss:
    """Send SIGTERM under load, and return what that lost.

    Each client keeps 16 KiB on their way. Half of them half-close `short` seconds after the signal, the others `long`
    seconds, and they take the rest of their echo.
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
            assert time.monotonic() < began + PATIENCE, f"{sum(peer.ended for peer in peers)} clients have ended"
            crowd.turn()
            for peer in peers:
                if not peer.done and time.monotonic() > peer.until:
                    peer.finish()
        lost = [peer for peer in peers if not peer.whole]
        return Loss(len(lost), sum(peer.sent - peer.received for peer in lost))
