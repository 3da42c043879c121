"""Test the reasons and the advice for addresses that cannot be opened."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING

import pytest

from echod.net import addresses, listen_errors, listeners
from echod.net.listen_errors import explain
from echod.net.listeners import ListenError, ListenerSpec, ListeningSocket, open_listeners
from harness import PATIENCE, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.fixture
def ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file in place of the kernel's lowest unprivileged port."""
    path = tmp_path / "ip_unprivileged_port_start"
    path.write_text("1024\n")
    monkeypatch.setattr(listen_errors, "UNPRIVILEGED_PORTS", path)
    return path


@pytest.mark.parametrize(
    ("address", "number", "advice"),
    [
        (":80", errno.EADDRINUSE, "find the process with: ss -ltnp 'sport = :80'"),
        ("unix:/run/a b", errno.EADDRINUSE, "find the process with: ss -lxp src '/run/a b'"),
        ("unix:@name", errno.EADDRINUSE, "find the process with: ss -lxp src @name"),
        ("h:0", errno.EADDRINUSE, ""),
        (
            "h:7",
            errno.EADDRNOTAVAIL,
            "this host does not have the address; `ip address` lists its own, and :7 means all",
        ),
        ("h:1024", errno.EACCES, ""),
        ("unix:/run/x/y", errno.ENOENT, "create the folder '/run/x'"),
        ("unix:x/y", errno.ENOTDIR, "'x' is not a folder"),
        ("unix:y", errno.EACCES, "the user of the daemon needs permission to read and write the folder '.'"),
        ("unix:/run/y", errno.EROFS, ""),
        ("systemd:x", errno.EINVAL, ""),
    ],
)
@pytest.mark.usefixtures("ports")
def test_advice(address: str, number: int, advice: str) -> None:
    """The system's reason comes first, and advice follows if there is any."""
    text = os.strerror(number) + (f": {advice}" if advice else "")
    assert explain(error(number), addresses.parse(address), ()) == text


def test_privileged_ports(ports: Path) -> None:
    """A port that needs a capability is told from one that a security module refuses. The limit is the kernel's."""
    http, https = addresses.parse(":80"), addresses.parse(":443")
    text = explain(error(errno.EACCES), http, ())
    assert text.startswith("Permission denied: ports below 1024 need CAP_NET_BIND_SERVICE: set AmbientCapabilities= ")
    assert text.endswith(" docker run -p 80:8000")
    ports.write_text("100\n")
    assert "ports below 100 " in explain(error(errno.EACCES), http, ())
    assert explain(error(errno.EACCES), https, ()) == "Permission denied"
    ports.unlink()
    assert "ports below 1024 " in explain(error(errno.EACCES), https, ())


def problems(*listeners: tuple[str, str], inherited: dict[str, list[socket.socket]] | None = None) -> list[str]:
    specs = [ListenerSpec(name, addresses.parse(address)) for name, address in listeners]
    with pytest.raises(ListenError) as caught:
        open_listeners(specs, 10, inherited)
    return caught.value.problems


@pytest.fixture
def port() -> int:
    """Return a free port."""
    return free_port()


@pytest.fixture
def inherited() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def test_own_listener_has_the_port(port: int) -> None:
    """Each address that another listener of the configuration has names that listener."""
    first = ("first", f"127.0.0.1:{port}")
    own = "Address already in use: the listener 'first' already uses it; choose another address"
    assert problems(first, ("all", f":{port}"), ("v4", f"0.0.0.0:{port}"), ("name", f"localhost:{port}")) == [
        f"cannot listen on {address}:{port}: {own}" for address in ("", "0.0.0.0", "localhost")
    ]


@pytest.mark.parametrize("host", ["127.0.0.2", "[::1]"])
def test_other_hosts_are_not_the_reason(port: int, host: str) -> None:
    """A listener with the same port of another IP address is not named."""
    family = socket.AF_INET6 if host == "[::1]" else socket.AF_INET
    with socket.create_server((host.strip("[]"), port), family=family):
        (problem,) = problems(("first", f"127.0.0.1:{port}"), ("second", f"{host}:{port}"))
    assert problem == (
        f"cannot listen on {host}:{port}: Address already in use: find the process with: ss -ltnp 'sport = :{port}'"
    )


def test_a_later_listener_has_the_port(port: int) -> None:
    """All listeners that are open already are considered, not only the first."""
    address = f"127.0.0.1:{port}"
    (problem,) = problems(("first", "127.0.0.1:0"), ("second", address), ("third", address))
    own = "Address already in use: the listener 'second' already uses it; choose another address"
    assert problem == f"cannot listen on {address}: {own}"


def test_no_memory_for_an_accepted_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor of the connection is closed, so the client gets an end and not silence."""

    def refuse(*_: object) -> None:
        raise MemoryError

    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(listening.getsockname(), PATIENCE))
        own = ListeningSocket(listening)
        stack.enter_context(monkeypatch.context()).setattr(listeners, "_Connection", refuse)
        with pytest.raises(MemoryError):
            own.accept()
        assert client.recv(1) == b""


def test_own_unix_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another spelling of the path is recognized. A socket of another type is not a reason."""
    monkeypatch.chdir(tmp_path)
    listeners = [("a", "unix:s"), ("tcp", "127.0.0.1:0"), ("b", f"unix:{tmp_path}/s"), ("c", "unix:@echod-test/a")]
    in_use = "Address already in use: the listener"
    assert problems(*listeners, ("d", "unix:@echod-test/a")) == [
        f"cannot listen on unix:{tmp_path}/s: {in_use} 'a' already uses it; choose another address",
        f"cannot listen on unix:@echod-test/a: {in_use} 'c' already uses it; choose another address",
    ]


def test_inherited_socket_has_the_port(inherited: socket.socket) -> None:
    """An inherited socket is named, whether a listener uses it or not."""
    address = f"127.0.0.1:{inherited.getsockname()[1]}"
    (problem,) = problems(("a", address), inherited={"web": [inherited]})
    own = "Address already in use: the inherited socket 'web' already uses it; choose another address"
    assert problem == f"cannot listen on {address}: {own}"
