"""`echod probe` over TLS."""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization

from echod.probe import arguments, progress
from echod.probe.errors import TlsError
from echod.probe.load import Interrupt, LoadGenerator
from echod.probe.timing import Deadline
from harness import PATIENCE, clean_environment, receive, run
from peers import Peer, each, echo, ending, resetting
from probing import CHECK, REFUSED, Authority, check, measure, narrow

if TYPE_CHECKING:
    from harness import Start

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


def test_tls(authority: Authority) -> None:
    with Peer(echo, tls=authority.context) as peer:
        for options in (("--half-close",), ("--server-name", "localhost")):
            result = run("probe", peer.target, "--tls", "--ca", authority.ca, *options)
            assert (result.returncode, result.stderr) == (0, "")
            assert CHECK.fullmatch(result.stdout)
        port = peer.target.rpartition(":")[2]
        assert run("probe", f":{port}", "--tls", "--ca", authority.ca).returncode == 0
        assert run("probe", peer.target, "--tls", "--insecure").returncode == 0
        assert peer.errors == []


@pytest.mark.parametrize("arguments", [("--half-close",), ("--count", "100", "--pipeline", "4", "--half-close")])
def test_all_listeners_of_the_daemon(
    start: Start, authority: Authority, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """The probe supports every kind of listener: TLS with client certificates, PROXY headers and unix sockets."""
    path = tmp_path / "echo.sock"
    daemon = start(
        *("--listeners.secure.address", "127.0.0.1:0", "--listeners.secure.tls.certificate", authority.server),
        *("--listeners.secure.tls.private-key", authority.server, "--listeners.secure.tls.client-ca", authority.ca),
        *("--listeners.behind.address", "127.0.0.1:0", "--listeners.behind.proxy-protocol", "require"),
        *("--listeners.behind.proxy-trusted", "127.0.0.0/8", "--listeners.local.address", f"unix:{path}"),
        *("--log.connections", "all"),
        listen=None,
    )
    daemon.wait_for("listening", count=3)
    addresses = {line["listener"]: line["address"] for line in daemon.all("listening")}
    tls = ("--tls", "--ca", authority.ca, "--cert", authority.both)
    for listener, options in {
        "secure": tls,
        "behind": ("--proxy-v1", "192.0.2.7:4321"),
        "local": (),
    }.items():
        result = run("probe", addresses[listener], *options, *arguments)
        assert (result.returncode, result.stderr) == (0, "")
        closed = daemon.wait_for("client_closed", listener=listener)
        assert closed["reason"] == "eof"
        assert closed["received"] == (6400 if "--count" in arguments else 64)
    assert run("probe", addresses["behind"], "--proxy-v2", "192.0.2.8:1", *arguments).returncode == 0
    clients = [line["client"] for line in daemon.all("client_closed") if line["listener"] == "behind"]
    assert clients[0] == "192.0.2.7:4321"
    daemon.wait_for("client_closed", listener="behind", client="192.0.2.8:1")


def test_tls_is_verified(authority: Authority) -> None:
    """An unknown authority or another name in the certificate ends the connection."""
    with Peer(echo, tls=authority.context) as peer:
        line = check(peer.target, "--tls", code=69)
        assert line == (
            "no TLS: certificate verify failed: unable to get local issuer certificate; --ca FILE trusts its authority,"
            " --insecure accepts any certificate"
        )
        line = check(peer.target, "--tls", "--ca", authority.ca, "--server-name", "example.org", code=69)
        assert line.startswith("no TLS: certificate verify failed: Hostname mismatch")
        assert line.endswith("'example.org'; --server-name NAME expects another, --insecure accepts any certificate")
        assert measure(peer.target, "--tls", code=69)["errors"] == {"tls": 1}
        assert measure(peer.target, "--tls", "--count", "1", code=69)["errors"] == {"tls": 1}
    # The alerts told the server the reason.
    assert set(peer.errors) == {"TLSV1_ALERT_UNKNOWN_CA", "SSLV3_ALERT_BAD_CERTIFICATE"}


def test_tls_client_certificate(authority: Authority) -> None:
    """With TLS 1.3, a server rejects the client after the client's handshake."""
    with Peer(echo, tls=authority.demanding) as peer:
        options = ("--tls", "--ca", authority.ca)
        for files in (("--cert", authority.both), ("--cert", authority.certificate, "--key", authority.key)):
            assert run("probe", peer.target, *options, *files).returncode == 0
        line = check(peer.target, *options, code=1)
        assert re.fullmatch("no echo: .*alert certificate required", line)
        assert measure(peer.target, *options, "--count", "1", code=1)["errors"] == {"tls": 1}


def test_a_server_that_rejects_the_handshake(tmp_path: Path) -> None:
    """The alert of a TLS server is the reason, without the advice for a server that does not use TLS."""
    context = Authority(tmp_path).demanding
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with Peer(echo, tls=context) as peer:
        line = check(peer.target, "--tls", "--insecure", code=69)
    assert re.fullmatch("no TLS: [a-z0-9 ]*alert handshake failure", line)


def test_tls_files(authority: Authority, tmp_path: Path) -> None:
    """A file that cannot be used is a usage error that names the option."""
    start = "echod probe: error: "
    encrypted = tmp_path / "encrypted.key"
    key = serialization.load_pem_private_key(Path(authority.key).read_bytes(), None)
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    junk = tmp_path / "junk.pem"
    junk.write_text("junk\n")
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for options, message in {
        ("--cert", str(damaged)): f"--cert: {str(damaged)!r}: the CERTIFICATE on line 1 cannot be decoded",
        ("--ca", str(junk)): f"--ca: {str(junk)!r}: no certificate or crl found",
        ("--cert", str(tmp_path)): f"--cert: {str(tmp_path)!r} cannot be read: Is a directory",
        ("--cert", authority.ca): f"--key: {authority.ca!r}: the file holds no usable private key in PEM form",
        ("--cert", authority.key): f"--cert: {authority.key!r}: the file holds no certificate in PEM form",
        ("--cert", authority.both, "--key", str(encrypted)): (
            f"--key: {str(encrypted)!r}: the key is encrypted; give a key without a password"
        ),
        ("--cert", authority.ca, "--key", authority.key): f"--key: {authority.key!r}: key values mismatch",
        ("--cert", authority.both, "--key", "/nowhere"): "--key: '/nowhere' cannot be read: No such file or directory",
    }.items():
        result = run("probe", REFUSED, "--tls", *options)
        assert (result.returncode, result.stderr.splitlines()[1]) == (2, start + message)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_measurement_over_tls(authority: Authority, version: ssl.TLSVersion) -> None:
    """Closed loop, open loop and streams work, and so does the half-close with close_notify."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.server)
    context.maximum_version = version
    with Peer(echo, tls=context) as peer:
        options = (peer.target, "--tls", "--ca", authority.ca, "--connections", "3")
        found = measure(*options, "--count", "500", "--size", "1000", "--pipeline", "4", "--half-close")
        assert found["tls"] == version.name.replace("_", ".")
        assert (found["messages"], found["bytes_received"], found["errors"]) == (500, 500_000, {})
        found = measure(*options, "--count", "200", "--rate", "400")
        assert (found["messages"], found["errors"]) == (200, {})
        found = measure(*options, "--stream", "--duration", "0.5", "--half-close")
        assert found["bytes_sent"] == found["bytes_received"] > 0
    assert peer.errors == []


def test_large_messages_over_tls(authority: Authority) -> None:
    """Ciphertext that the socket refuses is sent later, and echo is received in the meantime."""
    options = ("--tls", "--insecure", "--count", "6", "--size", "1MB", "--pipeline", "2", "--half-close")
    with Peer(echo, narrow(), authority.context) as peer:
        found = measure(peer.target, *options)
        assert (found["bytes_received"], found["errors"]) == (6_000_000, {})
        found = measure(peer.target, "--tls", "--insecure", "--stream", "--duration", "0.5", "--half-close")
        assert found["bytes_sent"] == found["bytes_received"] > 0


def test_a_tls_server_that_does_not_receive_while_it_sends(authority: Authority) -> None:
    """The client receives echo even while it cannot send, or both sides would wait for each other."""

    def handler(sock: socket.socket) -> None:
        while data := receive(sock, 300_000):
            sock.sendall(data)

    with Peer(handler, narrow(), authority.context) as peer:
        options = ("--tls", "--insecure", "--count", "4", "--size", "300kB", "--pipeline", "4", "--timeout", "3")
        parsed = arguments.parse([peer.target, *options])
        with progress.Display(parsed) as display:
            generator = LoadGenerator(parsed, Interrupt(), display)
            generator.connect()
            # The send buffer is smaller than one record.
            generator.connections[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
            results = generator.run()
    assert (results.latencies.count, results.errors) == (4, {})


def test_junk_in_place_of_tls(authority: Authority) -> None:
    """Data that is not a TLS record ends the connection, and later calls fail too."""

    def handler(sock: socket.socket) -> None:
        sock.recv(64)
        with socket.socket(fileno=os.dup(sock.fileno())) as plain:
            plain.sendall(b"junk in place of a record")
        sock.recv(1)

    with Peer(handler, tls=authority.context) as peer:
        line = check(peer.target, "--tls", "--insecure", code=1)
        assert line == "no echo: wrong version number"
        route = arguments.parse([peer.target, "--tls", "--insecure"]).route
        connection = route.connect(route.endpoints(PATIENCE), Deadline(PATIENCE))
        assert connection.channel.send(b"x") == 1
        with pytest.raises(TlsError, match="wrong version number"):
            connection.channel.recv(1)
        with pytest.raises(TlsError):
            connection.channel.send(b"x")
        connection.channel.close()


def test_tls_without_close_notify(authority: Authority) -> None:
    """EOF without close_notify is an error, as an attacker could have sent the FIN."""

    def handler(sock: socket.socket) -> None:
        sock.sendall(sock.recv(64))
        assert sock.recv(1) == b""
        sock.shutdown(socket.SHUT_WR)  # ends the TCP connection; `unwrap` would send close_notify

    with Peer(handler, tls=authority.context) as peer:
        options = ("--tls", "--insecure", "--half-close")
        line = check(peer.target, *options, code=1)
        assert line == "64 of 64 bytes came back, then: the connection ended without close_notify"
        assert measure(peer.target, *options, "--count", "1", code=1)["errors"] == {"tls": 1}


def test_nothing_is_left_open(authority: Authority) -> None:
    """Python's development mode shows no warning about an open socket or file."""
    with Peer(echo, tls=authority.context) as secure, Peer(each(ending(100), resetting(100), echo)) as plain:
        for arguments in (
            (secure.target, "--tls", "--insecure"),
            (secure.target, "--tls"),
            (secure.target, "--tls", "--insecure", "--count", "10", "--connections", "2", "--half-close"),
            (plain.target, "--count", "10", "--connections", "3"),
            (REFUSED, "--count", "1"),
        ):
            command = [sys.executable, "-X", "dev", "-W", "error", "-m", "echod", "probe", *arguments]
            result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
            assert result.returncode in {0, 1, 69}
            assert "Warning" not in result.stderr
            assert result.stderr.count("\n") == (result.returncode != 0)
