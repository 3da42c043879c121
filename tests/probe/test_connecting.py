"""Connecting: names, several addresses, connections to oneself, server names, slow handshakes, high descriptors."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import trustme

from echod.net import resolver
from echod.net.addresses import TcpAddress
from echod.net.listeners import ListenError, ListenerSpec, open_listeners
from echod.probe import arguments, connect
from echod.probe.connect import Endpoint
from echod.probe.timing import Deadline
from harness import PATIENCE, clean_environment, free_port, run, until
from namespaces import DEAD_SERVER, namespace, without_name_server
from peers import Peer, echo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from harness import Command

pytestmark = pytest.mark.once

EACH_KIND = [(), ("--half-close",), ("--count", "3"), ("--count", "3", "--rate", "100", "--half-close")]

REFUSED = re.compile("echod: .*: no connection: Connection refused(?: .errors by kind: refused 1.)?\n")


def execute(command: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command and wait for it to exit."""
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=PATIENCE, env=clean_environment()
    )


# --- a connection to itself

# A client that always connects from the port of the target.
OWN_PORT = """
import socket, sys
from echod.cli import main

class Steered(socket.socket):
    def bind(self, address):
        super().bind((address[0], int(sys.argv[2].rpartition(":")[2])))

socket.socket = Steered
sys.exit(main())
"""


@pytest.mark.parametrize("arguments", EACH_KIND)
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_connection_to_itself(host: str, arguments: tuple[str, ...]) -> None:
    """The connection counts as refused, and leaves no TIME_WAIT that would keep a server from the port."""
    port = free_port(host)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    result = execute([sys.executable, "-c", OWN_PORT, "probe", target, "--source", host], *arguments)
    assert (result.returncode, "came back" in result.stdout) == (69, False)
    assert REFUSED.fullmatch(result.stderr)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, port))


@pytest.mark.container
@pytest.mark.parametrize("port", [40000, 40001])
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_dead_port_of_the_ephemeral_range(host: str, port: int) -> None:
    """The kernel chooses the target's port for each probe, as no probe leaves it in TIME_WAIT."""
    prefix = namespace("echo 40000 40001 >/proc/sys/net/ipv4/ip_local_port_range")
    script = 'for target in "$@"; do "$PYTHON" -m echod probe $target; echo $?; done'
    targets = [f"{host}:{port} {option}" for option in ("", "--half-close", "--count 1")]
    result = execute([*prefix, "env", f"PYTHON={sys.executable}", "sh", "-c", script, "sh"], *targets)
    assert [line for line in result.stdout.splitlines() if line.isdecimal()] == ["69"] * 3
    assert result.stderr.count("no connection: Connection refused") == 3


# --- names


@pytest.mark.container
def test_a_dead_name_server(tmp_path: Path) -> None:
    """The timeout bounds the lookup, and the process exits without waiting for it."""
    command = [*without_name_server(tmp_path), sys.executable, "-m", "echod", "probe", "echo.example:7"]
    for options in ((), ("--count", "1")):
        result = execute(command, "--timeout", "0.5", "--json", *options)
        assert result.returncode == 69
        found = json.loads(result.stdout)
        assert (found["ending"], found["errors"]) == ("unreachable", {"name": 1})
        assert "no connection: the name cannot be resolved (timed out)" in result.stderr


@contextlib.contextmanager
def resolving(prefix: Sequence[str], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Yield a process of the command that waits for a name server that does not answer."""
    command = [*prefix, sys.executable, "-m", "echod", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=clean_environment()) as process:
        # As proc_net_udp(5) shows the destination: in the byte order of the machine, and the port in hexadecimal.
        there = f" {int.from_bytes(socket.inet_aton(DEAD_SERVER), sys.byteorder):08X}:0035 "
        until(lambda: there in Path(f"/proc/{process.pid}/net/udp").read_text())
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.container
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_start(tmp_path: Path, loop_name: str, number: signal.Signals) -> None:
    """A signal during the lookup stops the daemon gracefully."""
    arguments = ("--loop", loop_name, "--listen", "echo.example:7007", "--admin.address", "127.0.0.1:0")
    with resolving(without_name_server(tmp_path), *arguments) as process:
        process.send_signal(number)
        _, log = process.communicate(timeout=PATIENCE)
    events = [json.loads(line) for line in log.splitlines()]
    assert process.returncode == 0
    assert [event["event"] for event in events] == ["started", "draining", "drained", "stopped"]
    assert (events[1]["signal"], events[1]["clients"], events[2]["clients"]) == (number.name, 0, 0)


@pytest.mark.container
def test_a_signal_ends_the_lookup_of_a_probe(tmp_path: Path) -> None:
    """A signal ends a check at once, and a measurement with a report."""
    prefix = without_name_server(tmp_path)
    for options, code in (((), -signal.SIGTERM), (("--count", "1"), 128 + signal.SIGTERM)):
        with resolving(prefix, "probe", "echo.example:7", "--timeout", "1000", *options) as process:
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == code
        assert ("ended by SIGTERM" in output) == bool(options)


def answer(*hosts: str) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    """Return the result of getaddrinfo for a name with these addresses and port 7."""
    return [
        (socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 7)) for host in hosts
    ]


class Names:
    """A resolver with one answer for every name, given when `ready` is set."""

    _known = staticmethod(socket.getaddrinfo)

    def __init__(self, outcome: Callable[[], Any]) -> None:
        self.ready = threading.Event()
        self.asked = threading.Event()
        self._outcome = outcome

    def __call__(self, host: str, port: int, family: int = 0, kind: int = 0, *, flags: int = 0) -> Any:
        if flags & socket.AI_NUMERICHOST:
            return self._known(host, port, family, kind, flags=flags)
        self.asked.set()
        assert self.ready.wait(PATIENCE)
        return self._outcome()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Any]], Names]]:
    """Return a function that sets the answer of the resolver."""
    made: list[Names] = []

    def names(outcome: Callable[[], Any]) -> Names:
        made.append(Names(outcome))
        monkeypatch.setattr(socket, "getaddrinfo", made[-1])
        return made[-1]

    yield names
    for one in made:
        one.ready.set()
    for thread in threading.enumerate():
        if thread.name == "resolver":
            thread.join(PATIENCE)


def fail(error: Exception) -> Any:
    raise error


def test_resolve(names: Any) -> None:
    """Results and exceptions of the lookup's thread are passed on."""
    names(lambda: answer("192.0.2.1")).ready.set()
    assert resolver.resolve("name", 7) == answer("192.0.2.1")
    for error in (socket.gaierror(socket.EAI_FAIL, "no recovery"), UnicodeError("a label")):
        names(lambda error=error: fail(error)).ready.set()
        with pytest.raises(type(error), match=str(error.args[-1])):
            resolver.resolve("name", 7)


def test_resolve_gives_up(names: Any) -> None:
    """The wait ends at the timeout or on a stop, even if the lookup goes on."""
    names(lambda: answer("192.0.2.1"))
    with pytest.raises(socket.gaierror, match="timed out"):
        resolver.resolve("name", 7, timeout=0.05)
    asked = names(lambda: answer("192.0.2.1")).asked
    with pytest.raises(InterruptedError):
        resolver.resolve("name", 7, stopped=asked.is_set)


def test_an_address_needs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """An IP address is resolved without a thread, even one of the wrong family."""
    monkeypatch.setattr(threading, "Thread", None)
    assert resolver.resolve("127.0.0.1", 7)[0][4] == ("127.0.0.1", 7)
    assert {info[4][0] for info in resolver.resolve("", 7)} == {"127.0.0.1", "::1"}
    with pytest.raises(socket.gaierror, match="not supported"):
        resolver.resolve("::1", 7, family=socket.AF_INET)


def test_a_thread_that_cannot_start(command: Command, monkeypatch: pytest.MonkeyPatch, names: Any) -> None:
    """A limit of processes is an ordinary error of the probe and of the daemon's start."""
    names(lambda: answer("192.0.2.1"))
    monkeypatch.setattr(threading.Thread, "start", lambda _: fail(RuntimeError("can't start new thread")))
    message = (
        "the name cannot be resolved: can't start new thread: raise the process limit (ulimit -u, pids.max, "
        "TasksMax=), or free memory"
    )
    result = command("probe", "name:7")
    assert (result.returncode, result.stderr) == (69, f"echod: name:7: no connection: {message}\n")
    with pytest.raises(ListenError, match=re.escape(f"cannot listen on name:7: {message}")):
        open_listeners([ListenerSpec("x", TcpAddress("name", 7))], 1)


def test_a_start_that_is_given_up(names: Any) -> None:
    """The sockets that were already open are closed."""
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        good = chosen.getsockname()
    asked = names(lambda: answer("192.0.2.1")).asked
    wanted = [ListenerSpec("good", TcpAddress(*good)), ListenerSpec("name", TcpAddress("name", 7))]
    with pytest.raises(InterruptedError):
        open_listeners(wanted, 1, stopped=asked.is_set)
    socket.create_server(good).close()


# --- several addresses


def test_families_in_turn(names: Any) -> None:
    """The families alternate, starting with that of the first address. Each address occurs once."""
    hosts = ("2001:db8::1", "2001:db8::2", "2001:db8::1", "2001:db8::3", "192.0.2.1", "192.0.2.2")
    names(lambda: answer(*hosts)).ready.set()
    route = arguments.parse(["name:7"]).route
    assert [endpoint.sockaddr[0] for endpoint in route.endpoints(PATIENCE)] == [
        *("2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2", "2001:db8::3"),
    ]


class Attempt:
    """A socket with a connection attempt that ends at a time of a simulated clock.

    Args:
        clock: the clock.
        at: seconds from the start to the end of the attempt.
        error: the errno of the attempt, or 0 if it succeeds.

    """

    def __init__(self, clock: Clock, at: float, error: int) -> None:
        self.due, self._error = clock.now + at, error
        self.closed = False
        clock.attempts.append(self)

    def fileno(self) -> int:
        return id(self)

    def getsockopt(self, *_: int) -> int:
        return self._error

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", 40000

    def close(self) -> None:
        self.closed = True


class Clock:
    """A simulated clock and poll object. Time passes only in `poll`, up to the next event."""

    def __init__(self) -> None:
        self.now = 100.0
        self.attempts: list[Attempt] = []
        self._watched: set[int] = set()

    def time(self) -> float:
        return self.now

    def register(self, attempt: Attempt, _: int) -> None:
        self._watched.add(attempt.fileno())

    def unregister(self, descriptor: int) -> None:
        self._watched.remove(descriptor)

    def poll(self, milliseconds: float) -> list[tuple[int, int]]:
        pending = [attempt for attempt in self.attempts if attempt.fileno() in self._watched]
        self.now = min([self.now + milliseconds / 1000, *(attempt.due for attempt in pending)])
        return [(attempt.fileno(), select.POLLOUT) for attempt in pending if attempt.due <= self.now]


@pytest.fixture
def clock() -> Clock:
    return Clock()


NEVER = 1e9


def attempts(clock: Clock, *plan: tuple[float, int] | OSError) -> tuple[list[float], Callable[[], Any]]:
    """Return the start times of attempts, and a function that runs the race.

    Args:
        clock: the simulated clock.
        plan: for each endpoint, the duration and the errno of its attempt, or the error at its start.

    """
    begun: list[float] = []

    def begin(endpoint: Endpoint) -> Any:
        begun.append(clock.now - 100)
        step = plan[endpoint.sockaddr[0]]
        if isinstance(step, OSError):
            raise step
        return Attempt(clock, *step)

    endpoints = [Endpoint(socket.AF_INET, (number, 7)) for number in range(len(plan))]
    return begun, lambda: connect.race(begin, endpoints, Deadline(1, clock.time), cast("Any", clock))


def test_the_next_address_is_tried_after_a_delay(clock: Clock) -> None:
    """Attempts start 250 ms apart and overlap. Only the first connection is kept."""
    begun, race = attempts(clock, (NEVER, 0), (0.375, 0), (0.25, 0), (0, 0))
    assert race() is clock.attempts[1]
    assert begun == [0, 0.25, 0.5]
    assert clock.now == 100.625
    assert [attempt.closed for attempt in clock.attempts] == [True, False, True]


def test_the_next_address_is_tried_when_one_has_failed(clock: Clock) -> None:
    """The next attempt starts at once, whether the failed one could not start or was refused."""
    begun, race = attempts(clock, OSError(101, "no route"), (0.125, 111), (NEVER, 0), (0, 0))
    assert race() is clock.attempts[2]
    assert begun == [0, 0, 0.125, 0.375]
    assert [attempt.closed for attempt in clock.attempts] == [True, True, False]


def test_the_timeout_bounds_all_addresses(clock: Clock) -> None:
    """The number of addresses does not matter."""
    begun, race = attempts(clock, *[(NEVER, 0)] * 8)
    with pytest.raises(TimeoutError):
        race()
    assert begun == [0, 0.25, 0.5, 0.75]
    assert clock.now == 101
    assert all(attempt.closed for attempt in clock.attempts)


def test_no_address_answers(clock: Clock) -> None:
    """The error is that of the last attempt to fail."""
    begun, race = attempts(clock, (0.5, 113), (0.125, 111))
    with pytest.raises(OSError, match="No route to host"):
        race()
    assert begun == [0, 0.25]
    assert all(attempt.closed for attempt in clock.attempts)


@pytest.fixture
def hole() -> Iterator[tuple[str, int]]:
    """Return an address with a full backlog, so that the kernel drops SYNs to it."""
    with contextlib.ExitStack() as opened:
        listening = opened.enter_context(socket.socket())
        listening.bind(("127.0.0.2", 0))
        listening.listen(0)
        for _ in range(2):
            client = opened.enter_context(socket.socket())
            client.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                client.connect(listening.getsockname())
        yield listening.getsockname()


# A client with a resolver for one name: it has an address that does not answer, and one that does.
SEVERAL = """
import socket, sys
from echod.cli import main

known = socket.getaddrinfo

def look_up(host, *args, **options):
    if host == b"name" and not options["flags"] & socket.AI_NUMERICHOST:
        return [info for host in ("127.0.0.2", "127.0.0.1") for info in known(host, *args, **options)]
    return known(host, *args, **options)

socket.getaddrinfo = look_up
sys.exit(main())
"""


@pytest.mark.parametrize("options", EACH_KIND)
def test_a_dead_first_address(hole: tuple[str, int], options: tuple[str, ...]) -> None:
    """The second address is used."""
    with Peer(echo, socket.create_server(("127.0.0.1", hole[1]))):
        command = [sys.executable, "-c", SEVERAL, "probe", f"name:{hole[1]}", "--timeout", "20", "--json"]
        result = execute(command, *options)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["ending"] == "right"


def test_every_address_dead(hole: tuple[str, int]) -> None:
    with socket.create_server(("127.0.0.1", hole[1])) as listening:
        listening.close()
        result = execute([sys.executable, "-c", SEVERAL, "probe", f"name:{hole[1]}", "--timeout", "0.5"])
    assert (result.returncode, result.stderr) == (69, f"echod: name:{hole[1]}: no connection: timed out\n")


# --- the name that a certificate must contain


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", ".example.org", "a..example", "example.org..", f"{'a' * 64}.example", ".".join(["a" * 63] * 4)),
        *("a\0b", "a b", "*.example.org", "xn--\u00fc.example", "\udcff.example", "\u00fc" * 64),
        *("[example.org]x", "::1::", "https://example.org"),
    ],
)
def test_odd_server_names(command: Command, name: str) -> None:
    """A name that cannot be a host name is a usage error of the option."""
    result = command("probe", "h:1", "--tls", "--server-name", name)
    assert (result.returncode, result.stdout) == (2, "")
    message = f"argument --server-name: {name!r} is not a host name or an IP address"
    assert result.stderr.splitlines()[1] == f"echod probe: error: {message}"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ssl.SSLContext, list[str | None]]:
    """Return a CA file, the context of a server with a certificate, and a list of the SNI names it receives."""
    ca = trustme.CA()
    path = tmp_path_factory.mktemp("names") / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    names = ("localhost", "127.0.0.1", "fe80::1", "m\u00fcnchen.example")
    ca.issue_cert(*names).configure_cert(context)
    asked: list[str | None] = []
    context.sni_callback = lambda _, name, __: asked.append(name)
    return str(path), context, asked


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("localhost", "localhost"),
        ("localhost.", "localhost"),
        ("LOCALHOST", "LOCALHOST"),
        ("m\u00fcnchen.example", "xn--mnchen-3ya.example"),
        ("m\u00fcnchen.example.", "xn--mnchen-3ya.example"),
        ("127.0.0.1", None),
        ("fe80::1", None),
        ("[fe80::1%lo]", None),
    ],
)
def test_server_names(authority: tuple[str, ssl.SSLContext, list[str | None]], name: str, sent: str | None) -> None:
    """SNI has no trailing dot and no IP address (RFC 6066, section 3). The certificate is still verified."""
    ca, context, asked = authority
    asked.clear()
    with Peer(echo, tls=context) as peer:
        result = run("probe", peer.target, "--tls", "--ca", ca, "--server-name", name)
    assert (result.returncode, result.stderr) == (0, "")
    assert asked == [sent]


def test_a_trailing_dot_of_the_target(
    authority: tuple[str, ssl.SSLContext, list[str | None]], names: Any, command: Command
) -> None:
    """The resolver gets the name with its dot, TLS without it."""
    ca, context, asked = authority
    asked.clear()
    with Peer(echo, tls=context) as peer:
        port = int(peer.target.rpartition(":")[2])
        resolved = names(lambda: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))])
        resolved.ready.set()
        result = command("probe", f"localhost.:{port}", "--tls", "--ca", ca)
    assert (result.returncode, result.stderr) == (0, "")
    assert asked == ["localhost"]


# --- servers that send TLS byte by byte

# The headers of a handshake record and of a data record, each of 16 KiB.
HANDSHAKE, DATA = b"\x16\x03\x03\x40\x00", b"\x17\x03\x03\x40\x00"


def trickle(sock: socket.socket, header: bytes) -> None:
    """Send a record byte by byte, so that it takes minutes although no byte is late."""
    sock.sendall(header)
    while not select.select([sock], [], [], 0.02)[0] or sock.recv(65536):
        sock.sendall(b"x")


@pytest.mark.parametrize("options", [(), ("--count", "1")])
def test_a_handshake_that_trickles(options: tuple[str, ...]) -> None:
    """The timeout bounds the whole handshake."""
    with Peer(lambda sock: trickle(sock, HANDSHAKE)) as peer:
        result = run("probe", peer.target, "--tls", "--insecure", "--timeout", "0.5", *options)
    assert result.returncode == 69
    assert "no connection: timed out" in result.stderr


def test_an_echo_over_tls_that_trickles(authority: tuple[str, ssl.SSLContext, list[str | None]]) -> None:
    """The timeout bounds the wait for a complete record."""

    def handler(sock: socket.socket) -> None:
        with socket.socket(fileno=os.dup(sock.fileno())) as plain:
            trickle(plain, DATA)

    with Peer(handler, tls=authority[1]) as peer:
        result = run("probe", peer.target, "--tls", "--insecure", "--timeout", "0.5")
    assert (result.returncode, result.stderr) == (1, f"echod: {peer.target}: no echo: timed out\n")


# --- descriptors above those of select(2)

CROWDED = """
import os, sys
from echod.net import kernel
from echod.cli import main

kernel.raise_descriptor_limit()
while os.open(os.devnull, os.O_RDONLY) < 1100:
    pass
sys.exit(main())
"""


@pytest.mark.parametrize("options", [*EACH_KIND, ("--stream", "--duration", "0.3", "--connections", "3")])
def test_high_descriptors(options: tuple[str, ...]) -> None:
    """The client works if all descriptors below 1,024 are in use."""
    with Peer(echo) as peer:
        result = execute([sys.executable, "-c", CROWDED, "probe", peer.target], *options)
    assert (result.returncode, result.stderr) == (0, "")
