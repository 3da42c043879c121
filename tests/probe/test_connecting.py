"""How a client connects: to names, to several addresses of one, never to itself, and whatever its descriptors are."""

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
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from echod.net import resolver
from echod.net.addresses import TcpAddress
from echod.net.listeners import ListenError, ListenerSpec, open_listeners
from echod.probe import command, connect
from echod.probe.connect import Endpoint
from harness import PATIENCE, clean_environment, run, until
from namespaces import DEAD_SERVER, namespace, without_name_server
from peers import Peer, echo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from harness import Command

pytestmark = pytest.mark.once

EACH_KIND = [(), ("--half-close",), ("--count", "3"), ("--count", "3", "--rate", "100", "--half-close")]

REFUSED = re.compile("echod: .*: no connection: Connection refused(?: .errors by kind: refused 1.)?\n")


def execute(command: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=PATIENCE, env=clean_environment()
    )


# --- a connection to itself

# A client that has no port but the target's to connect from.
OWN_PORT = """
import socket, sys
from echod.cli import main

class Steered(socket.socket):
    def bind(self, address):
        super().bind((address[0], int(sys.argv[2].rpartition(":")[2])))

socket.socket = Steered
sys.exit(main())
"""


def dead_port(host: str) -> int:
    """Return a port on which no server listens."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("arguments", EACH_KIND)
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_connection_to_itself(host: str, arguments: tuple[str, ...]) -> None:
    """It is refused, as no server listens, and leaves no TIME_WAIT in the way of a server that starts then."""
    port = dead_port(host)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    result = execute([sys.executable, "-c", OWN_PORT, "probe", target, "--source", host], *arguments)
    assert (result.returncode, "came back" in result.stdout) == (69, False)
    assert REFUSED.fullmatch(result.stderr)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, port))


@pytest.mark.container
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_dead_port_of_the_ephemeral_range(host: str) -> None:
    """The kernel chooses it, and so does every later probe, since none leaves it in TIME_WAIT."""
    prefix = namespace("echo 40000 40001 >/proc/sys/net/ipv4/ip_local_port_range")
    script = 'for target in "$@"; do "$PYTHON" -m echod probe $target; echo $?; done'
    targets = [f"{host}:{port} {option}" for port in (40000, 40001) for option in ("", "--half-close", "--count 1")]
    result = execute([*prefix, "env", f"PYTHON={sys.executable}", "sh", "-c", script, "sh"], *targets)
    assert [line for line in result.stdout.splitlines() if line.isdecimal()] == ["69"] * 6
    assert result.stderr.count("no connection: Connection refused") == 6


# --- names


@pytest.mark.container
def test_a_dead_name_server(tmp_path: Path) -> None:
    """The timeout bounds the lookup, and the process does not wait for it at its exit."""
    command = [*without_name_server(tmp_path), sys.executable, "-m", "echod", "probe", "echo.example:7"]
    for options in ((), ("--count", "1")):
        result = execute(command, "--timeout", "0.5", "--json", *options)
        assert result.returncode == 69
        found = json.loads(result.stdout)
        assert (found["ending"], found["errors"]) == ("unreachable", {"name": 1})
        assert "no connection: the name cannot be resolved (timed out)" in result.stderr


@contextlib.contextmanager
def resolving(prefix: Sequence[str], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Give a process of the command that waits for the dead name server's answer."""
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
    """While a name is resolved: the stop is a graceful one that has nothing to drain."""
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
    """Of a check at once, and of a measurement with its report."""
    prefix = without_name_server(tmp_path)
    for options, code in (((), -signal.SIGTERM), (("--count", "1"), 128 + signal.SIGTERM)):
        with resolving(prefix, "probe", "echo.example:7", "--timeout", "1000", *options) as process:
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == code
        assert ("ended by SIGTERM" in output) == bool(options)


def answer(*hosts: str) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    """Return the answer of getaddrinfo for a name with these addresses, port 7."""
    return [
        (socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 7)) for host in hosts
    ]


class Names:
    """A resolver that has one answer for every name; it gives it when `ready` is set."""

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
    """Addresses and failures come out of the thread as they are."""
    names(lambda: answer("192.0.2.1")).ready.set()
    assert resolver.resolve("name", 7) == answer("192.0.2.1")
    for error in (socket.gaierror(socket.EAI_FAIL, "no recovery"), UnicodeError("a label")):
        names(lambda error=error: fail(error)).ready.set()
        with pytest.raises(type(error), match=str(error.args[-1])):
            resolver.resolve("name", 7)


def test_resolve_gives_up(names: Any) -> None:
    """At the timeout, or when the caller is to stop: whatever the lookup does."""
    names(lambda: answer("192.0.2.1"))
    with pytest.raises(socket.gaierror, match="timed out"):
        resolver.resolve("name", 7, timeout=0.05)
    asked = names(lambda: answer("192.0.2.1")).asked
    with pytest.raises(InterruptedError):
        resolver.resolve("name", 7, stopped=asked.is_set)


def test_an_address_needs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one of the other family."""
    monkeypatch.setattr(threading, "Thread", None)
    assert resolver.resolve("127.0.0.1", 7)[0][4] == ("127.0.0.1", 7)
    assert {info[4][0] for info in resolver.resolve("", 7)} == {"127.0.0.1", "::1"}
    with pytest.raises(socket.gaierror, match="not supported"):
        resolver.resolve("::1", 7, family=socket.AF_INET)


def test_a_thread_that_cannot_start(command: Command, monkeypatch: pytest.MonkeyPatch, names: Any) -> None:
    """As at a limit of processes: an error like any other, in the probe and at the daemon's start."""
    names(lambda: answer("192.0.2.1"))
    monkeypatch.setattr(threading.Thread, "start", lambda _: fail(RuntimeError("can't start new thread")))
    message = (
        "the name cannot be resolved: can't start new thread: raise the limit of processes (ulimit -u, pids.max, "
        "TasksMax=), or free memory"
    )
    result = command("probe", "name:7")
    assert (result.returncode, result.stderr) == (69, f"echod: name:7: no connection: {message}\n")
    with pytest.raises(ListenError, match=re.escape(f"cannot listen on name:7: {message}")):
        open_listeners([ListenerSpec("x", TcpAddress("name", 7))], 1)


def test_a_start_that_is_given_up(names: Any) -> None:
    """All sockets are closed that were open by then."""
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        good = chosen.getsockname()
    asked = names(lambda: answer("192.0.2.1")).asked
    wanted = [ListenerSpec("good", TcpAddress(*good)), ListenerSpec("name", TcpAddress("name", 7))]
    with pytest.raises(InterruptedError):
        open_listeners(wanted, 1, stopped=asked.is_set)
    socket.create_server(good).close()


# --- several addresses


def test_families_in_turn(names: Any) -> None:
    """Each address once, both families in turn, beginning with the one that the resolver puts first."""
    hosts = ("2001:db8::1", "2001:db8::2", "2001:db8::1", "2001:db8::3", "192.0.2.1", "192.0.2.2")
    names(lambda: answer(*hosts)).ready.set()
    route = command.parse(["name:7"]).route
    assert [endpoint.sockaddr[0] for endpoint in route.endpoints(PATIENCE)] == [
        *("2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2", "2001:db8::3"),
    ]


class Attempt:
    """A socket that connects, or not, at some time of a clock.

    Args:
        clock: the one.
        at: seconds after its beginning at which it is done.
        error: with which; 0: it is connected.

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
    """A time that passes only in poll, until something is due."""

    def __init__(self) -> None:
        self.now = 100.0
        self.attempts: list[Attempt] = []
        self._watched: set[int] = set()

    def perf_counter(self) -> float:
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
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(connect, "time", clock)
    monkeypatch.setattr(select, "poll", lambda: clock)
    return clock


NEVER = 1e9


def attempts(clock: Clock, *plan: tuple[float, int] | OSError) -> tuple[list[float], Callable[[], Any]]:
    """Return when each attempt began, and a function that connects by a plan: when, and with which error."""
    begun: list[float] = []

    def begin(endpoint: Endpoint) -> Any:
        begun.append(clock.now - 100)
        step = plan[endpoint.sockaddr[0]]
        if isinstance(step, OSError):
            raise step
        return Attempt(clock, *step)

    endpoints = [Endpoint(socket.AF_INET, (number, 7)) for number in range(len(plan))]
    return begun, lambda: connect._race(begin, endpoints, 101.0)


def test_the_next_address_is_tried_after_a_delay(clock: Clock) -> None:
    """Of 250 ms, while the ones before are still waited for; the first connection is kept, and no other."""
    begun, race = attempts(clock, (NEVER, 0), (0.375, 0), (0.25, 0), (0, 0))
    assert race() is clock.attempts[1]
    assert begun == [0, 0.25, 0.5]
    assert clock.now == 100.625
    assert [attempt.closed for attempt in clock.attempts] == [True, False, True]


def test_the_next_address_is_tried_when_one_has_failed(clock: Clock) -> None:
    """At once: both where the attempt cannot begin and where it is refused."""
    begun, race = attempts(clock, OSError(101, "no route"), (0.125, 111), (NEVER, 0), (0, 0))
    assert race() is clock.attempts[2]
    assert begun == [0, 0, 0.125, 0.375]
    assert [attempt.closed for attempt in clock.attempts] == [True, True, False]


def test_the_timeout_bounds_all_addresses(clock: Clock) -> None:
    """However many there are."""
    begun, race = attempts(clock, *[(NEVER, 0)] * 8)
    with pytest.raises(TimeoutError):
        race()
    assert begun == [0, 0.25, 0.5, 0.75]
    assert clock.now == 101
    assert all(attempt.closed for attempt in clock.attempts)


def test_no_address_answers(clock: Clock) -> None:
    """The error is that of the last one that failed."""
    begun, race = attempts(clock, (0.5, 113), (0.125, 111))
    with pytest.raises(OSError, match="No route to host"):
        race()
    assert begun == [0, 0.25]
    assert all(attempt.closed for attempt in clock.attempts)


@pytest.fixture
def hole() -> Iterator[tuple[str, int]]:
    """Return an address whose SYNs are dropped, as its backlog is full."""
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


# A resolver that knows one name: an address where nothing answers, and one where a server does.
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
    """It takes a quarter of a second, and not the timeout."""
    with Peer(echo, socket.create_server(("127.0.0.1", hole[1]))):
        command = [sys.executable, "-c", SEVERAL, "probe", f"name:{hole[1]}", "--timeout", "20", "--json"]
        result = execute(command, *options)
    assert (result.returncode, result.stderr) == (0, "")
    assert 0.25 <= json.loads(result.stdout)["connect_seconds"] < 20


def test_every_address_dead(hole: tuple[str, int]) -> None:
    with socket.create_server(("127.0.0.1", hole[1])) as listening:
        listening.close()
        result = execute([sys.executable, "-c", SEVERAL, "probe", f"name:{hole[1]}", "--timeout", "0.5"])
    assert (result.returncode, result.stderr) == (69, f"echod: name:{hole[1]}: no connection: timed out\n")


# --- the name that a certificate has to hold


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", ".example.org", "a..example", "example.org..", f"{'a' * 64}.example", ".".join(["a" * 63] * 4)),
        *("a\0b", "a b", "*.example.org", "xn--\u00fc.example", "\udcff.example", "\u00fc" * 64),
        *("[example.org]x", "::1::", "https://example.org"),
    ],
)
def test_odd_server_names(command: Command, name: str) -> None:
    """A usage error, in the words of the option."""
    result = command("probe", "h:1", "--tls", "--server-name", name)
    assert (result.returncode, result.stdout) == (2, "")
    message = f"argument --server-name: {name!r} is not a host name or an IP address"
    assert result.stderr.splitlines()[1] == f"echod probe: error: {message}"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ssl.SSLContext, list[str | None]]:
    """Return the file of an authority, the context of a server with its certificate, and the names it is asked for."""
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
    """A trailing dot and a zone are not part of it; an IP address is compared, and not sent (RFC 6066, section 3)."""
    ca, context, asked = authority
    asked.clear()
    with Peer(echo, tls=context) as peer:
        result = run("probe", peer.target, "--tls", "--ca", ca, "--server-name", name)
    assert (result.returncode, result.stderr) == (0, "")
    assert asked == [sent]


def test_a_trailing_dot_of_the_target(
    authority: tuple[str, ssl.SSLContext, list[str | None]], names: Any, command: Command
) -> None:
    """It is for the resolver, which takes the name as it is; TLS gets the name without it."""
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

# The beginning of a handshake record and of one with data, each of 16 KiB.
HANDSHAKE, DATA = b"\x16\x03\x03\x40\x00", b"\x17\x03\x03\x40\x00"


def trickle(sock: socket.socket, header: bytes) -> None:
    """Send a record that takes minutes to arrive, each byte long before any timeout."""
    sock.sendall(header)
    while not select.select([sock], [], [], 0.02)[0] or sock.recv(65536):
        sock.sendall(b"x")


@pytest.mark.parametrize("options", [(), ("--count", "1")])
def test_a_handshake_that_trickles(options: tuple[str, ...]) -> None:
    """The timeout is of all of it."""
    with Peer(lambda sock: trickle(sock, HANDSHAKE)) as peer:
        result = run("probe", peer.target, "--tls", "--insecure", "--timeout", "0.5", *options)
    assert result.returncode == 69
    assert "no connection: timed out" in result.stderr


def test_an_echo_over_tls_that_trickles(authority: tuple[str, ssl.SSLContext, list[str | None]]) -> None:
    """Of a record that is not complete, nothing is known."""

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
    """Those below 1,024 are all in use."""
    with Peer(echo) as peer:
        result = execute([sys.executable, "-c", CROWDED, "probe", peer.target], *options)
    assert (result.returncode, result.stderr) == (0, "")
