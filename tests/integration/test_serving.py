"""Listening and echoing from the client's side."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crowd import Crowd, Stuck
from echod.net.addresses import TcpAddress
from echod.net.listeners import ListenError, ListenerSpec, open_listeners
from harness import PATIENCE, Daemon, free_port, receive, reset, run

if TYPE_CHECKING:
    from harness import Start


def has_ipv6() -> bool:
    """Tell whether this machine has the address ::1."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


# The addresses of localhost on this machine, IPv4 first.
LOCALHOST = sorted(
    {
        f"[{sockaddr[0]}]" if family == socket.AF_INET6 else str(sockaddr[0])
        for family, _, _, _, sockaddr in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)
    }
)

needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def test_started(start: Start, loop_name: str) -> None:
    """The first event has version, loop and pid, the next the address."""
    daemon = start()
    started, listening = daemon.events[:2]
    assert (started["event"], started["loop"], started["pid"]) == ("started", loop_name, daemon.pid)
    assert started["python"] == ".".join(map(str, sys.version_info[:3]))
    assert re.fullmatch(r"127\.0\.0\.1:\d+", listening["address"])
    assert listening["listener"] == "127.0.0.1:0"


@needs_ipv6
@pytest.mark.parametrize(
    ("listen", "addresses"),
    [
        ("127.0.0.1:{port}", ["127.0.0.1"]),
        ("[::1]:{port}", ["[::1]"]),
        ("[::]:{port}", ["[::]"]),
        (":0", ["0.0.0.0", "[::]"]),
        ("localhost:0", LOCALHOST),
    ],
)
def test_families(start: Start, listen: str, addresses: list[str]) -> None:
    """Each form of address listens on the expected families. Port 0 takes one free port for both."""
    # In the other family, another program could have the port that the kernel chooses for one family.
    daemon = start(listen=listen.format(port=free_port()))
    daemon.wait_for("listening", count=len(addresses))
    pairs = [event["address"].rpartition(":") for event in daemon.all("listening")]
    assert [host for host, _, _ in pairs] == addresses
    (port,) = {int(port) for _, _, port in pairs}
    for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        with socket.socket(family) as client:
            client.settimeout(PATIENCE)
            served = client.connect_ex((host, port)) == 0
            assert served == any(("." in address) == (family == socket.AF_INET) for address in addresses)
            if served:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
    assert daemon.stop() == 0
    peers = {line["peer"].rpartition(":")[0] for line in daemon.all("client_closed")}
    assert peers <= {"127.0.0.1", "[::1]"}  # never an IPv4 address mapped to IPv6


def test_several_listeners(start: Start) -> None:
    """Listeners from `listen` and from tables are all served, each under its own name."""
    daemon = start("--listen", "127.0.0.1:0", "--listeners.lab.address", "127.0.0.1:0", listen=None)
    daemon.wait_for("listening", count=2)
    for event in daemon.all("listening"):
        with socket.create_connection(("127.0.0.1", int(event["address"].rpartition(":")[2])), PATIENCE) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
    assert daemon.stop() == 0
    assert sorted(line["listener"] for line in daemon.all("client_closed")) == ["127.0.0.1:0", "lab"]


def test_half_close(start: Start) -> None:
    """A client that half-closes gets all of its echo, then EOF."""
    daemon = start()
    with daemon.connect() as client:
        client.sendall(b"first ")
        client.sendall(b"and last")
        client.shutdown(socket.SHUT_WR)
        assert receive(client, 100) == b"first and last"
    assert daemon.wait_for("client_closed")["reason"] == "eof"


def test_reset(start: Start) -> None:
    """A client's reset is a normal reason, without an error or a traceback."""
    daemon = start()
    with daemon.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        reset(client)
    assert daemon.wait_for("client_closed")["reason"] == "reset"
    assert {event["level"] for event in daemon.events} == {"info"}


def test_fault(start: Start) -> None:
    """A message equal to the trigger raises in that client's session, which closes it and no other client."""
    daemon = start(
        *("--faults.boom.trigger", "boom\r\n", "--faults.boom.action", "raise"),
        *("--listeners.lab.address", "127.0.0.1:0", "--listeners.lab.fault", "boom"),
        listen=None,
    )
    with daemon.connect() as victim, daemon.connect() as other:
        for client in (victim, other):
            client.sendall(b"not boom\r\n")
            assert receive(client, 10) == b"not boom\r\n"
        victim.sendall(b"boom\r\n")
        assert victim.recv(1) == b""
        victim.close()
        failed = daemon.wait_for("client_failed")
        other.sendall(b"still here")
        assert receive(other, 10) == b"still here"
    closed = daemon.wait_for("client_closed", reason="fault")
    assert failed["peer"] == closed["peer"]
    assert failed["level"] == "error"
    assert "Traceback" in failed["exception"]
    assert "fault 'boom'" in failed["exception"]
    assert (closed["received"], closed["acked"]) == (16, 10)
    daemon.wait_for("client_closed", reason="eof")
    assert not daemon.all("loop_error")


def test_bug_in_a_session(loop_name: str) -> None:
    """A defect in a session closes its client with one event and its traceback. Other clients are still served."""
    patch = """
from echod.connection.echo import EchoSession
echo = EchoSession.data_received
def data_received(self, data):
    if data == b"bug":
        raise KeyError("a bug")
    echo(self, data)
EchoSession.data_received = data_received
"""
    with patched_daemon(patch, loop_name) as daemon:
        with daemon.connect() as victim, daemon.connect() as other:
            victim.sendall(b"bug")
            assert daemon.wait_for("client_closed")["reason"] == "failed"
            other.sendall(b"x")
            assert other.recv(1) == b"x"
        assert daemon.stop() == 0
        (failed,) = daemon.all("client_failed")
        assert "KeyError: 'a bug'" in failed["exception"]
        assert not daemon.all("loop_error")
        assert "\nTraceback" not in "".join(daemon.raw)


@pytest.mark.parametrize("method", ["pause_writing", "resume_writing"])
def test_bug_in_flow_control(loop_name: str, method: str) -> None:
    """An exception in flow control, which the loops only report, closes the client too, so that it does not hang."""
    patch = f"""
from echod.connection.echo import EchoSession
def broken(self):
    raise KeyError("a bug")
EchoSession.{method} = broken
"""
    with patched_daemon(patch, loop_name) as daemon, Crowd() as crowd:
        peer = crowd.add(daemon.connect(receive_buffer=4096), None, 1)
        crowd.pause_reading(peer)
        crowd.run(Stuck(peer))
        crowd.pause_reading(peer, reading=True)
        crowd.finish()
        assert "KeyError: 'a bug'" in daemon.wait_for("client_failed")["exception"]
        assert daemon.wait_for("client_closed")["reason"] == "failed"
        assert daemon.stop() == 0
        assert len(daemon.all("client_failed")) == 1


def test_bug_in_a_callback(loop_name: str) -> None:
    """An exception that only the loop reports is logged."""
    patch = """
from echod.server.server import Server
start = Server.start
def broken(self):
    start(self)
    self._loop.call_soon(lambda: 1 / 0)
Server.start = broken
"""
    with patched_daemon(patch, loop_name) as daemon:
        error = daemon.wait_for("loop_error")
        assert "ZeroDivisionError" in error["exception"]
        daemon.echo(b"still served")


def test_unexpected_failure(loop_name: str) -> None:
    """An unexpected failure is logged with its traceback, and the exit code is 1."""
    patch = """
from echod.daemon import daemon
def totals(*_):
    raise RuntimeError("unforeseen")
daemon.totals = totals
"""
    with patched_daemon(patch, loop_name) as daemon:
        assert daemon.stop() == 1
        crashed = daemon.wait_for("crashed")
        assert (crashed["level"], "unforeseen" in crashed["exception"]) == ("error", True)


def patched_daemon(patch: str, loop_name: str) -> Daemon:
    """Start a daemon with a defect."""
    main = "import sys; from echod.cli import main; sys.exit(main())"
    return Daemon("--loop", loop_name, module=("-c", f"{patch}\n{main}"))


def test_connections_inherit_socket_options() -> None:
    """Accepted connections have TCP_NODELAY and keepalive, on both loops."""
    (listener,) = open_listeners([ListenerSpec("x", TcpAddress("127.0.0.1", 0))], 10)
    listening = listener.sockets[0].sock
    with listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


def resolved(*sockaddrs: tuple[int, str]) -> list[tuple[int, int, int, str, tuple[object, ...]]]:
    """Return these addresses in the form of getaddrinfo."""
    return [
        (family, socket.SOCK_STREAM, 6, "", (host, 0, 0, 0) if family == socket.AF_INET6 else (host, 0))
        for family, host in sockaddrs
    ]


def test_host_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with an IPv6 address that this host does not have is served on its other addresses."""
    answer = resolved((socket.AF_INET6, "2001:db8::1"), (socket.AF_INET, "127.0.0.1"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    (listener,) = open_listeners([ListenerSpec("x", TcpAddress("name", 0))], 10)
    (listening,) = listener.sockets
    with listening.sock as sock:
        assert sock.getsockname()[0] == "127.0.0.1"


def test_other_missing_addresses_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """An IPv4 address that this host does not have is an error, and no socket stays open."""
    answer = resolved((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "192.0.2.1"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    with pytest.raises(ListenError, match=r"cannot listen on name:0: Cannot assign requested address"):
        open_listeners([ListenerSpec("x", TcpAddress("name", 0))], 10)


def test_all_or_none() -> None:
    """If one address cannot be opened, all others are closed again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        good, bad = ("127.0.0.1", free_port()), taken.getsockname()
        with pytest.raises(ListenError, match="Address already in use"):
            open_listeners([ListenerSpec("good", TcpAddress(*good)), ListenerSpec("bad", TcpAddress(*bad))], 10)
        socket.create_server(good).close()


def test_port_taken_in_the_other_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a free port of one family is taken in the next, another one is tried. A fixed port is an error."""
    answer = resolved((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.0.0.2"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    bind = socket.socket.bind
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.2", port))
        taken.listen()
        tries = []

        class Steered(socket.socket):
            def bind(self, address: tuple[str, int]) -> None:  # type: ignore[override]
                host, requested = address
                tries.append(requested)
                bind(self, (host, port if len(tries) == 1 else requested))

        monkeypatch.setattr(socket, "socket", Steered)
        (listener,) = open_listeners([ListenerSpec("x", TcpAddress("name", 0))], 10)
        ports = {listening.sock.getsockname()[1] for listening in listener.sockets}
        for listening in listener.sockets:
            listening.close()
        assert len(ports) == 1
        assert port not in ports
        # The kernel may choose ports that are taken by other sockets, too.
        assert tries[:3] == [0, port, 0]
        with pytest.raises(ListenError, match="Address already in use"):
            open_listeners([ListenerSpec("x", TcpAddress("name", port))], 10)


CLIENTS = {
    "telnet": "(sleep .5; printf 'x\\r\\n'; sleep .5) | telnet {host} {port}",
    "ncat": "printf 'x\\r\\n' | ncat {host} {port}",
    "nc": "printf 'x\\r\\n' | nc -N {host} {port}",
    "socat": "printf 'x\\r\\n' | socat -t5 - TCP:{host}:{port}",
    "bash": "exec 3<>/dev/tcp/{host}/{port}; printf 'x\\r\\n' >&3; head -n 1 <&3",
}


@pytest.mark.parametrize("name", CLIENTS)
def test_real_clients(start: Start, name: str) -> None:
    """Common command-line clients get their echo."""
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    daemon = start()
    host, port = daemon.address
    command = CLIENTS[name].format(host=host, port=port)
    result = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert b"x\r\n" in result.stdout
    # telnet sends CR as CR NUL (RFC 854), before any LF.
    assert daemon.wait_for("client_closed")["received"] == (5 if name == "telnet" else 3)


def test_python_m_and_script() -> None:
    """The installed script and `python -m echod` run the same command."""
    script = Path(sys.executable).with_name("echod")
    by_script = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert by_script.stdout == run("--version").stdout
