"""TLS: no byte is lost in it, nobody can stop the others with it, and every mistake in its settings is told of."""

from __future__ import annotations

import select
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import pytest

from crowd import Crowd, Pace, Stuck
from echod.connection.echo import EchoSession, SessionSettings
from echod.connection.tls import TlsBuffers, TlsEnd, TlsLayer
from echod.net import kernel
from echod.net.certificates import load
from harness import PATIENCE, receive, reset, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from certificates import Certificates, TlsSocket
    from harness import Command, Start

CLIENTS = 200


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_every_byte_comes_back(start: Start, certificates: Certificates, version: str) -> None:
    """Clients send random bytes in writes of random sizes, half-close with a close_notify, and get all, then one back."""
    daemon = start(*certificates.options(), listen=None)
    context = certificates.context(version=version)
    with Crowd() as crowd:
        for seed in range(40):
            crowd.add(certificates.join(daemon, context), 300_000 + seed, seed)
        crowd.finish()
        assert [(peer.end, peer.received, peer.wrong) for peer in crowd.peers] == [
            ("eof", peer.total, False) for peer in crowd.peers
        ]
        daemon.wait_for("client_closed", count=40)
        lines = daemon.ledger()
        for peer in crowd.peers:
            line = lines[peer.port]
            assert (line["received"], line["sent"], line["acked"], line["reason"]) == (*(peer.total,) * 3, "eof")
            assert line["tls"] == version.replace("v1_", "v1.")
            assert line["cipher"]
            assert "subject" not in line


def test_end_without_close_notify(start: Start, certificates: Certificates) -> None:
    """A client that just sends FIN gets all of its echo too, and the server's close_notify behind it."""
    daemon = start(*certificates.options(), listen=None)
    with certificates.connect(daemon) as client:
        client.sendall(bytes(2_000_000 // 8))
        socket.socket.shutdown(client, socket.SHUT_WR)
        assert len(receive(client, 2_000_000)) == 250_000
    assert daemon.wait_for("client_closed")["reason"] == "eof"


@pytest.mark.parametrize("round_", range(3))
def test_stop_under_load(start: Start, certificates: Certificates, round_: int) -> None:
    """At SIGTERM, clients that stream without end get the echo of all that was read from them, then close_notify."""
    drain, linger = 0.3, 8.0
    daemon = start(
        *certificates.options(),
        *("--shutdown.drain-timeout", str(drain), "--shutdown.linger-timeout", str(linger)),
        listen=None,
    )
    context = certificates.context()
    with Crowd() as crowd:
        for seed in range(CLIENTS):
            client = certificates.join(daemon, context, receive_buffer=32768)
            crowd.add(client, None, 1000 * round_ + seed)
        crowd.run(lambda: all(peer.received for peer in crowd.peers), 2 * PATIENCE)
        daemon.send_signal(signal.SIGTERM)
        crowd.finish()
        assert daemon.wait() == 0
        assert [peer.end for peer in crowd.peers] == ["eof"] * CLIENTS
        assert not any(peer.wrong for peer in crowd.peers)
        lines = daemon.ledger()
        assert {peer.port: peer.received for peer in crowd.peers} == {
            port: line["received"] for port, line in lines.items()
        }
    receipt = daemon.receipt()
    assert (receipt["clients"], receipt["cut"]) == (CLIENTS, CLIENTS)
    assert receipt["unsent_bytes"] == receipt["unacked_bytes"] == 0


@pytest.mark.parametrize("by", ["idle", "cut"])
def test_server_closes_while_the_client_sends(start: Start, certificates: Certificates, by: str) -> None:
    """Echo that is on its way survives a close by the server, though the client goes on sending."""
    options = ("--limits.idle-timeout", "1") if by == "idle" else ("--shutdown.drain-timeout", "0.5")
    daemon = start(*certificates.options(), *options, "--shutdown.linger-timeout", "8", listen=None)
    with Crowd() as crowd:
        peer = crowd.add(certificates.join(daemon, receive_buffer=4096), 1_500_000 if by == "idle" else None, 1)
        peer.half_close = False
        crowd.pause_reading(peer)
        if by == "idle":
            crowd.run(lambda: not peer.writing)
            crowd.run(Stuck(peer, 1.8))  # idle by now, and the end is behind the echo
            peer.total = 1_600_000
        else:
            crowd.run(Stuck(peer))
            daemon.send_signal(signal.SIGTERM)
            daemon.wait_for("draining")
        pace = Pace(crowd, 1_000_000)
        crowd.run(lambda: pace() and bool(peer.end))
        line = daemon.wait_for("client_closed")
        assert (line["reason"], peer.end, peer.received, peer.wrong) == (by, "eof", line["received"], False)
        assert line["acked"] == line["received"]
        assert line["discarded_bytes"] > 0


def test_quiet(start: Start, certificates: Certificates) -> None:
    """A drain lets go of who is silent with a close_notify, and of who has not even begun a handshake."""
    daemon = start(*certificates.options(), "--shutdown.quiet-period", "0.3", listen=None)
    with certificates.connect(daemon) as client, daemon.connect() as silent:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        daemon.send_signal(signal.SIGTERM)
        assert client.recv(1) == b""
        assert silent.recv(1) == b""
        client.close()
        silent.close()
        assert daemon.wait() == 0
    assert daemon.receipt()["quiet"] == 2


def test_write_buffer_holds_for_ciphertext(start: Start, certificates: Certificates) -> None:
    """A client that does not read is not read from, and is reset in the end; what it did not get is on record."""
    daemon = start(*certificates.options(), "--limits.write-timeout", "1", listen=None)
    with Crowd() as crowd:
        peer = crowd.add(certificates.join(daemon, receive_buffer=4096), None, 1)
        crowd.pause_reading(peer)
        crowd.finish()
        assert peer.end == "ConnectionResetError"
        line = daemon.wait_for("client_closed", reason="stalled")
        assert line["received"] > line["acked"]
        assert line["received"] >= line["sent"] >= line["acked"]


def test_silent_handshakes(start: Start, certificates: Certificates) -> None:
    """2,000 clients that never say a word are closed in time, with a line each at most, and others served meanwhile."""
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
    assert statistics.median(line["seconds"] for line in daemon.all("client_closed")) < 2 * timeout
    assert daemon.stop() == 0
    assert len(daemon.all("client_closed")) == count + served
    assert {event["level"] for event in daemon.events} == {"info"}


def test_look_at_the_port(start: Start, certificates: Certificates) -> None:
    """A client that connects and closes, as health checks do, has done nothing wrong."""
    daemon = start(*certificates.options(), "--log.connections", "all", listen=None)
    with daemon.connect() as client:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"]) == ("eof", 0)
    assert "tls" not in line


def test_look_at_the_port_of_mode_info(start: Start, certificates: Certificates) -> None:
    """Without a handshake there is no answer."""
    daemon = start(*certificates.options(), "--listeners.tls.mode", "info", "--log.connections", "all", listen=None)
    with daemon.connect() as client:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert daemon.wait_for("client_closed")["reason"] == "eof"


def test_broken_handshake(start: Start, certificates: Certificates) -> None:
    """Bad bytes are one line, with what is wrong and without a traceback."""
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
    """The alert arrives, not a reset; and the version that is too low is refused."""
    daemon = start(*certificates.options(), "--listeners.tls.tls.minimum-version", "1.3", listen=None)
    with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
        certificates.connect(daemon, context=certificates.context(version="TLSv1_2"))
    assert daemon.wait_for("client_closed")["detail"] == "unsupported protocol"
    with certificates.connect(daemon) as client:
        assert client.version() == "TLSv1.3"


def test_bad_record(start: Start, certificates: Certificates) -> None:
    """Bytes that are no TLS, in a connection that was: what came before is echoed, and the reason is told."""
    daemon = start(*certificates.options(), listen=None)
    with certificates.connect(daemon) as client:
        client.sendall(b"good")
        assert receive(client, 4) == b"good"
        socket.socket.send(client, b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(ssl.SSLError, match="ALERT"):
            client.recv(1)
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"], line["acked"]) == ("tls", 4, 4)
    assert line["detail"]
    assert {event["level"] for event in daemon.events} == {"info"}


def test_bad_record_behind_a_good_one(start: Start, certificates: Certificates) -> None:
    """In one segment: the client hears why, and what could not be echoed any more is on record."""
    daemon = start(*certificates.options(), listen=None)
    with certificates.join(daemon) as client:
        client.object.write(b"good")
        client.sock.sendall(client.outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(ssl.SSLError, match="ALERT"):
            client.recv(1)
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"], line["sent"]) == ("tls", 4, 0)
    assert line["detail"] == "decryption failed or bad record mac"


def test_refused_and_reset(start: Start, certificates: Certificates) -> None:
    """What was wrong with a client stays its reason, though it resets before it can be told."""
    daemon = start(*certificates.options(), listen=None)
    for _ in range(10):
        with daemon.connect() as client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            reset(client)
    until(lambda: len(daemon.all("client_closed")) == 10)
    assert {line["reason"] for line in daemon.all("client_closed")} == {"handshake"}


def test_server_name_that_is_none(start: Start, certificates: Certificates) -> None:
    """A name of any bytes is one line, and no error of ours."""
    daemon = start(*certificates.options(), listen=None)
    hello = client_hello(certificates).replace(b"localhost", b"\xff\xfe\xfdalhost")
    with daemon.connect() as client:
        client.sendall(hello)
        receive(client, 100)
    assert daemon.wait_for("client_closed")["reason"] == "handshake"
    assert {event["level"] for event in daemon.events} == {"info"}


def client_hello(certificates: Certificates) -> bytes:
    """Return the first bytes of a client that asks for localhost."""
    outgoing = ssl.MemoryBIO()
    client = certificates.context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("what", ["record", "handshake"])
def test_slow_records_are_no_silence(start: Start, certificates: Certificates, what: str) -> None:
    """A record, or a handshake, that comes a few bytes at a time is neither idle nor quiet."""
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


def test_a_flood_of_records_holds_nobody_up(start: Start, certificates: Certificates) -> None:
    """Records without end, with next to nothing in each, leave the others their turn."""
    daemon = start(*certificates.options(), listen=None)
    with certificates.connect(daemon) as other, certificates.join(daemon) as client:
        records = b"".join(one_byte_records(client, 100_000))
        with pytest.raises(ssl.SSLWantReadError):
            client.object.unwrap()
        records += client.outgoing.read()
        sender = threading.Thread(target=client.sock.sendall, args=[records])
        reader = threading.Thread(target=drop, args=[client.sock])
        sender.start()
        reader.start()
        slowest = 0.0
        while reader.is_alive():
            used = daemon.cpu_seconds()
            other.sendall(b"x")
            assert other.recv(1) == b"x"
            slowest = max(slowest, daemon.cpu_seconds() - used)
        sender.join()
        assert slowest < 0.5
    assert daemon.wait_for("client_closed", received=100_000)["acked"] == 100_000


def drop(sock: socket.socket) -> None:
    """Receive until EOF, and forget it."""
    while sock.recv(1 << 20):
        pass


def one_byte_records(client: TlsSocket, count: int) -> Iterator[bytes]:
    """Yield the records, encrypted."""
    for _ in range(count):
        client.object.write(b"x")
        yield client.outgoing.read()


def test_client_certificates(start: Start, certificates: Certificates) -> None:
    """With `client_ca`, who has a certificate is served under its subject, and who has none is told so."""
    daemon = start(*certificates.options(), "--listeners.tls.tls.client-ca", str(certificates.ca), listen=None)
    with certificates.connect(daemon, context=certificates.context(client=True)) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    assert daemon.wait_for("client_closed")["subject"].startswith("CN=tester,")
    with certificates.connect(daemon) as nobody, pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
        nobody.recv(1)
    refused = daemon.wait_for("client_closed", reason="handshake")
    assert refused["detail"] == "peer did not return a certificate"
    other = type(certificates)(certificates.folder.parent)
    context = certificates.context()
    context.load_cert_chain(other.client)
    with certificates.connect(daemon, context=context) as stranger, pytest.raises(ssl.SSLError, match="UNKNOWN_CA"):
        stranger.recv(1)
    until(lambda: len(daemon.all("client_closed")) == 3)
    assert daemon.all("client_closed")[-1]["detail"].startswith("certificate verify failed: ")


def test_key_update(start: Start, certificates: Certificates) -> None:
    """A client that changes its keys, and has the server change its own, is echoed on."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    daemon = start(*certificates.options(), listen=None)
    host, port = daemon.address
    client = ["openssl", "s_client", "-connect", f"{host}:{port}", "-CAfile", str(certificates.ca)]
    with subprocess.Popen(client, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for message, answer in ((b"before\n", b"before\n"), (b"K\n", b"KEYUPDATE\n"), (b"after\n", b"after\n")):
            process.stdin.write(message)
            process.stdin.flush()
            while (line := process.stdout.readline()) != answer:
                assert line
        process.stdin.write(b"Q\n")
        process.stdin.close()
    assert daemon.wait_for("client_closed")["received"] == 13


def test_renegotiation_is_refused(start: Start, certificates: Certificates) -> None:
    """A client of TLS 1.2 cannot make the server work for nothing, and what it hears is an alert."""
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


REAL_CLIENTS = {
    "openssl": "(printf 'x\\r\\n'; sleep 1) | openssl s_client -quiet -no_ign_eof -CAfile {ca} -verify_return_error "
    "-connect {host}:{port}",
    "ncat": "printf 'x\\r\\n' | ncat --ssl-verify --ssl-trustfile {ca} localhost {port}",
    "socat": "printf 'x\\r\\n' | socat -t5 - OPENSSL:localhost:{port},cafile={ca},commonname=localhost",
}


@pytest.mark.parametrize("name", REAL_CLIENTS)
def test_real_clients(start: Start, certificates: Certificates, name: str) -> None:
    """What people have at hand verifies the certificate, and gets its echo."""
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    daemon = start(*certificates.options(), listen=None)
    host, port = daemon.address
    command = REAL_CLIENTS[name].format(host=host, port=port, ca=certificates.ca)
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL
    )
    assert b"x\r\n" in result.stdout, result.stderr
    line = daemon.wait_for("client_closed")
    assert (line["received"], line["reason"], line["tls"]) == (3, "eof", "TLSv1.3")


def test_a_large_file_through_socat(start: Start, certificates: Certificates, tmp_path: Path) -> None:
    """A real client that half-closes over TLS gets the tail too."""
    if not shutil.which("socat"):
        pytest.skip("socat is not installed")
    daemon = start(*certificates.options(), listen=None)
    content = bytes(range(256)) * 8000
    (tmp_path / "file").write_bytes(content)
    address = f"OPENSSL:localhost:{daemon.address[1]},cafile={certificates.ca},commonname=localhost"
    with (tmp_path / "file").open("rb") as file:
        result = subprocess.run(
            ["socat", "-t10", "-", address], stdin=file, capture_output=True, timeout=PATIENCE, check=True
        )
    assert result.stdout == content


def problems(command: Command, certificates: Certificates, **files: object) -> list[str]:
    """Return what `echod check` says of a listener with these files."""
    chosen = {"certificate": certificates.certificate, "private_key": certificates.key} | files
    result = command(
        "check",
        *("--listeners.tls.address", "127.0.0.1:0"),
        *(text for name, file in chosen.items() for text in (f"--listeners.tls.tls.{name}", str(file))),
    )
    assert (result.returncode == 0) == (result.stdout == "configuration OK\n")
    return [line.removeprefix("echod: ") for line in result.stderr.splitlines()]


def test_settings(command: Command, certificates: Certificates, tmp_path: Path) -> None:
    """Each file that cannot be used is named, with what is wrong with it."""
    missing = tmp_path / "missing"
    empty = tmp_path / "empty"
    empty.touch()
    _, other_key = certificates.issue("other", "localhost")
    encrypted = tmp_path / "encrypted.key"
    subprocess.run(
        ["openssl", "pkey", "-aes256", "-passout", "pass:x", "-in", certificates.key, "-out", encrypted], check=True
    )
    weak, weak_key = tmp_path / "weak.pem", tmp_path / "weak.key"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:1024",
            "-nodes",
            "-keyout",
            weak_key,
            "-out",
            weak,
            "-subj",
            "/CN=x",
        ],
        check=True,
        capture_output=True,
    )
    curve, curve_key = tmp_path / "curve.pem", tmp_path / "curve.key"
    options = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp256k1", "-nodes", "-subj", "/CN=x")
    subprocess.run(
        ["openssl", "req", "-x509", *options, "-keyout", curve_key, "-out", curve], check=True, capture_output=True
    )
    certificate, key = certificates.certificate, certificates.key
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"certificate": missing}, "certificate", f"'{missing}' cannot be read: No such file or directory"),
        ({"private_key": missing}, "private_key", f"'{missing}' cannot be read: No such file or directory"),
        ({"certificate": tmp_path}, "certificate", f"'{tmp_path}' cannot be read: Is a directory"),
        ({"certificate": key}, "certificate", f"'{key}' holds no certificate in PEM form"),
        ({"certificate": empty}, "certificate", f"'{empty}' holds no certificate in PEM form"),
        ({"private_key": empty}, "private_key", f"'{empty}' holds no private key in PEM form"),
        ({"private_key": certificate}, "private_key", f"'{certificate}' holds no private key in PEM form"),
        (
            {"private_key": other_key},
            "private_key",
            f"'{other_key}' is not the key of the certificate in '{certificate}'",
        ),
        (
            {"private_key": encrypted},
            "private_key",
            f"'{encrypted}' is encrypted: store it without a passphrase, because a daemon cannot ask for one",
        ),
        (
            {"certificate": weak, "private_key": weak_key},
            "certificate",
            f"'{weak}': ee key too small for OpenSSL's security level",
        ),
        (
            {"certificate": curve, "private_key": curve_key},
            "certificate",
            f"'{curve}': the certificate cannot be used: no suitable signature algorithm",
        ),
        ({"client_ca": key}, "client_ca", f"'{key}' holds no certificate in PEM form"),
        ({"client_ca": missing}, "client_ca", f"'{missing}' cannot be read: No such file or directory"),
    ]
    for files, setting, message in cases:
        option = f"--listeners.tls.tls.{setting}"
        assert problems(command, certificates, **files) == [f"{option}: listeners.tls.tls.{setting}: {message}"]


def begun(session: EchoSession) -> bool:
    """Tell whether the handshake is over."""
    return session.stage is None


class Transport:
    """A transport that takes everything."""

    def write(self, data: bytes) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


def test_marks(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many small writes are not acknowledged, what is known of them stays bounded, and never too much."""
    tls = load(str(certificates.certificate), str(certificates.key), "", "1.2")
    with socket.socket() as sock:
        session = EchoSession(sock, SessionSettings(1, 1), None)  # type: ignore[arg-type]
        layer = TlsLayer(session, TlsEnd(tls.context, TlsBuffers()))
        layer._tcp = Transport()  # type: ignore[assignment]
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = certificates.context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        sent: list[bytes] = []
        monkeypatch.setattr(Transport, "write", lambda _, data: sent.append(data))
        session.stage = "handshake"
        for _ in range(3):
            try:
                client.do_handshake()
            except ssl.SSLWantReadError:
                layer.feed(outgoing.read())
                incoming.write(b"".join(sent))
                sent.clear()
        layer.feed(outgoing.read())
        assert begun(session)
        monkeypatch.setattr(kernel, "unacknowledged", lambda _: layer.written)
        before = layer.written
        for number in range(1, 5001):
            layer.write(b"0123456789")
            assert len(layer._marks) <= 513
            if number % 1000 == 0:
                assert layer.plaintext(layer.written) == 10 * number
        record = (layer.written - before) // 5000
        assert record * 5000 == layer.written - before
        for acked in range(0, 5000, 7):
            assert 0 <= layer.plaintext(before + acked * record) <= 10 * acked
        # As they are acknowledged, what is known of the last ones is exact again.
        monkeypatch.setattr(kernel, "unacknowledged", lambda _: 0)
        for _ in range(520):
            layer.write(b"0123456789")
        assert layer.plaintext(layer.written - 2 * record) == 10 * (5520 - 2)
        assert layer.plaintext(layer.written - 2 * record - 1) == 10 * (5520 - 3)
        # A large write is several records, and those count that are there whole.
        before = layer.written
        layer.write(bytes(100_000))
        overhead = record - 10
        assert layer.written == before + 100_000 + 7 * overhead
        for records in range(7):
            whole = before + records * (16384 + overhead)
            assert 55200 + max(0, records - 1) * 16384 <= layer.plaintext(whole) <= 55200 + records * 16384
            almost = min(whole + 16384 + overhead, layer.written) - 1
            assert 55200 + max(0, records - 1) * 16384 <= layer.plaintext(almost) <= 55200 + records * 16384
        assert layer.plaintext(layer.written) == 155_200
        session.reason = "cut"
        layer._read_on()  # of no effect on a session that has ended meanwhile


def test_reset_in_the_middle(start: Start, certificates: Certificates) -> None:
    """Of a client that resets it is on record what had arrived, in bytes of its own."""
    daemon = start(*certificates.options(), listen=None)
    with certificates.connect(daemon) as client:
        for _ in range(20):
            client.sendall(b"0123456789")
            assert receive(client, 10) == b"0123456789"
        reset(client)
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"]) == ("reset", 200)
    assert line["acked"] in {190, 200}  # the client's kernel may have put off its last acknowledgement


def test_half_close_while_more_is_on_its_way(start: Start, certificates: Certificates) -> None:
    """close_notify in the same segment as the last bytes: they come back, and nothing behind it is taken."""
    daemon = start(*certificates.options(), listen=None)
    with certificates.join(daemon) as client:
        client.send(b"last words")
        client.shutdown(socket.SHUT_WR)
        client.sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        assert client.recv(11) == b"last words"
        assert client.recv(1) == b""
    assert daemon.wait_for("client_closed")["received"] == 10
