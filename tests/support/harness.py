"""Run the real command in a subprocess, and wait for the events in its log."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import forking
from forking import ForkedProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

Event = dict[str, Any]

# The longest wait for a single event, in seconds. It bounds failures; no test depends on its length.
PATIENCE = 30.0

# The command, as options of the interpreter.
COMMAND = ("-m", "echod")

# The address of clients of `Daemon.echo`.
ECHO_ADDRESS = "127.0.0.2"

# Options for a stop in which no client is closed as quiet or cut off, even on a busy machine.
UNHURRIED = ("--shutdown.quiet-period", "60", "--shutdown.drain-timeout", "60")


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of this process without settings of echod and of colours, plus extra variables."""
    colors = {"NO_COLOR", "FORCE_COLOR"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ECHOD_") and name not in colors}
    return kept | dict(extra or {})


def can_fork(env: Mapping[str, str] | None) -> bool:
    """Return whether a fork can replace a new interpreter, which reads these extra variables at its start."""
    return not any(name.startswith("PYTHON") for name in env or ())


def run(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command and wait for it to exit."""
    environment = clean_environment(env)
    if can_fork(env):
        return forking.run(arguments, environment, PATIENCE)
    command = [sys.executable, *COMMAND, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False)


class Command(Protocol):
    """The fixture `command`."""

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]: ...


class Start(Protocol):
    """The fixture `start`."""

    def __call__(self, *arguments: str, **options: Any) -> Daemon: ...


class Daemon:
    """A running `echod serve` process, with its standard error read as JSON lines.

    Args:
        arguments: arguments of the command.
        env: extra environment variables.
        python: options of the interpreter.
        module: the module or code to run, as options of the interpreter.
        prepare: called in the child process before it executes the interpreter.
        listen: an address, or None if the arguments contain one.
        pass_fds: descriptors that the process inherits.
        read_log: whether to read the log. If not, read it from `log_pipe`.

    """

    def __init__(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        python: tuple[str, ...] = (),
        module: tuple[str, ...] = COMMAND,
        prepare: Callable[[], None] | None = None,
        listen: str | None = "127.0.0.1:0",
        pass_fds: Sequence[int] = (),
        read_log: bool = True,
    ) -> None:
        self._news = threading.Condition()
        self.events: list[Event] = []
        self.raw: list[str] = []
        listening = ("--listen", listen) if listen else ()
        environment = clean_environment(env)
        # Coverage nearly doubles the CPU time of a start, and both loops cover the same lines.
        self._measured = "COVERAGE_RUN" in environment and "asyncio" not in arguments
        if not self._measured:
            environment = {name: value for name, value in environment.items() if not name.startswith("COVERAGE_")}
        self.process: ForkedProcess | subprocess.Popen[bytes]
        reading, writing = os.pipe()
        self.log_pipe = os.fdopen(reading, "rb")
        try:
            if can_fork(env) and not python and module == COMMAND and prepare is None:
                self.process = ForkedProcess([*listening, *arguments], environment, (1, writing), pass_fds)
            else:
                self.process = subprocess.Popen(
                    [sys.executable, *python, *module, *listening, *arguments],
                    stderr=writing,
                    env=environment,
                    pass_fds=pass_fds,
                    preexec_fn=prepare,  # noqa: PLW1509  (no thread of a test holds a lock that the child needs)
                )
        finally:
            os.close(writing)
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        if read_log:
            self.start_reading()

    def start_reading(self) -> None:
        """Start reading the log, and wait until the daemon listens."""
        self._reader.start()
        try:
            self.wait_for("listening")
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        if error is not None:
            sys.stderr.write("".join(self.raw[-30:]))

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def address(self) -> tuple[str, int]:
        """Return the first listening address."""
        host, _, port = self.wait_for("listening")["address"].rpartition(":")
        return host.strip("[]"), int(port)

    def listens(self) -> bool:
        """Return whether the kernel has a listening socket at the daemon's IPv4 address."""
        # With SO_REUSEADDR, bind(2) fails only if another socket is listening at the address.
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(self.address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                return True
        return False

    def connect(
        self, timeout: float | None = PATIENCE, receive_buffer: int | None = None, source: str = ""
    ) -> socket.socket:
        """Return a connected client."""
        host, port = self.address
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if source:
            sock.bind((source, 0))
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(timeout)
        try:
            sock.connect((host, port))
        except OSError:
            sock.close()
            raise
        return sock

    def echo(self, message: bytes) -> None:
        """Connect, send a message, receive its echo, and close."""
        # The kernel may give this client the port of a peer that is closed, so it has another address.
        source = ECHO_ADDRESS if self.address[0].startswith("127.") else ""
        with self.connect(source=source) as client:
            client.sendall(message)
            assert receive(client, len(message)) == message
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""

    def ledger(self) -> dict[int, Event]:
        """Return the `client_closed` events so far by the client's port, except those of `echo`."""
        lines = [line for line in self.all("client_closed") if not line["peer"].startswith(ECHO_ADDRESS)]
        ledger = {int(line["peer"].rpartition(":")[2]): line for line in lines}
        assert len(ledger) == len(lines), "a port was used twice"
        return ledger

    def receipt(self) -> Event:
        """Return the receipt of the drain, after checking that it counts each client once."""
        receipt = self.wait_for("drained")
        assert receipt["clients"] == sum(receipt[part] for part in ("completed", "quiet", "cut", "aborted", "failed"))
        return receipt

    def wait_for(self, event: str, *, count: int = 1, **fields: object) -> Event:
        """Wait for the `count`th event with this name and these fields, and return it."""

        def found() -> list[Event]:
            return [line for line in self.events if line["event"] == event and fields.items() <= line.items()]

        with self._news:
            if not self._news.wait_for(lambda: len(found()) >= count or self._ended, PATIENCE) or len(found()) < count:
                message = f"no {event} {fields} in the log:\n{''.join(self.raw[-50:])}"
                raise AssertionError(message)
        return found()[count - 1]

    def all(self, event: str) -> list[Event]:
        """Return all events with this name so far."""
        return [line for line in self.events if line["event"] == event]

    def loud(self) -> list[Event]:
        """Return the events above level info, except asyncio's reports of slow callbacks in debug mode."""
        return [
            event
            for event in self.events
            if event["level"] != "info"
            and not (event.get("logger") == "asyncio" and re.match("Executing .* took", event["event"]))
        ]

    def send_signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def freeze(self) -> None:
        """Send SIGSTOP, and wait until the process has stopped."""
        self.send_signal(signal.SIGSTOP)
        until(lambda: self._states() == {"T"})

    def settle(self) -> None:
        """Wait until the process is idle: all its threads sleep, and have used no CPU time since the previous check."""
        used = [-1.0]

        def is_idle() -> bool:
            used.append(self.cpu_seconds())
            return used[-1] == used[-2] and self._states() == {"S"}

        until(is_idle)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait until the process has exited and its log is read. Return the exit code."""
        code = self.process.wait(timeout)
        if self._reader.is_alive():
            self._reader.join(PATIENCE)
        return code

    def stop(self) -> int:
        """Send SIGTERM, wait, and return the exit code."""
        self.send_signal()
        return self.wait()

    def end(self) -> None:
        """Terminate the process. If its coverage is measured, let it write its data first."""
        if self._measured and self.process.poll() is None:
            for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGINT):  # two equal signals may be merged
                self.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
        self.kill()

    def kill(self) -> None:
        """Kill the process, and release its resources."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        if self._reader.is_alive():
            self._reader.join(PATIENCE)
        self.log_pipe.close()

    def cpu_seconds(self) -> float:
        """Return the CPU time that the process has used, which does not depend on other load of the machine."""
        return time.clock_gettime(~self.pid << 3 | 2)  # the CPU clock of another process, as in clock_getcpuclockid(3)

    def memory(self) -> int:
        """Return the resident memory of the process in bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _states(self) -> set[str]:
        """Return the states of the threads as letters, as in proc(5)."""
        states = set()
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                states.add((thread / "stat").read_text().rpartition(")")[2].split()[0])
        return states

    def _read(self) -> None:
        for line in self.log_pipe:
            text = line.decode()
            with self._news:
                self.raw.append(text)
                with contextlib.suppress(json.JSONDecodeError):
                    self.events.append(json.loads(text))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that no socket uses. The kernel gives it to no other socket, as it chooses from higher ports."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock, contextlib.suppress(OSError):
            sock.bind((host, random.SystemRandom().randrange(10_000, lowest)))
            return int(sock.getsockname()[1])


def until(condition: Callable[[], bool]) -> None:
    """Poll until the condition holds. Use it only for the state of another process, which sends no event."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not become true within {PATIENCE} s"
        time.sleep(0.01)


def receive(sock: socket.socket, size: int) -> bytes:
    """Receive `size` bytes, or fewer if EOF comes first."""
    data = bytearray()
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return bytes(data)


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
