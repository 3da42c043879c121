"""Run a simulation: one daemon, its clients, and the operator."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import ssl
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from harness import Daemon
from scenario import HOST, toml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from certificates import Certificates
    from client import Client
    from harness import Event
    from scenario import Listener, Scenario

# The longest wait for anything, in seconds. It bounds failures; no scenario depends on its length.
PATIENCE = 60.0

# A turn of the clients' loop without an event, in seconds.
_TURN = 0.01

# Turns without an event, and without CPU time of the daemon, until it counts as idle.
_IDLE_TURNS = 2

# The longest barrier that may end early, in turns: a client may send endlessly.
_TURNS = 400

_RESULTS = frozenset({"reloaded", "reload_failed", "reload_ignored"})


class ViolationError(Exception):
    """An invariant does not hold. Its text begins with the invariant's name and a colon."""

    @property
    def invariant(self) -> str:
        """The name of the invariant."""
        return str(self).partition(":")[0]


class Identity:
    """The certificates of a test run: two of the server, one of the clients.

    Args:
        certificates: those of the test run.

    """

    def __init__(self, certificates: Certificates) -> None:
        self.certificates = certificates
        self.servers = [
            (certificates.certificate, certificates.key),
            certificates.issue("other", "localhost", "127.0.0.1"),
        ]
        self.ders = [ssl.PEM_cert_to_DER_cert(path.read_text()) for path, _ in self.servers]
        self.context = cache(certificates.context)


class World:
    """A running simulation.

    Args:
        scenario: its configuration.
        folder: for its files; its name must be short enough for a unix socket.
        identity: the certificates.
        module: runs the command, as options of the interpreter.
        patience: the longest wait for anything, in seconds.

    """

    def __init__(
        self, scenario: Scenario, folder: Path, identity: Identity, module: tuple[str, ...], patience: float = PATIENCE
    ) -> None:
        self._patience = patience
        self.scenario = scenario
        self.folder = folder
        self.identity = identity
        self.listeners = {listener.name: listener for listener in scenario.listeners}
        self.settings = scenario.settings(folder)
        self.clients: dict[int, Client] = {}
        self.sums = Counter[str]()
        """The figures of lines that are forgotten."""
        self.frozen = False
        self.stopping = False
        self.forced = False
        self.exit_code: int | None = None
        self.broken_reloads = 0
        self.certificates = [0]
        """The index of the server's certificate, at the start and after each swap."""
        self._hang_up_is_due = False
        self._logs: list[_LogFile] = []
        self._forgotten = 0
        self._selector = selectors.DefaultSelector()
        self._registered: dict[Client, int] = {}
        self._install_certificate()
        shutil.copy(identity.certificates.ca, folder / "ca.pem")
        self.write_settings()
        self.daemon = Daemon("--config", str(folder / "echod.toml"), module=module, listen=None)

    def __enter__(self) -> Self:
        """Wait until the daemon is idle."""
        try:
            listening = (self.daemon.wait_for("listening", listener=name) for name in self.listeners)
            self._addresses = {event["listener"]: event["address"] for event in listening}
            self.serve(lambda: False, or_idle=True)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.resources = self._count_resources()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self.clients.values():
            client.sock.close()
        self._selector.close()
        self.daemon.end()
        for log in self._logs:
            log.close()

    # Clients

    def connect(self, number: int, listener: Listener, receive_buffer: int | None) -> socket.socket | None:
        """Return a connected socket with an address of its own, or None if the daemon has stopped listening."""
        if self.exit_code is not None:
            return None
        sock = socket.socket(socket.AF_UNIX if listener.unix else socket.AF_INET)
        sock.settimeout(self._patience)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            if listener.unix:
                sock.bind(f"\0simulation-{os.getpid()}-{id(self)}-{number}")
                sock.connect(str(self.folder / listener.name))
            else:
                # Not the port but the address tells clients apart: the kernel gives a port to several.
                sock.bind((f"127.{1 + number // 250 // 250}.{number // 250 % 250}.{1 + number % 250}", 0))
                sock.connect((HOST, int(self._addresses[listener.name].rpartition(":")[2])))
        except (ConnectionError, FileNotFoundError):
            sock.close()
            if not self.stopping:
                raise
            return None
        return sock

    def add(self, client: Client) -> None:
        """Serve another client."""
        client.oldest_certificate = len(self.certificates) - 1
        self.clients[client.number] = client

    def open(self, number: int) -> list[Client]:
        """Return the client with a number, or nothing if it does not exist or has ended."""
        client = self.clients.get(number)
        return [client] if client is not None and not client.end else []

    def expires(self, client: Client) -> bool:
        """Tell whether a timeout ends a client that does nothing."""
        running = not (self.frozen or self.stopping)
        return running and "idle_timeout" in self.scenario.limits and client.finishing is None and not client.endless

    def serve(self, done: Callable[[], bool], awaited: str = "the end of a client", *, or_idle: bool = False) -> None:
        """Serve the clients until a condition holds.

        Args:
            done: the condition.
            awaited: its name in the report of a failure.
            or_idle: whether to return also when nothing moves any more: not this process, nor the daemon.

        Raises:
            ViolationError: the condition does not hold after a long time.

        """
        deadline = time.monotonic() + self._patience
        idle = turns = 0
        used = -1.0
        while not done():
            if time.monotonic() > deadline:
                waiting = [f"{client.number} at {client.listener.name}" for client in self._unfinished()]
                msg = f"stuck: {awaited} did not come; open clients: {waiting}"
                raise ViolationError(msg)
            self._watch()
            ready = self._selector.select(_TURN)
            for key, events in ready:
                key.data.handle(events)
            if or_idle:
                turns += 1
                before, used = used, self._cpu_seconds()
                idle = idle + 1 if not ready and used == before else 0
                if idle == _IDLE_TURNS or turns == _TURNS:
                    return

    def _cpu_seconds(self) -> float:
        """Return the CPU time of the daemon, or the time if it is about to run."""
        try:
            state = Path(f"/proc/{self.daemon.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return time.monotonic() if state == "R" else self.daemon.cpu_seconds()
        except OSError:  # it has ended
            return 0.0

    def _watch(self) -> None:
        """Register each client for the events that it waits for."""
        changed = [client for client in self.clients.values() if self._registered.get(client, 0) != client.events]
        for client in changed:  # first, as a new client may have the descriptor of a closed one
            if self._registered.pop(client, 0):
                self._selector.unregister(client.sock)
        for client in changed:
            if client.events:
                self._selector.register(client.sock, client.events, client)
                self._registered[client] = client.events

    def _unfinished(self) -> Iterator[Client]:
        return (client for client in self.clients.values() if not client.end)

    # The operator

    def write_settings(self) -> None:
        """Write the settings file."""
        (self.folder / "echod.toml").write_text(toml(self.settings))

    def hang_up(self, *, breaks: bool = False) -> None:
        """Send SIGHUP, and wait for the result if the daemon is running."""
        if self.exit_code is not None:
            return
        before = self._results()
        self.broken_reloads += breaks
        self.daemon.send_signal(signal.SIGHUP)
        if self.frozen:
            self._hang_up_is_due = True
        else:
            self.serve(lambda: self._results() > before or self._has_exited(), "the result of a reload")

    def _results(self) -> int:
        return sum(event["event"] in _RESULTS for event in self.events())

    def swap_certificate(self) -> None:
        """Replace the files of the server's certificate."""
        self.certificates.append(1 - self.certificates[-1])
        self._install_certificate()

    def _install_certificate(self) -> None:
        for source, name in zip(
            self.identity.servers[self.certificates[-1]], ("server.pem", "server.key"), strict=True
        ):
            shutil.copy(source, self.folder / name)

    def rotate_log(self) -> None:
        """Rename the log file, and let the daemon open a new one.

        Raises:
            ViolationError: it does not write to it.

        """
        path = self.folder / "echod.log"
        if path.exists():
            path.rename(path.with_suffix(".old"))
        self.settings["log"]["file"] = str(path)
        self.write_settings()
        path.touch()
        self._logs.append(_LogFile(path))
        self.hang_up()
        if not self._logs[-1].read():
            msg = "log: the result of the reload is not in the new file"
            raise ViolationError(msg)

    def freeze(self) -> None:
        """Stop the process."""
        if not self.frozen and not self._has_exited():
            self.daemon.send_signal(signal.SIGSTOP)
            self.serve(lambda: self._has_exited() or self._is_stopped())
            self.frozen = True

    def _is_stopped(self) -> bool:
        return Path(f"/proc/{self.daemon.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def resume(self) -> None:
        """Continue the process, and wait for the results of signals that it got meanwhile."""
        if not self.frozen:
            return
        self.frozen = False
        before = self._results()
        self.daemon.send_signal(signal.SIGCONT)
        if self._hang_up_is_due:
            self._hang_up_is_due = False
            self.serve(lambda: self._results() > before or self._has_exited(), "the result of a reload")
        if self.stopping:
            self._await_draining()

    def calm(self) -> None:
        """Let every client finish, and compare the daemon's resources with those of the start.

        Raises:
            ViolationError: they differ.

        """
        if self.stopping:
            return
        self.resume()
        for client in self._unfinished():
            self._end(client)
        self.serve(lambda: not any(self._unfinished()))
        if self.scenario.connections == "all":
            self.serve(lambda: len(self.lines()) >= len(self.clients), "the line of each client")
        deadline = time.monotonic() + self._patience / 4
        while (now := self._count_resources()) != self.resources:
            if time.monotonic() > deadline:
                msg = f"leak: descriptors and threads at rest {self.resources} at the start, {now} now"
                raise ViolationError(msg)
            self.serve(lambda: False, or_idle=True)

    def _end(self, client: Client) -> None:
        """Let a client end the connection, gracefully if that ends it."""
        fault = client.listener.fault
        if client.misbehaves or fault == "stalling":
            client.leave(by_reset=True)
        else:
            client.finish("notify_fin")

    def _count_resources(self) -> tuple[int, int]:
        """Return the numbers of descriptors and threads. uvloop opens /dev/null at its first close, and keeps it."""
        process = Path(f"/proc/{self.daemon.pid}")
        names = Counter[str]()
        for link in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                names[str(link.readlink())] += 1
        return names.total() - names["/dev/null"], len(list((process / "task").iterdir()))

    def terminate(self, number: int) -> None:
        """Send a signal to stop. Only the first has an effect here: `conclude` sends the second one."""
        if self.stopping:
            return
        self.stopping = True
        self.daemon.send_signal(number)
        if not self.frozen:
            self._await_draining()

    def _await_draining(self) -> None:
        self.serve(
            lambda: self._has_exited() or any(event["event"] == "draining" for event in self.events()), "the drain"
        )

    def conclude(self) -> None:
        """End the clients and the daemon, each if it is not at its end."""
        self.resume()
        stop = self.scenario.stop
        if stop == "unhurried":
            self.calm()
        self.terminate(signal.SIGTERM)
        if stop == "forced" and not self._has_exited():
            self.forced = True
            self.daemon.send_signal(signal.SIGINT)
        for client in self._unfinished():
            if stop == "unhurried" or client.misbehaves:
                self._end(client)
            elif stop != "short":
                client.reading = True
        if stop == "short":
            self.serve(self._has_exited, "the end of the daemon")
            for client in self._unfinished():
                client.reading = True
        self.serve(lambda: not any(self._unfinished()))
        self.serve(self._has_exited, "the end of the daemon")
        self.exit_code = self.daemon.wait()

    def _has_exited(self) -> bool:
        return self.daemon.process.poll() is not None

    # The log

    def events(self) -> list[Event]:
        """Return all events so far, in the order of their times, except forgotten ones."""
        events = self.daemon.events[self._forgotten :]
        for log in self._logs:
            events += log.read()
        return sorted(events, key=lambda event: str(event["timestamp"])) if self._logs else events

    def forget(self) -> None:
        """Forget the clients and the events so far, except for their sums. Every client must have ended."""
        self._watch()
        self.sums += sums(self.lines())
        self._forgotten = len(self.daemon.events)
        self.clients.clear()
        self.broken_reloads = 0
        del self.certificates[:-1]
        for log in self._logs[:-1]:
            log.close()
        del self._logs[:-1]
        for log in self._logs:
            log.forget()

    def lines(self) -> list[Event]:
        """Return the lines of connections so far."""
        return [event for event in self.events() if event["event"] == "client_closed"]


def sums(lines: Iterable[Event]) -> Counter[str]:
    """Return the totals that lines of connections give."""
    totals = Counter[str]()
    for line in lines:
        totals["connections"] += 1
        totals["empty"] += not line["received"]
        for name in ("received", "sent", "acked", "discarded_bytes"):
            totals[name] += line[name]
        if "fault" in line:
            totals[f"fault {line['fault']}"] += 1
    return totals


class _LogFile:
    """A log file that the daemon appends to. It stays the same file when it is renamed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open()
        self._rest = ""
        self._events: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """Return all its events so far."""
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        self._events += map(json.loads, lines)
        return self._events

    def forget(self) -> None:
        """Return only later events from now on."""
        self._events = []

    def close(self) -> None:
        self._file.close()
