"""The real command in a subprocess, and its log as events to wait for."""

from __future__ import annotations

import contextlib
import errno
import json
import os
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

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

Event = dict[str, Any]

# The longest that any single wait may take, seconds: a bound for failures, not a duration that tests count on.
PATIENCE = 30.0

# For a stop in which no client is closed for its silence or cut off, however late a busy machine lets it speak.
UNHURRIED = ("--shutdown.quiet-period", "60", "--shutdown.drain-timeout", "60")


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without settings of echod's, and with some more variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ECHOD_")}
    return kept | dict(extra or {})


def run(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = [sys.executable, "-m", "echod", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment(env), check=False
    )


class Command(Protocol):
    """The fixture `command`."""

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]: ...


class Start(Protocol):
    """The fixture `start`."""

    def __call__(self, *arguments: str, **options: Any) -> Daemon: ...


class Daemon:
    """A running `echod serve`; its standard error is read as JSON lines.

    Args:
        arguments: of the command.
        env: more variables.
        python: options of the interpreter.
        module: what it is to run.
        prepare: called in the child before it starts.
        listen: an address, or None where the arguments say.
        pass_fds: descriptors that it inherits.
        read_log: whether the log is read; if not, `log_pipe` is its reading end.

    """

    def __init__(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        python: tuple[str, ...] = (),
        module: tuple[str, ...] = ("-m", "echod"),
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
        # Coverage costs a daemon nearly as much CPU as its start does, and finds on one loop what it finds on the other.
        self._measured = "COVERAGE_RUN" in environment and "asyncio" not in arguments
        if not self._measured:
            environment = {name: value for name, value in environment.items() if not name.startswith("COVERAGE_")}
        self.process = subprocess.Popen(
            [sys.executable, *python, *module, *listening, *arguments],
            stderr=subprocess.PIPE,
            env=environment,
            pass_fds=pass_fds,
            preexec_fn=prepare,  # noqa: PLW1509  (no threads hold locks in the children these tests make)
        )
        assert self.process.stderr is not None
        self.log_pipe = self.process.stderr
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        if read_log:
            self.start_reading()

    def start_reading(self) -> None:
        """Read the log from now on, and wait until the daemon listens."""
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
        """Tell whether the kernel has a listening socket at the daemon's (IPv4) address."""
        # With this option a socket that listens stands against another at its address, and no other does.
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(self.address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                return True
        return False

    def connect(self, timeout: float | None = PATIENCE, receive_buffer: int | None = None) -> socket.socket:
        """Return a connected client."""
        host, port = self.address
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
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
        """Be a client that sends one message, takes its echo, and closes."""
        with self.connect() as client:
            client.sendall(message)
            assert receive(client, len(message)) == message
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""

    def ledger(self) -> dict[int, Event]:
        """Return the lines of the closed connections so far, by the client's port."""
        return {int(line["peer"].rpartition(":")[2]): line for line in self.all("client_closed")}

    def receipt(self) -> Event:
        """Return the drain's receipt, having seen that it counts each client once."""
        receipt = self.wait_for("drained")
        assert receipt["clients"] == sum(receipt[part] for part in ("completed", "quiet", "cut", "aborted", "failed"))
        return receipt

    def wait_for(self, event: str, *, count: int = 1, **fields: object) -> Event:
        """Wait for the `count`th event of that name with these fields, and return it."""

        def found() -> list[Event]:
            return [line for line in self.events if line["event"] == event and fields.items() <= line.items()]

        with self._news:
            if not self._news.wait_for(lambda: len(found()) >= count or self._ended, PATIENCE) or len(found()) < count:
                message = f"no {event} {fields} in the log:\n{''.join(self.raw[-50:])}"
                raise AssertionError(message)
        return found()[count - 1]

    def all(self, event: str) -> list[Event]:
        """Return all events of that name so far."""
        return [line for line in self.events if line["event"] == event]

    def loud(self) -> list[Event]:
        """Return the events that are more than information, but for those by which asyncio's debug mode calls us slow."""
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
        until(lambda: self._state() == "T")

    def settle(self) -> None:
        """Wait until the process has done all that there is to do: it sleeps, and has used no CPU between two looks."""
        looks = [-1.0]

        def rests() -> bool:
            looks.append(self.cpu_seconds())
            return looks[-1] == looks[-2] and self._state() == "S"

        until(rests)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the end of the process and of its log; return its exit code."""
        code = self.process.wait(timeout)
        if self._reader.is_alive():
            self._reader.join(PATIENCE)
        return code

    def stop(self) -> int:
        """Send SIGTERM and wait."""
        self.send_signal()
        return self.wait()

    def end(self) -> None:
        """Make sure that nothing is left; where coverage is measured, let the daemon write its figures first."""
        if self._measured and self.process.poll() is None:
            for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGINT):  # of two that are the same, one may be lost
                self.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        self.kill()

    def kill(self) -> None:
        """Make sure that nothing is left."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        if self._reader.is_alive():
            self._reader.join(PATIENCE)
        self.log_pipe.close()

    def cpu_seconds(self) -> float:
        """Return the CPU time the process has used: of what takes long, its own part, whatever else a machine does."""
        return time.clock_gettime(~self.pid << 3 | 2)  # the kernel's name for the clock of another process

    def memory(self) -> int:
        """Return the resident memory of the process, bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _state(self) -> str:
        """Return the letter that proc(5) has for the state of the process."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

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


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that has no event: another process's state, as the kernel shows it."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def receive(sock: socket.socket, size: int) -> bytes:
    """Receive so many bytes, or those until EOF."""
    data = bytearray()
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return bytes(data)


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
