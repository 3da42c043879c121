"""Test unix sockets and inherited sockets."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from connects import Connects
from crowd import Crowd, Stuck
from echod.net.inherited import inherit
from echod.net.listeners import ListenError
from harness import PATIENCE, Daemon, clean_environment, receive, run, until
from inheriting import hand_over, refusal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness import Start


def connect(address: str, receive_buffer: int | None = None) -> socket.socket:
    """Return a client of a unix socket."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


@pytest.mark.parametrize("abstract", [False, True])
def test_unix(start: Start, tmp_path: Path, abstract: bool) -> None:
    """A unix socket echoes, half-closes and counts like TCP. The log names the client's process and user."""
    path = tmp_path / "echod.sock"
    address = f"\0{path}" if abstract else str(path)
    text = f"unix:@{path}" if abstract else f"unix:{path}"
    daemon = start(listen=text)
    assert daemon.wait_for("listening")["address"] == text
    with Crowd() as crowd:
        for seed in range(20):
            crowd.add(connect(address), 500_000 + seed, seed)
        crowd.finish()
        assert [(peer.end, peer.received, peer.wrong) for peer in crowd.peers] == [
            ("eof", peer.total, False) for peer in crowd.peers
        ]
    daemon.wait_for("client_closed", count=20)
    for line in daemon.all("client_closed"):
        assert line["peer"] == f"unix:pid={os.getpid()},uid={os.getuid()}"
        assert line["received"] == line["sent"] == line["acked"]
        assert line["reason"] == "eof"
        assert "rtt_ms" not in line
    with connect(address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        daemon.send_signal(signal.SIGTERM)
        assert client.recv(1) == b""
    assert daemon.wait() == 0
    assert daemon.receipt()["quiet"] == 1
    assert not path.exists()


def test_unix_clients_that_do_not_read(start: Start, tmp_path: Path) -> None:
    """On a unix socket, a client that does not read is paused and reset, and its bytes are counted."""
    path = tmp_path / "echod.sock"
    daemon = start("--limits.write-timeout", "1", listen=f"unix:{path}")
    with Crowd() as crowd:
        peer = crowd.add(connect(str(path), 4096), None, 1)
        crowd.pause_reading(peer)
        crowd.run(Stuck(peer, 0.3))
        assert peer.sent < 3_000_000
        line = daemon.wait_for("client_closed")
        assert (line["reason"], line["received"] > line["sent"] >= line["acked"]) == ("stalled", True)
    with connect(str(path)) as client:
        client.sendall(b"never read")
        assert client.recv(10, socket.MSG_PEEK) == b"never read"
    line = daemon.wait_for("client_closed", reason="reset")
    assert (line["received"], line["sent"], line["acked"]) == (10, 10, 0)
    assert daemon.stop() == 0


def test_cap_on_a_unix_socket(start: Start, tmp_path: Path) -> None:
    """At the cap, a client waits in the backlog and is accepted when another one leaves."""
    path = tmp_path / "echod.sock"
    daemon = start("--limits.max-connections", "1", listen=f"unix:{path}")
    with connect(str(path)) as first, connect(str(path)) as second:
        for client in (first, second):
            client.sendall(b"x")
        assert first.recv(1) == b"x"
        daemon.wait_for("accept_paused")
        first.close()
        assert second.recv(1) == b"x"
        daemon.wait_for("accept_resumed")
    assert daemon.stop() == 0


def test_mode(start: Start, tmp_path: Path) -> None:
    """The socket file has the permissions of `socket_mode` under any umask."""
    for mode in ("0600", "0666", "0660"):
        path = tmp_path / mode
        daemon = start(
            *("--listeners.x.address", f"unix:{path}", "--listeners.x.socket-mode", mode),
            listen=None,
            prepare=lambda: os.umask(0o027),
        )
        assert stat.S_IMODE(path.stat().st_mode) == int(mode, 8)
        daemon.kill()


def test_stale_socket(start: Start, tmp_path: Path) -> None:
    """The socket file of a killed process is replaced. A socket in use or a file of another kind is not."""
    path = tmp_path / "echod.sock"
    daemon = start(listen=f"unix:{path}")
    daemon.kill()
    assert path.is_socket()
    daemon = start(listen=f"unix:{path}")
    failed = run("--listen", f"unix:{path}")
    message = f"Address already in use: find the process with: ss -lxp src {path}"
    assert (failed.returncode, failed.stderr) == (69, f"echod: cannot listen on unix:{path}: {message}\n")
    with connect(str(path)) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    assert daemon.stop() == 0
    path.write_text("precious")
    failed = run("--listen", f"unix:{path}")
    message = (
        f"echod: cannot listen on unix:{path}: the file exists and is not a socket: remove it, or choose another path\n"
    )
    assert (failed.returncode, failed.stderr) == (69, message)
    assert path.read_text() == "precious"
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        failed = run("--listen", f"unix:{path}")
        assert (failed.returncode, path.is_socket()) == (69, True)
    failed = run("--listen", f"unix:{tmp_path}/missing/echod.sock")
    assert failed.returncode == 69
    assert f": No such file or directory: create the folder '{tmp_path}/missing'" in failed.stderr


def test_stale_socket_at_simultaneous_starts(loop_name: str, tmp_path: Path) -> None:
    """If several processes start together on a stale socket, one gets it, and the others exit with 69."""
    path = tmp_path / "echod.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    arguments = [sys.executable, "-m", "echod", "--loop", loop_name, "--listen", f"unix:{path}"]
    processes = [subprocess.Popen(arguments, stderr=subprocess.PIPE, env=clean_environment()) for _ in range(4)]
    try:
        until(lambda: sum(process.poll() is not None for process in processes) == 3)
        with connect(str(path)) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        assert sorted(process.poll() or 0 for process in processes) == [0, 69, 69, 69]
    finally:
        for process in processes:
            process.terminate()
            process.communicate(timeout=PATIENCE)
    assert not path.exists()


def test_lock(loop_name: str, tmp_path: Path) -> None:
    """A stale socket is not replaced while another process has its folder locked."""
    path = tmp_path / "echod.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        failed = run("--loop", loop_name, "--listen", f"unix:{path}")
    finally:
        os.close(folder)
    message = f"echod: cannot listen on unix:{path}: another process has the folder '{tmp_path}' locked\n"
    assert (failed.returncode, failed.stderr) == (69, message)
    with Daemon("--loop", loop_name, listen=f"unix:{path}"):
        connect(str(path)).close()


def test_replaced_socket_file(start: Start, tmp_path: Path) -> None:
    """A stop does not remove a file that has replaced the socket file."""
    path = tmp_path / "echod.sock"
    daemon = start(listen=f"unix:{path}")
    path.unlink()
    path.write_text("another file")
    assert daemon.stop() == 0
    assert path.read_text() == "another file"


def test_all_or_none(start: Start, tmp_path: Path) -> None:
    """If another address cannot be opened, the socket file is removed again."""
    path = tmp_path / "echod.sock"
    taken = start()
    failed = run("--listen", f"unix:{path},127.0.0.1:{taken.address[1]}")
    assert failed.returncode == 69
    assert not path.exists()


def test_second_signal(start: Start, tmp_path: Path) -> None:
    """A forced stop removes the socket file too."""
    path = tmp_path / "echod.sock"
    daemon = start(listen=f"unix:{path}")
    with connect(str(path)) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        daemon.send_signal(signal.SIGTERM)
        daemon.wait_for("draining")
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait() == 143
    assert not path.exists()


# Inherited sockets


@pytest.fixture
def parents() -> Iterator[list[socket.socket]]:
    """Yield a list for the sockets of a stand-in for systemd, and close them at the end."""
    sockets: list[socket.socket] = []
    yield sockets
    for sock in sockets:
        sock.close()


def listening(parents: list[socket.socket], family: int = socket.AF_INET) -> socket.socket:
    """Return a listening socket of the parent process."""
    sock = socket.socket(family)
    sock.bind(("127.0.0.1", 0) if family == socket.AF_INET else "")
    sock.listen(4096)
    parents.append(sock)
    return sock


def test_all_inherited_sockets(loop_name: str, parents: list[socket.socket]) -> None:
    """Without an address in the settings, every inherited socket of any family is served under its name."""
    sockets = [listening(parents), listening(parents), listening(parents, socket.AF_UNIX)]
    with hand_over(sockets, "web:web:local", loop_name=loop_name) as daemon:
        daemon.wait_for("listening", count=3)
        for sock in sockets:
            with socket.socket(sock.family) as client:
                client.settimeout(PATIENCE)
                client.connect(sock.getsockname())
                client.sendall(b"x")
                assert client.recv(1) == b"x"
        assert daemon.stop() == 0
        assert [event["listener"] for event in daemon.all("listening")] == ["web", "web", "local"]
        assert sorted(line["listener"] for line in daemon.all("client_closed")) == ["local", "web", "web"]


def test_reload_of_inherited_sockets(loop_name: str, parents: list[socket.socket], tmp_path: Path) -> None:
    """A reload applies to inherited sockets too."""
    file = tmp_path / "echo.toml"
    file.touch()
    with hand_over([listening(parents)], "web", "--config", str(file), loop_name=loop_name) as daemon:
        with socket.create_connection(parents[0].getsockname(), PATIENCE) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            file.write_text("[limits]\nidle_timeout = 0.3\n")
            daemon.send_signal(signal.SIGHUP)
            assert client.recv(1) == b""
        assert daemon.wait_for("client_closed")["reason"] == "idle"
        assert daemon.stop() == 0
        assert not daemon.all("restart_needed")


def test_inherited_sockets_by_name(loop_name: str, parents: list[socket.socket]) -> None:
    """A listener serves the socket that it names. A socket without a listener causes a warning."""
    sockets = [listening(parents), listening(parents)]
    arguments = ("--listeners.lines.address", "systemd:b", "--listeners.lines.mode", "line")
    with hand_over(sockets, "a:b", *arguments, loop_name=loop_name) as daemon:
        assert daemon.wait_for("inherited_socket_unused")["name"] == "a"
        with socket.create_connection(sockets[1].getsockname(), PATIENCE) as client:
            client.sendall(b"x\ny")
            assert receive(client, 2) == b"x\n"
        assert daemon.stop() == 0


def test_both_families_in_one_socket(loop_name: str, parents: list[socket.socket]) -> None:
    """An IPv4 client of a dual-stack socket, as systemd opens them, is logged with its IPv4 address."""
    try:
        sock = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError:
        pytest.skip("this machine has no IPv6")
    parents.append(sock)
    with hand_over([sock], "", loop_name=loop_name) as daemon:
        assert daemon.wait_for("listening")["listener"] == "unknown"
        with socket.create_connection(("127.0.0.1", sock.getsockname()[1]), PATIENCE) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        assert daemon.wait_for("client_closed")["peer"].startswith("127.0.0.1:")


def test_names_that_do_not_match(parents: list[socket.socket]) -> None:
    """An unknown or invalid name is reported, with the names that were inherited."""
    sockets = [listening(parents), listening(parents)]
    assert refusal(sockets, "a:b", "--listen", "systemd:c") == [
        "echod: cannot listen on systemd:c: no socket of that name was inherited; inherited names: a, b"
    ]
    assert refusal(sockets, "é:") == [
        "echod: inherited descriptor 3: 'é' is not a name: use printable ASCII characters except the colon",
        "echod: inherited descriptor 4: '' is not a name: use printable ASCII characters except the colon",
    ]
    assert refusal(sockets, "a") == ["echod: LISTEN_FDNAMES has 1 names for 2 sockets: a"]
    failed = run("--listen", "systemd:c")
    message = "echod: cannot listen on systemd:c: no socket of that name was inherited; inherited names: none\n"
    assert (failed.returncode, failed.stderr) == (69, message)


CALLED_ADMIN = (
    "admin.address: the admin listener is named 'admin', and so is an inherited socket: give the socket another name "
    "(FileDescriptorName=), or add an address to listen on"
)


def test_inherited_socket_named_admin(loop_name: str, parents: list[socket.socket], tmp_path: Path) -> None:
    """A start and a reload with an admin listener refuse to serve an inherited socket of the same name."""
    sockets = [listening(parents), listening(parents)]
    watched = ("--admin.address", "127.0.0.1:0")
    lines = refusal(sockets, "web:admin", "--loop", loop_name, *watched, code=78)
    assert lines == [f"echod: --admin.address: {CALLED_ADMIN}"]
    with hand_over(sockets, "web:admin", *watched, "--listen", "systemd:web", loop_name=loop_name) as daemon:
        assert daemon.wait_for("inherited_socket_unused")["name"] == "admin"
        daemon.wait_for("listening", listener="admin")
    config = tmp_path / "echo.toml"
    config.touch()
    with hand_over(sockets, "web:admin", "--config", str(config), loop_name=loop_name) as daemon:
        config.write_text('admin.address = "127.0.0.1:0"\n')
        daemon.send_signal(signal.SIGHUP)
        assert daemon.wait_for("reload_failed")["problems"] == [f"{config}:1: {CALLED_ADMIN}"]
        assert daemon.stop() == 0


def test_sockets_of_the_wrong_kind(parents: list[socket.socket], tmp_path: Path) -> None:
    """Each descriptor that is neither a listening stream socket nor a UDP socket is reported by its number and name."""
    parents += [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), socket.socket()]
    kinds = "use a stream socket or a UDP socket"
    with (tmp_path / "file").open("w") as file:
        assert refusal([*parents, file], "datagrams:deaf:file") == [
            "echod: inherited descriptor 3, 'datagrams', is an AF_UNIX socket of type SOCK_DGRAM: " + kinds,
            "echod: inherited descriptor 4, 'deaf', does not listen",
            "echod: inherited descriptor 5, 'file': Socket operation on non-socket",
        ]


def test_many_sockets_of_the_wrong_kind(loop_name: str, parents: list[socket.socket]) -> None:
    """More than three problems are one line, with their number and the first three."""
    parents += [socket.socket() for _ in range(4)]
    sockets = [*parents, listening(parents)]
    (line,) = refusal(sockets, "a:b:c:d:e", "--loop", loop_name)
    first = "; ".join(
        f"inherited descriptor {n}, '{name}', does not listen" for n, name in ((3, "a"), (4, "b"), (5, "c"))
    )
    assert line == f"echod: LISTEN_FDS is 5, and 4 of these descriptors cannot be used, first: {first}"


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables for another process are ignored, and an invalid count is an error. The variables are removed."""
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert inherit() == {}
    assert "LISTEN_FDS" not in os.environ
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "many")
    with pytest.raises(ListenError, match="LISTEN_FDS should be a number, not 'many'"):
        inherit()


def test_waiting_client_is_left_to_the_next_process(loop_name: str, parents: list[socket.socket]) -> None:
    """A stop does not accept the waiting clients of an inherited socket. The next process does."""
    sock = listening(parents)
    with contextlib.ExitStack() as clients:
        connected, waiting = (clients.enter_context(socket.socket()) for _ in range(2))
        with hand_over([sock], "web", "--limits.max-connections", "1", loop_name=loop_name) as daemon:
            for client in (connected, waiting):
                client.settimeout(PATIENCE)
                client.connect(sock.getsockname())
                client.sendall(b"x")
            assert connected.recv(1) == b"x"
            daemon.wait_for("accept_paused")
            daemon.send_signal(signal.SIGTERM)
            daemon.wait_for("draining")
            connected.shutdown(socket.SHUT_WR)
            assert connected.recv(1) == b""
            assert daemon.wait() == 0
            assert daemon.receipt()["clients"] == 1
        with hand_over([sock], "web", loop_name=loop_name) as daemon:
            assert waiting.recv(1) == b"x"


def test_backlog_waits_for_the_next_process(loop_name: str, parents: list[socket.socket]) -> None:
    """A client that connects to an inherited socket between two processes is served by the second."""
    sock = listening(parents)
    with hand_over([sock], "web", loop_name=loop_name) as daemon:
        assert daemon.stop() == 0
    with socket.create_connection(sock.getsockname(), PATIENCE) as client:
        client.sendall(b"early")
        with hand_over([sock], "web", loop_name=loop_name) as daemon:
            assert receive(client, 5) == b"early"
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
            assert daemon.stop() == 0


def test_restarts_under_load(loop_name: str, parents: list[socket.socket]) -> None:
    """During restarts on an inherited socket, no connect fails and no echo is lost."""
    sock = listening(parents)
    with Connects(sock.getsockname(), 200) as connects:
        for _ in range(RESTARTS):
            with hand_over([sock], "web", loop_name=loop_name) as daemon:
                served = connects.served
                until(lambda served=served: connects.served > served + 20)  # type: ignore[misc]
                assert daemon.stop() == 0
                receipt = daemon.receipt()
                assert (receipt["unsent_bytes"], receipt["unacked_bytes"]) == (0, 0)
        with hand_over([sock], "web", loop_name=loop_name) as daemon:
            connects.finish()
            assert daemon.stop() == 0
    assert connects.failures == []
    assert connects.served == connects.begun > 0
    sys.stdout.write(f"{RESTARTS} restarts on {loop_name}: {connects.served} clients served, none failed\n")


# `make restarts` sets a higher number.
RESTARTS = int(os.environ.get("SOAK_RESTARTS", "4"))


def test_socket_activation(loop_name: str, tmp_path: Path) -> None:
    """systemd-socket-activate starts the daemon when the first client connects."""
    if not shutil.which("systemd-socket-activate"):
        pytest.skip("systemd-socket-activate is not installed")
    path = tmp_path / "echod.sock"
    command = ["systemd-socket-activate", "--listen", str(path), "--fdname", "web"]
    command += [sys.executable, "-m", "echod", "--loop", loop_name]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=clean_environment()) as process:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(PATIENCE)
                # The socket has its file before it listens.
                until(lambda: client.connect_ex(str(path)) == 0)
                client.sendall(b"x")
                assert client.recv(1) == b"x"
            process.terminate()
            _, log = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert b'"listener":"web"' in log
    assert process.returncode == 0
