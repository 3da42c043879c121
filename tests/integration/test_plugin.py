"""The pytest plugin: the fixture, in this run of pytest and in separate runs."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from echod import Server, SettingsError
from echod.pytest_plugin import with_options
from echod.testing import ServerThread
from harness import PATIENCE, clean_environment, receive, until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from certificates import Certificates
    from echod.testing import ServerFactory

DOCUMENT = Path(__file__).parents[2] / "docs" / "how-to" / "testing.md"


def converse(echod: ServerThread, message: bytes) -> bytes:
    """Send a message, half-close, and return the echo."""
    with socket.create_connection(echod.address, PATIENCE) as client:
        client.sendall(message)
        client.shutdown(socket.SHUT_WR)
        return receive(client, len(message) + 1)


def run(pytester: pytest.Pytester, source: str, *arguments: str) -> pytest.RunResult:
    """Run a test file in a separate pytest, with strict markers and warnings as errors."""
    pytester.makepyfile(test_theirs=source)
    # The plugin of hypothesis takes a second to import.
    return pytester.runpytest_subprocess("--strict-markers", "-Werror", "-p", "no:hypothesispytest", *arguments)


# The fixture


def test_ledger(echod: ServerThread) -> None:
    """Each closed connection has an entry with its figures."""
    assert echod.connections == []
    assert converse(echod, b"hello") == b"hello"
    (first,) = echod.wait_for_connections(1)
    assert (first.received, first.acked, first.reason) == (5, 5, "eof")
    converse(echod, b"more")
    entries = echod.wait_for_connections(2)
    assert [entry.received for entry in entries] == [5, 4]
    assert echod.connections == entries
    entries.clear()
    echod.connections.clear()
    assert len(echod.connections) == 2


def test_wait_times_out(echod: ServerThread) -> None:
    """The error lists the closed and the open connections."""
    converse(echod, b"x")
    echod.wait_for_connections(1)
    with socket.create_connection(echod.address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        message = r"^fewer than 3 connections closed in 0.01 s: 127\.0\.0\.1:\d+ \(eof\); still connected: 1$"
        with pytest.raises(TimeoutError, match=message):
            echod.wait_for_connections(3, 0.01)


def test_wait_for_a_later_connection(echod: ServerThread) -> None:
    """The wait ends when the connection is closed."""
    with socket.create_connection(echod.address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        waiter = threading.Thread(target=echod.wait_for_connections, args=(1, PATIENCE))
        waiter.start()
        assert echod.clients == 1
    waiter.join(PATIENCE)
    assert not waiter.is_alive()


@pytest.mark.echod(shutdown={"drain_timeout": 1.5})
def test_stop(echod: ServerThread) -> None:
    """A client that stays is closed after the short quiet period. A second stop returns the same receipt."""
    with socket.create_connection(echod.address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        receipt = echod.stop()
        # With the daemon's quiet_period of 2 s, the drain timeout would have come first.
        assert (receipt.clients, receipt.quiet, receipt.unsent_bytes) == (1, 1, 0)
        assert client.recv(1) == b""
    assert echod.stop() is receipt
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(echod.address)
    assert [entry.reason for entry in echod.connections] == ["quiet"]


@pytest.mark.echod(shutdown={"quiet_period": 60, "drain_timeout": 0.05})
def test_shutdown_is_the_markers(echod: ServerThread) -> None:
    """Keys that the marker does not set have the plugin's defaults, such as the short linger timeout."""
    with socket.create_connection(echod.address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        receipt = echod.stop()
    assert receipt.cut == 1
    assert receipt.seconds < 5  # the daemon's linger_timeout is 10 s


@pytest.mark.echod(mode="line", limits={"max_line": 4}, loop="asyncio")
def test_options(echod: ServerThread) -> None:
    assert converse(echod, b"a\nlonger") == b"a\n"
    assert echod.wait_for_connections(1)[0].reason == "line_too_long"
    assert not type(echod._loop).__module__.startswith("uvloop")


@pytest.mark.echod(loop="uvloop", fault={"trigger": "boom", "action": "raise"})
def test_fault(echod: ServerThread) -> None:
    assert converse(echod, b"fine") == b"fine"
    assert converse(echod, b"boom") == b""
    assert [entry.reason for entry in echod.wait_for_connections(2)] == ["eof", "fault"]
    assert type(echod._loop).__module__.startswith("uvloop")


@pytest.mark.echod(proxy_protocol="require", proxy_trusted=["127.0.0.0/8"])
def test_proxy_header(echod: ServerThread) -> None:
    assert converse(echod, b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nhello") == b"hello"
    assert echod.wait_for_connections(1)[0].client == "192.0.2.1:1"


def shake_hands(echod: ServerThread, context: ssl.SSLContext, name: str = "localhost") -> str | None:
    """Connect over TLS, exchange a message, and return the negotiated version."""
    with (
        socket.create_connection(echod.address, PATIENCE) as sock,
        context.wrap_socket(sock, server_hostname=name) as client,
    ):
        client.sendall(b"secret")
        assert client.recv(6) == b"secret"
        return client.version()


@pytest.mark.echod(tls=True)
def test_tls(echod: ServerThread) -> None:
    """A client that trusts the authority connects by name and by address. Other clients refuse the certificate."""
    assert shake_hands(echod, echod.ssl_context()) == "TLSv1.3"
    assert shake_hands(echod, ssl.create_default_context(cafile=echod.certificate_authority), "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(echod, ssl.create_default_context())
    assert sorted(str(entry.tls) for entry in echod.wait_for_connections(3)) == ["None", "TLSv1.3", "TLSv1.3"]
    folder = echod.certificate_authority.parent
    assert folder.is_dir()
    echod.stop()
    assert not folder.exists()


@pytest.mark.echod(tls={"minimum_version": "1.3"})
def test_tls_with_settings(echod: ServerThread) -> None:
    """If the dict names no certificate, one is issued."""
    old = echod.ssl_context()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        shake_hands(echod, old)
    assert shake_hands(echod, echod.ssl_context()) == "TLSv1.3"


def test_without_tls(echod: ServerThread) -> None:
    with pytest.raises(RuntimeError, match=r"^no certificate was issued: .*tls=True"):
        echod.ssl_context()


# ServerThread without the fixture


def test_own_certificate(certificates: Certificates) -> None:
    """A named certificate is used, and no other is issued."""
    thread = ServerThread(tls={"certificate": certificates.certificate, "private_key": certificates.key})
    try:
        assert shake_hands(thread, certificates.context())
        with pytest.raises(RuntimeError, match="no certificate was issued"):
            thread.certificate_authority  # noqa: B018  (it raises)
    finally:
        thread.stop()


def count_threads() -> int:
    """Return the number of running server threads."""
    return sum(thread.name == "echod" for thread in threading.enumerate())


def test_threads_side_by_side() -> None:
    """Each server has its own loop. Its thread ends with `stop`."""
    threads = [ServerThread(loop=loop) for loop in ("uvloop", "asyncio", "auto")]
    for number, thread in enumerate(threads):
        converse(thread, b"x" * number)
    for number, thread in enumerate(threads):
        (entry,) = thread.wait_for_connections(1)
        assert entry.received == number
        thread.stop()
        assert count_threads() == len(threads) - number - 1


def test_with() -> None:
    """`with` stops the server. The text of the thread has the address and the state."""
    with ServerThread() as thread:
        host, port = thread.address
        assert thread.port == port
        assert repr(thread) == f"<ServerThread {host}:{port} serving, clients=0>"
        with socket.create_connection(thread.address):
            until(lambda: thread.clients == 1)
    assert thread.stop().clients <= 1
    assert repr(thread) == f"<ServerThread {host}:{port} stopped, clients=0>"


FORKS = """
import os, ssl, socket, sys
from pathlib import Path
from echod.testing import ServerThread

server = ServerThread(loop=sys.argv[1], tls=True)

def converse():
    with socket.create_connection(server.address) as sock:
        with server.ssl_context().wrap_socket(sock, server_hostname="localhost") as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"

child = os.fork()
if child == 0:
    converse()
    for ask in (server.stop, lambda: server.connections, lambda: server.clients, lambda: server.wait_for_connections(1)):
        try:
            ask()
        except RuntimeError as error:
            print(error)
    sys.exit(7)  # not os._exit, so that the interpreter calls its exit handlers
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
converse()
server.wait_for_connections(2)
folder = server.certificate_authority.parent
assert folder.exists()
print(os.getpid(), server.stop().clients)
assert not folder.exists()
abandoned = ServerThread(tls=True)
print(abandoned.certificate_authority.parent)
"""


def test_forked_process(loop_name: str) -> None:
    """A forked process can connect to the server. It cannot stop it, wait for it, or remove its files."""
    result = subprocess.run(
        [sys.executable, "-Wignore", "-c", FORKS, loop_name],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=clean_environment(),
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    *errors, last, folder = result.stdout.splitlines()
    process, clients = last.split()
    message = f"the server runs in process {process}, the parent of this one: ask or stop it there, and end this "
    assert errors == [message + "process with os._exit"] * 4
    assert clients == "0"
    assert not Path(folder).exists()  # without a stop, it is removed at the exit of the process


def test_failure_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure at the start is raised by the constructor."""
    monkeypatch.setattr("echod.testing._HOST", "192.0.2.1")
    with pytest.raises(Exception, match=r"cannot listen on 192.0.2.1:0: Cannot assign requested address") as caught:
        ServerThread()
    assert caught.type.__name__ == "ListenError"
    assert "self = <ServerThread not started>" in str(caught.getrepr(funcargs=True))
    until(lambda: count_threads() == 0)


def test_failure_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure after the start is raised by each `stop`."""
    shutdown = Server.shutdown

    async def broken(server: Server) -> None:
        await shutdown(server)
        msg = "a bug"
        raise KeyError(msg)

    monkeypatch.setattr(Server, "shutdown", broken)
    thread = ServerThread()
    with pytest.raises(KeyError, match="a bug"):
        thread.stop()
    with pytest.raises(KeyError, match="a bug"):
        thread.stop()


def test_without_trustme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trustme", None)
    with pytest.raises(ImportError, match=r"trustme is needed .*: pip install 'echod\[pytest\]'$"):
        ServerThread(tls=True)


# The factory


def test_factory(echod_factory: ServerFactory) -> None:
    """Each call starts a server with its own options."""
    lines, faulty = echod_factory(mode="line", limits={"max_line": 4}), echod_factory(fault={"action": "raise"})
    assert converse(lines, b"a\nlonger") == b"a\n"
    assert converse(faulty, b"boom") == b""
    assert [server.wait_for_connections(1)[0].reason for server in (lines, faulty)] == ["line_too_long", "fault"]
    with pytest.raises(SettingsError, match=r"^limits.idl_timeout: unknown key; did you mean 'idle_timeout'\?$"):
        echod_factory(limits={"idl_timeout": 1})  # type: ignore[typeddict-unknown-key]


@with_options(mode="info")
def test_typed_marker(echod: ServerThread) -> None:
    assert converse(echod, b"")[:1] == b"{"


# Separate runs of pytest


def test_factory_stops_all(pytester: pytest.Pytester) -> None:
    """The servers stop in reverse order after the test, and every failure is reported."""
    result = run(
        pytester,
        """
        import pytest
        from echod import Server

        order = []

        @pytest.fixture
        def failing(monkeypatch):
            shutdown = Server.shutdown
            async def fail(server):
                await shutdown(server)
                if server.port not in order:
                    order.append(server.port)
                if order.index(server.port) != 1:
                    raise KeyError(f"bug {server.port}")
            monkeypatch.setattr(Server, "shutdown", fail)

        def test_three(failing, echod_factory):
            ports = [echod_factory().port for _ in range(3)]
            print("ports", *ports)

        def test_end():
            print("order", *order)
            assert len(order) == 3
        """,
        "-Wignore",
        "-rA",
    )
    result.assert_outcomes(passed=2, errors=1)
    (ports,) = {line.partition(" ")[2] for line in result.outlines if line.startswith("ports ")}
    (order,) = {line.partition(" ")[2] for line in result.outlines if line.startswith("order ")}
    last, middle, first = order.split()
    assert ports.split() == [first, middle, last]
    reported = {line.partition("KeyError: ")[2].strip("'") for line in result.outlines if "KeyError: 'bug" in line}
    assert reported == {f"bug {first}", f"bug {last}"}


def test_unused(pytester: pytest.Pytester) -> None:
    """If no test uses the fixture, only the plugin itself is imported."""
    result = run(
        pytester,
        """
        import sys
        def test_modules(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("echod")
            assert {name for name in sys.modules if name.startswith("echod")} == {"echod", "echod.pytest_plugin"}
            assert not {"asyncio", "pydantic", "pydantic_core", "structlog", "uvloop", "trustme"} & set(sys.modules)
        """,
        *("-p", "no:xdist", "-p", "no:anyio"),
    )
    result.assert_outcomes(passed=1)


def test_marker_is_registered(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess("--markers")
    result.stdout.fnmatch_lines(
        ["@pytest.mark.echod(mode=..., *): options of the server that the fixture echod starts."]
    )


def test_markers_add_up(pytester: pytest.Pytester) -> None:
    """The nearest marker overrides the others for each option. Every thread ends after its test."""
    result = run(
        pytester,
        """
        import socket, threading
        import pytest
        pytestmark = pytest.mark.echod(mode="info", loop="asyncio")
        servers = []

        @pytest.mark.echod(limits={"max_line": 3})
        class TestAll:
            def test_module(self, echod):
                with socket.create_connection(echod.address) as client:
                    assert client.recv(1) == b"{"
                servers.append(echod)

            @pytest.mark.echod(mode="line")
            def test_nearest(self, echod):
                with socket.create_connection(echod.address) as client:
                    client.sendall(b"a\\nlonger")
                    assert client.recv(10) == b"a\\n"
                assert echod.wait_for_connections(1)[0].reason == "line_too_long"
                servers.append(echod)

        def test_no_thread_is_left():
            assert [thread.name for thread in threading.enumerate() if thread.name == "echod"] == []
            assert len(servers) == 2
        """,
    )
    result.assert_outcomes(passed=3)


MISTAKES: dict[str, tuple[str, Sequence[str]]] = {
    "option": (
        "tlss=True, lop=1, limits={'backlg': 1}",
        [
            "tlss: unknown option; did you mean 'tls'?",
            "lop: unknown option; did you mean 'loop'?",
            "limits.backlg: unknown key; did you mean 'backlog'?",
        ],
    ),
    "loop": ("loop='uvlop'", ["loop: should be 'auto', 'uvloop' or 'asyncio', not 'uvlop'"]),
    "key": (
        "limits={'idl_timeout': 1}, shutdown={'quiet_perod': 1}, fault={'trigger': 'x', 'actoin': 'raise'}",
        [
            "limits.idl_timeout: unknown key; did you mean 'idle_timeout'?",
            "shutdown.quiet_perod: unknown key; did you mean 'quiet_period'?",
            "fault.actoin: unknown key; did you mean 'action'?",
        ],
    ),
    "tables": ("shutdown=1, tls='c.pem'", ["shutdown: should be a table", "tls: should be a table"]),
}


def test_mistakes(pytester: pytest.Pytester) -> None:
    """Each mistake is an error of the test in one line, without a traceback."""
    tests = "".join(
        f"@pytest.mark.echod({arguments})\ndef test_{name}(echod): pass\n\n"
        for name, (arguments, _) in MISTAKES.items()
    )
    result = run(pytester, f"import pytest\n\n{tests}@pytest.mark.echod(7)\ndef test_position(echod): pass\n")
    result.assert_outcomes(errors=len(MISTAKES) + 1)
    lines = result.outlines
    for _, messages in MISTAKES.values():
        for message in messages:
            assert f"@pytest.mark.echod: {message}" in lines
    assert "@pytest.mark.echod takes options by name, not 7" in lines
    assert not any("pytest_plugin.py" in line for line in lines)


def test_failure_in_the_thread(pytester: pytest.Pytester) -> None:
    """A failure in the thread is an error of the test, at the start and at the end."""
    result = run(
        pytester,
        """
        import echod as package
        import pytest

        @pytest.fixture
        def broken(request, monkeypatch):
            async def fail(*_):
                raise KeyError("a bug")
            monkeypatch.setattr(package.Server, request.param, fail)

        @pytest.mark.parametrize("broken", ["__aenter__"], indirect=True)
        def test_start(broken, echod):
            raise AssertionError("not reached")

        @pytest.mark.parametrize("broken", ["__aexit__"], indirect=True)
        def test_end(broken, echod):
            pass
        """,
        "-Wignore",
    )
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(["ERROR *::test_start* - KeyError: 'a bug'", "ERROR *::test_end* - KeyError: 'a bug'"])


def test_document(pytester: pytest.Pytester) -> None:
    """Each example in docs/how-to/testing.md is a complete test module, and passes."""
    modules = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert len(modules) > 5
    for number, module in enumerate(modules):
        pytester.makepyfile(**{f"test_{number}": module})
    tests = len(re.findall(r"^ *def test_", "\n".join(modules), re.MULTILINE))
    run(pytester, "").assert_outcomes(passed=tests + 1)  # one test has two cases
