"""Test handshakes that succeed, fail, take too long or never begin."""

from __future__ import annotations

import select
import shutil
import signal
import socket
import ssl
import subprocess
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE, receive, reset, until

if TYPE_CHECKING:
    from certificates import Certificates
    from harness import Start


def test_silent_handshakes(start: Start, certificates: Certificates) -> None:
    """Close 2,000 silent clients, with at most one line each, and serve other clients meanwhile."""
    count, timeout = 2000, 2.0
    daemon = start(*certificates.options(), "--limits.handshake-timeout", str(timeout), listen=None)
    context = certificates.context()
    silent = [daemon.connect() for _ in range(count)]
    served = 0
    while not daemon.all("client_closed")[served:]:
        with certificates.connect(daemon, context=context) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        served += 1
        daemon.wait_for("client_closed", count=served)
    assert served > 10
    for waiting in silent:
        assert waiting.recv(1) == b""
        waiting.close()
    daemon.wait_for("client_closed", count=count, reason="handshake")
    late = [line["seconds"] for line in daemon.all("client_closed") if line["reason"] == "handshake"]
    assert min(late) >= timeout - 0.001  # the log rounds
    assert daemon.stop() == 0
    assert len(daemon.all("client_closed")) == count + served
    assert {event["level"] for event in daemon.events} == {"info"}


def test_look_at_the_port(start: Start, certificates: Certificates) -> None:
    """Report no error if a client connects and closes, as health checks do."""
    daemon = start(*certificates.options(), "--log.connections", "all", listen=None)
    with daemon.connect() as client:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"]) == ("eof", 0)
    assert "tls" not in line


def test_look_at_the_port_of_mode_info(start: Start, certificates: Certificates) -> None:
    """Send no description to a client without a handshake."""
    daemon = start(*certificates.options(), "--listeners.tls.mode", "info", "--log.connections", "all", listen=None)
    with daemon.connect() as client:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert daemon.wait_for("client_closed")["reason"] == "eof"


def test_broken_handshake(start: Start, certificates: Certificates) -> None:
    """Log one line with the problem, without a traceback, for bytes that are not TLS."""
    daemon = start(*certificates.options(), listen=None)
    cases = [
        (b"GET / HTTP/1.1\r\n\r\n", "http request"),
        (b"\x16\x03\x01\xff\xff", None),
        (b"\0" * 500, "wrong version number"),
        (b"\x16\x03\x01", "the client closed the connection"),
    ]
    for number, (hello, detail) in enumerate(cases, 1):
        with daemon.connect() as client:
            client.sendall(hello)
            client.shutdown(socket.SHUT_WR)
            receive(client, 100)
        line = daemon.wait_for("client_closed", count=number)
        assert line["reason"] == "handshake", hello
        assert detail is None or line["detail"] == detail
    assert daemon.stop() == 0
    assert {event["level"] for event in daemon.events} == {"info"}


def test_refused_handshake_is_explained_to_the_client(start: Start, certificates: Certificates) -> None:
    """Send an alert, not a reset, to a client with too low a version."""
    daemon = start(*certificates.options(), "--listeners.tls.tls.minimum-version", "1.3", listen=None)
    with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
        certificates.connect(daemon, context=certificates.context(version="TLSv1_2"))
    assert daemon.wait_for("client_closed")["detail"] == "unsupported protocol"
    with certificates.connect(daemon) as client:
        assert client.version() == "TLSv1.3"


def test_refused_and_reset(start: Start, certificates: Certificates) -> None:
    """Keep the reason `handshake` if the client resets before it gets the alert."""
    daemon = start(*certificates.options(), listen=None)
    for _ in range(10):
        with daemon.connect() as client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            reset(client)
    until(lambda: len(daemon.all("client_closed")) == 10)
    assert {line["reason"] for line in daemon.all("client_closed")} == {"handshake"}


def test_malformed_server_name(start: Start, certificates: Certificates) -> None:
    """Report a server name that is not ASCII as a failed handshake, not as a defect."""
    daemon = start(*certificates.options(), listen=None)
    hello = client_hello(certificates).replace(b"localhost", b"\xff\xfe\xfdalhost")
    with daemon.connect() as client:
        client.sendall(hello)
        receive(client, 100)
    assert daemon.wait_for("client_closed")["reason"] == "handshake"
    assert {event["level"] for event in daemon.events} == {"info"}


def client_hello(certificates: Certificates) -> bytes:
    """Return the first message of a client that asks for localhost."""
    outgoing = ssl.MemoryBIO()
    client = certificates.context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def test_client_certificates(start: Start, certificates: Certificates) -> None:
    """Require a certificate with `client_ca`. Log its subject, or the reason for the refusal."""
    daemon = start(*certificates.options(), "--listeners.tls.tls.client-ca", str(certificates.ca), listen=None)
    with certificates.connect(daemon, context=certificates.context(client=True)) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    assert daemon.wait_for("client_closed")["subject"].startswith("CN=tester,")
    with certificates.connect(daemon) as anonymous, pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
        anonymous.recv(1)
    refused = daemon.wait_for("client_closed", reason="handshake")
    assert refused["detail"] == "peer did not return a certificate"
    other = type(certificates)(certificates.folder.parent)
    context = certificates.context()
    context.load_cert_chain(other.client)
    with certificates.connect(daemon, context=context) as stranger, pytest.raises(ssl.SSLError, match="UNKNOWN_CA"):
        stranger.recv(1)
    until(lambda: len(daemon.all("client_closed")) == 3)
    assert daemon.all("client_closed")[-1]["detail"].startswith("certificate verify failed: ")


def test_renegotiation_is_refused(start: Start, certificates: Certificates) -> None:
    """Refuse to renegotiate with a TLS 1.2 client, because that costs the server CPU time."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    daemon = start(*certificates.options(), listen=None)
    host, port = daemon.address
    client = ["openssl", "s_client", "-tls1_2", "-connect", f"{host}:{port}", "-CAfile", str(certificates.ca)]
    with subprocess.Popen(client, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for message in (b"before\n", b"R\n"):
            process.stdin.write(message)
            process.stdin.flush()
            while message == b"before\n" and (line := process.stdout.readline()) != message:
                assert line
        output, _ = process.communicate(timeout=PATIENCE)
    assert b"no renegotiation" in output
    assert daemon.wait_for("client_closed")["received"] == 7
    assert {event["level"] for event in daemon.events} == {"info"}


@pytest.mark.parametrize("what", ["record", "handshake"])
def test_slow_records_are_no_silence(start: Start, certificates: Certificates, what: str) -> None:
    """Do not close a client as idle or quiet while a record or handshake arrives a few bytes at a time."""
    daemon = start(
        *certificates.options(),
        *("--limits.idle-timeout", "0.6", "--shutdown.quiet-period", "0.6", "--shutdown.drain-timeout", "20"),
        listen=None,
    )
    if what == "record":
        with certificates.join(daemon) as client:
            client.object.write(bytes(1000))
            trickle(client.sock, client.outgoing.read(), 0.05)
            assert client.recv(1000) == bytes(1000)
            client.shutdown(socket.SHUT_WR)
    with daemon.connect() as client:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait_for("draining")
        trickle(client, client_hello(certificates), 0.05)
        assert client.recv(1)
    assert daemon.wait() == 0
    assert "quiet" not in {line["reason"] for line in daemon.all("client_closed")}


def trickle(sock: socket.socket, data: bytes, pause: float) -> None:
    """Send in 20 parts, with a pause after each."""
    size = -(-len(data) // 20)
    for place in range(0, len(data), size):
        sock.sendall(data[place : place + size])
        select.select([], [], [], pause)
