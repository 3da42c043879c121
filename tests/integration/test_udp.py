"""UDP echo: addresses, sizes, flows, the ledger, reports and reloads."""

from __future__ import annotations

import signal
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from harness import free_port, run
from inheriting import hand_over, refusal
from udp_clients import AT_ONCE, UNLIMITED, ask, client, flow, name, udp_address
from watching import WATCHED, get, status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness import Command, Start
    from loading import Write

# Of asm-generic/socket.h.
SO_TIMESTAMP = 29

LOOPBACK = "udp:127.0.0.1:0"


@pytest.fixture
def owned() -> Iterator[ExitStack]:
    """Yield a stack that closes the sockets of the test."""
    with ExitStack() as stack:
        yield stack


def test_sizes(start: Start, owned: ExitStack) -> None:
    """Every datagram comes back as it is, from none to 65,507 bytes, and the ledger has its bytes."""
    daemon = start(*AT_ONCE, listen=LOOPBACK)
    sizes = (0, 1, 1472, 1473, 65_507, 0)
    sock = owned.enter_context(client(udp_address(daemon)))
    for size in sizes:
        data = (bytes(range(256)) * 256)[:size]
        assert ask(sock, data) == data
    assert daemon.stop() == 0
    line = flow(daemon, sock)
    assert (line["received_datagrams"], line["received"], line["sent"]) == (len(sizes), sum(sizes), sum(sizes))
    assert (line["refused"], line["dropped"], line["reason"]) == (0, 0, "quiet")
    assert line["local"] == "{}:{}".format(*udp_address(daemon))
    stopped = daemon.wait_for("stopped")
    assert (stopped["flows"], stopped["datagrams_received"], stopped["datagrams_sent"]) == (1, len(sizes), len(sizes))
    assert daemon.loud() == []


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "::1"])
def test_answer_comes_from_the_address_that_was_asked(start: Start, owned: ExitStack, host: str) -> None:
    """A listener on all addresses answers from the one that was asked. The client's kernel would drop other answers."""
    daemon = start(*AT_ONCE, listen="udp::0")
    _, port = udp_address(daemon)
    assert udp_address(daemon, 2) == ("::", port)
    sock = owned.enter_context(client((host, port)))
    for size in (3, 0, 65_507):
        assert ask(sock, b"y" * size) == b"y" * size
    assert daemon.stop() == 0
    assert flow(daemon, sock)["local"] == (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def test_flows(start: Start, owned: ExitStack) -> None:
    """Each peer has a flow, and so has each address that it asks. A flow ends when it is silent, and begins again."""
    daemon = start("--limits.flow-timeout", "0.1", "--limits.datagram-rate", "0", listen="udp:0.0.0.0:0")
    _, port = udp_address(daemon)
    sock = owned.enter_context(socket.socket(type=socket.SOCK_DGRAM))
    sock.settimeout(30)
    sock.bind(("127.0.0.1", 0))
    for host in ("127.0.0.1", "127.0.0.2", "127.0.0.1"):
        sock.sendto(b"x", (host, port))
        assert sock.recvfrom(10) == (b"x", (host, port))
    lines = [flow(daemon, sock, local=f"{host}:{port}", reason="idle") for host in ("127.0.0.1", "127.0.0.2")]
    assert lines[1]["received_datagrams"] == 1
    before = len(daemon.all("flow_closed"))
    sock.sendto(b"x", ("127.0.0.1", port))
    assert sock.recv(10) == b"x"
    daemon.wait_for("flow_closed", count=before + 1)
    assert daemon.stop() == 0
    assert sum(line["received_datagrams"] for line in daemon.all("flow_closed")) == 4


def test_flood_of_sources(start: Start, owned: ExitStack) -> None:
    """10,000 sources leave no more than `max_flows` flows. Each source was answered, and a client in use stays."""
    daemon = start("--limits.max-flows", "100", "--log.connections", "failed", *AT_ONCE, listen="udp:0.0.0.0:0")
    _, port = udp_address(daemon)
    regular = owned.enter_context(client(("127.0.0.1", port)))
    for number in range(10_000):
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.settimeout(30)
            sock.bind((f"127.1.{number >> 8}.{number & 255}", 0))
            sock.sendto(b"x", ("127.0.0.1", port))
            assert sock.recv(1) == b"x"
        if number % 50 == 0:
            assert ask(regular, b"r") == b"r"
    daemon.send_signal()
    assert daemon.wait_for("draining")["flows"] == 100
    assert daemon.wait() == 0
    stopped = daemon.wait_for("stopped")
    assert (stopped["flows"], stopped["datagrams_received"], stopped["datagrams_sent"]) == (10_001, 10_200, 10_200)
    assert daemon.wait_for("drained")["flows"] == 100


def test_kernel_drops(start: Start, owned: ExitStack) -> None:
    """Datagrams that the kernel drops, because a stopped process does not read, are counted."""
    daemon = start(*UNLIMITED, *AT_ONCE, listen=LOOPBACK)
    sock = owned.enter_context(client(udp_address(daemon)))
    assert ask(sock, b"x") == b"x"
    daemon.freeze()
    for _ in range(20_000):
        sock.send(b"x" * 500)
    daemon.send_signal(signal.SIGCONT)
    daemon.settle()
    assert daemon.stop() == 0
    stopped = daemon.wait_for("stopped")
    assert stopped["kernel_drops"] > 0
    assert stopped["datagrams_received"] + stopped["kernel_drops"] == 20_001


def test_reports(start: Start, owned: ExitStack) -> None:
    """Status and metrics have flows, datagrams, refusals and drops of UDP listeners, apart from those of streams."""
    listeners = (
        *("--listeners.tcp.address", "127.0.0.1:0", "--listeners.udp.address", LOOPBACK, "--listeners.udp.fault", "x"),
        *("--faults.x.trigger", "drop", "--faults.x.action", "drop", "--listeners.udp.allow", "127.0.0.1"),
    )
    daemon = start(*WATCHED, *listeners, *AT_ONCE, listen=None)
    address = udp_address(daemon, listener="udp")
    sock, stranger = owned.enter_context(client(address)), owned.enter_context(client(address, "127.0.0.2"))
    stranger.send(b"x")
    sock.send(b"drop")
    assert ask(sock, b"abc") == b"abc"
    daemon.wait_for("datagrams_refused", cause="network", peer=name(stranger), datagrams=1)
    report = status(daemon)
    assert [one["name"] for one in report["listeners"]] == ["tcp"]
    (seen,) = report["udp_listeners"]
    assert seen == {
        "name": "udp",
        "addresses": ["udp:{}:{}".format(*address)],
        "fault": "x",
        "max_flows": 10_000,
        "flows": 1,
        "flows_so_far": 1,
        "received_datagrams": 2,
        "received": 7,
        "sent_datagrams": 1,
        "sent": 3,
        "refused": {"network": 1},
        "dropped": {"fault": 1},
        "kernel_drops": 0,
        "closed": {},
    }
    text = get(daemon, "/metrics").body.decode()
    for line in (
        'echod_datagrams_received_total{listener="udp"} 2.0',
        'echod_datagrams_sent_total{listener="udp"} 1.0',
        'echod_datagrams_refused_total{cause="network",listener="udp"} 1.0',
        'echod_datagrams_refused_total{cause="rate",listener="udp"} 0.0',
        'echod_datagrams_dropped_total{cause="fault",listener="udp"} 1.0',
        'echod_flows_active{listener="udp"} 1.0',
        'echod_datagram_received_bytes_total{listener="udp"} 7.0',
    ):
        assert line in text.splitlines()
    assert daemon.stop() == 0
    assert flow(daemon, sock)["fault"] == "x"
    assert daemon.wait_for("stopped")["faults"] == {"x": 1}


def test_status_during_a_stop(start: Start, owned: ExitStack) -> None:
    """The status shows the time that is left to a UDP listener's stop."""
    daemon = start(*WATCHED, "--shutdown.delay", "60", listen=LOOPBACK)
    sock = owned.enter_context(client(udp_address(daemon)))
    daemon.send_signal()
    daemon.wait_for("draining")
    assert ask(sock, b"x") == b"x"
    stop = status(daemon)["stop"]
    assert 0 < stop["accepting_seconds_left"] <= 60 < stop["seconds_left"] <= 67
    daemon.send_signal()
    assert daemon.wait() == 128 + signal.SIGTERM


def test_reload(start: Start, write: Write, owned: ExitStack) -> None:
    """A reload keeps the socket and the flows, and applies other networks, limits and levels at once."""
    config = '[listeners.a]\naddress = "udp:127.0.0.1:0"\n'
    daemon = start("--config", write(config), *AT_ONCE, listen=None)
    address = udp_address(daemon)
    stays, goes = (owned.enter_context(client(address, host)) for host in ("127.0.0.1", "127.0.0.2"))
    for sock in (stays, goes):
        assert ask(sock, b"x") == b"x"
    write(f'{config}allow = ["127.0.0.1"]\n')
    daemon.send_signal(signal.SIGHUP)
    assert daemon.wait_for("reloaded")["changed"] == ["listeners.a.allow"]
    assert flow(daemon, goes)["reason"] == "refused"
    goes.send(b"x")
    daemon.wait_for("datagrams_refused", cause="network")
    assert ask(stays, b"y") == b"y"
    write('[listeners.b]\naddress = "127.0.0.1:0"\n')
    daemon.send_signal(signal.SIGHUP)
    assert daemon.wait_for("restart_needed")["settings"] == ["listeners.a", "listeners.b"]
    assert ask(stays, b"z") == b"z"
    assert daemon.stop() == 0
    assert flow(daemon, stays)["received_datagrams"] == 3


def test_warning(command: Command, start: Start, write: Write) -> None:
    """`check` and the start warn of a listener that answers everyone. Networks or loopback are the remedy."""
    text = command("check", "--listen", "udp::9").stderr
    assert text == (
        "echod: warning: listen: udp_open_reflector: udp::9 answers everyone, and the source address of a datagram may be "
        "forged: set allow in a table [listeners.NAME], or listen on loopback\n"
    )
    for address in ("udp:localhost:9", "udp:[::1]:9", "udp:127.0.0.9:9", ":9"):
        assert command("check", "--listen", address).stderr == ""
    table = '[listeners.a]\naddress = "udp:example.org:9"\n'
    assert command("check", "--config", write(table)).stderr.startswith(
        "echod: warning: listeners.a: udp_open_reflector"
    )
    assert command("check", "--config", write(f'{table}allow = "192.0.2.0/24"\n')).stderr == ""
    daemon = start(listen="udp::0")
    daemon.wait_for("udp_open_reflector", listener="udp::0", address="udp::0")


def test_inherited(loop_name: str, owned: ExitStack) -> None:
    """Stream and UDP sockets share a port and a name. Without an address in the settings, all of them are served."""
    stream, datagram = owned.enter_context(socket.socket()), owned.enter_context(socket.socket(type=socket.SOCK_DGRAM))
    address = "127.0.0.1", free_port()
    for sock in (stream, datagram):
        sock.bind(address)
    stream.listen()
    with hand_over([stream, datagram], "echo:echo", *AT_ONCE, loop_name=loop_name) as daemon:
        daemon.wait_for("listening", listener="udp:echo", address=f"udp:127.0.0.1:{address[1]}")
        daemon.echo(b"stream")
        peer = owned.enter_context(client(address))
        assert ask(peer, b"datagram") == b"datagram"
        assert daemon.stop() == 0
        assert flow(daemon, peer)["reason"] == "handed_over"
        daemon.wait_for("udp_open_reflector", listener="udp:echo", address="udp:systemd:echo")
    with hand_over([stream, datagram], "echo:echo", "--listen", "systemd:echo", loop_name=loop_name) as daemon:
        assert daemon.wait_for("inherited_socket_unused")["address"] == "udp:systemd:echo"
        daemon.echo(b"stream")
        assert daemon.stop() == 0
    advice = "sockets: write"
    for given, sockets, found in (("udp:", [stream], "stream"), ("", [datagram], "UDP")):
        wanted, other = ("UDP", "systemd:echo") if given else ("stream", "udp:systemd:echo")
        assert refusal(sockets, "echo", "--listen", f"{given}systemd:echo") == [
            f"echod: cannot listen on {given}systemd:echo: no {wanted} socket of that name was inherited, only {found} {advice} {other} for these"
        ]


def test_inherited_socket_of_both_families(loop_name: str, owned: ExitStack) -> None:
    """An inherited IPv6 socket may serve IPv4 too. Both answers come from the address that was asked."""
    sock = owned.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMP, 1)  # as Timestamping= in the unit: one more control message
    sock.bind(("::", 0))
    port = sock.getsockname()[1]
    with hand_over([sock], "echo", *AT_ONCE, loop_name=loop_name) as daemon:
        for host in ("127.0.0.7", "::1"):
            peer = owned.enter_context(client((host, port)))
            for _ in range(3):
                assert ask(peer, b"x") == b"x"
        broadcast = owned.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        broadcast.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        broadcast.bind(("127.0.0.1", 0))
        broadcast.sendto(b"x", ("127.255.255.255", port))
        daemon.wait_for("datagrams_refused", cause="multicast", peer=name(broadcast))
        assert daemon.stop() == 0
        assert sorted(line["peer"].rpartition(":")[0] for line in daemon.all("flow_closed")) == ["127.0.0.1", "[::1]"]


def test_errors(command: Command, owned: ExitStack, tmp_path: Path) -> None:
    """An address in use, a missing one and settings that do not fit UDP are explained."""
    taken = owned.enter_context(socket.socket(type=socket.SOCK_DGRAM))
    taken.bind(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    refused = run("serve", "--listen", f"udp:127.0.0.1:{port}")
    assert refused.returncode == 69
    assert (
        f"udp:127.0.0.1:{port}: Address already in use: find the process with: ss -lunp 'sport = :{port}'"
        in refused.stderr
    )
    missing = run("serve", "--listen", "udp:192.0.2.1:9")
    assert "`ip address` lists its own, and udp::9 means all" in missing.stderr
    config = tmp_path / "echo.toml"
    config.write_text(
        '[listeners.a]\naddress = "udp:127.0.0.1:1"\nmode = "line"\nproxy_protocol = "require"\nsocket_mode = "0600"\n'
        'fault = "f"\ntls = {certificate = "c", private_key = "k"}\n[faults.f]\naction = "reset"\nslice = 1\n'
        '[listeners.b]\naddress = ":1"\nrefuse_ports = "7"\nfault = "g"\n'
        '[faults.g]\naction = "drop"\ndelay = 1\njitter = 1\nreorder = true\n'
        '[listeners.c]\naddress = "unix:x"\nallow = "127.0.0.1"\n'
        '[listeners.d]\naddress = "udp:127.0.0.1:1"\nrefuse_ports = ["7-x", "70000", "9-2", 7]\n'
        "[faults.h]\nprobability = 0.9\nburst = 2\naction = 'drop'\n"
        "[faults.i]\nburst = 2\naction = 'drop'\nreorder = true\n"
        '[admin]\naddress = "udp:127.0.0.1:1"\n'
    )
    found = command("check", "--config", str(config)).stderr
    for problem in (
        "listeners.a.mode: 'line' needs a stream",
        "listeners.a.proxy_protocol: has no effect on UDP",
        "listeners.a.socket_mode: has no effect on this address",
        "listeners.a.tls: needs a stream, and echod has no DTLS",
        "listeners.a.fault: has action = 'reset', which needs a connection",
        "listeners.a.fault: has slice, which divides a stream",
        "listeners.b.refuse_ports: has no effect on this address",
        "listeners.b.fault: has action = 'drop', and a stream has no datagrams to lose",
        "listeners.b.fault: has reorder, and a stream keeps its order",
        "listeners.c.allow: has no effect on a unix socket",
        "listeners.d.refuse_ports[0]: '7-x' is not a port or a range of ports",
        "listeners.d.refuse_ports[1]: '70000' is not a port or a range of ports",
        "listeners.d.refuse_ports[2]: '9-2' is an empty range: write 2-9",
        "faults.h.burst: is too short for probability = 0.9: set it to at least 9",
        "faults.i.burst: has no effect without a probability below 1",
        "faults.i.reorder: has no effect without jitter",
        "admin.address: 'udp:127.0.0.1:1': the admin listener serves HTTP over TCP, not UDP",
    ):
        assert problem in found
    assert "refuse_ports[3]" not in found


def test_figures_for_the_service_manager(start: Start, owned: ExitStack, tmp_path: Path) -> None:
    """The status for systemd has the number of flows, and the receipt that of the datagrams."""
    manager = owned.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    manager.settimeout(30)
    manager.bind(str(tmp_path / "notify"))
    daemon = start(*AT_ONCE, listen=LOOPBACK, env={"NOTIFY_SOCKET": str(tmp_path / "notify")})
    sock = owned.enter_context(client(udp_address(daemon)))
    assert ask(sock, b"x") == b"x"
    assert manager.recv(4096).startswith(b"READY=1\nSTATUS=Serving: 0 clients and 0 flows now")
    daemon.send_signal()
    assert b"STATUS=Draining: 0 clients and 1 flow now" in manager.recv(4096)
    assert daemon.wait() == 0
