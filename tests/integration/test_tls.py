"""Test TLS: it loses no byte, no client delays the others, and every mistake in the settings is reported."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import pytest

from crowd import Crowd, Pace, Stuck
from harness import PATIENCE, receive, reset

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from certificates import Certificates, TlsSocket
    from harness import Command, Start

CLIENTS = 200


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_every_byte_comes_back(start: Start, certificates: Certificates, version: str) -> None:
    """Echo random bytes to clients that half-close with close_notify, then send close_notify."""
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
    """Send all of the echo and close_notify to a client that only sends FIN."""
    daemon = start(*certificates.options(), listen=None)
    with certificates.connect(daemon) as client:
        client.sendall(bytes(2_000_000 // 8))
        socket.socket.shutdown(client, socket.SHUT_WR)
        assert len(receive(client, 2_000_000)) == 250_000
    assert daemon.wait_for("client_closed")["reason"] == "eof"


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("kept", [0, 1, 5, -1], ids=["none", "part of the header", "the header", "all but one byte"])
def test_end_inside_a_record(start: Start, certificates: Certificates, version: str, kept: int) -> None:
    """Tell a client that closes in the middle of a record from one that closes after a record. Both get their echo."""
    daemon = start(*certificates.options(), listen=None)
    with certificates.join(daemon, certificates.context(version=version)) as client:
        client.object.write(b"good")
        whole = client.outgoing.read()
        client.object.write(b"cut off")
        client.sock.sendall(whole + client.outgoing.read()[:kept])
        client.sock.shutdown(socket.SHUT_WR)
        assert (client.recv(4), client.recv(1)) == (b"good", b"")
    line = daemon.wait_for("client_closed")
    assert (line["received"], line["acked"]) == (4, 4)
    expected = ("tls", "the client closed the connection in the middle of a record") if kept else ("eof", None)
    assert (line["reason"], line.get("detail")) == expected


@pytest.mark.parametrize("round_", range(3))
def test_stop_under_load(start: Start, certificates: Certificates, round_: int) -> None:
    """At SIGTERM, echo everything that was read from clients that send endlessly, then send close_notify."""
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
    """Deliver all echo when the server closes, even if the client continues to send."""
    options = ("--limits.idle-timeout", "1") if by == "idle" else ("--shutdown.drain-timeout", "0.5")
    daemon = start(*certificates.options(), *options, "--shutdown.linger-timeout", "8", listen=None)
    with Crowd() as crowd:
        peer = crowd.add(certificates.join(daemon, receive_buffer=4096), 1_500_000 if by == "idle" else None, 1)
        peer.half_close = False
        crowd.pause_reading(peer)
        if by == "idle":
            crowd.run(lambda: not peer.writing)
            crowd.run(Stuck(peer, 1.8))  # idle now; FIN follows the echo
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
    """Close silent clients in a drain with close_notify, and also clients without a handshake."""
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
    """Stop reading from a client that does not read, and reset it later. Log the missing bytes."""
    daemon = start(*certificates.options(), "--limits.write-timeout", "1", listen=None)
    with Crowd() as crowd:
        peer = crowd.add(certificates.join(daemon, receive_buffer=4096), None, 1)
        crowd.pause_reading(peer)
        crowd.finish()
        assert peer.end == "ConnectionResetError"
        line = daemon.wait_for("client_closed", reason="stalled")
        assert line["received"] > line["acked"]
        assert line["received"] >= line["sent"] >= line["acked"]


def test_bad_record(start: Start, certificates: Certificates) -> None:
    """Send an alert after bytes that are not TLS. Echo the data before them, and log the reason."""
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


def test_bad_record_after_a_good_one(start: Start, certificates: Certificates) -> None:
    """Send an alert after a good and a bad record in one segment. Log the missing echo."""
    daemon = start(*certificates.options(), listen=None)
    with certificates.join(daemon) as client:
        client.object.write(b"good")
        client.sock.sendall(client.outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(ssl.SSLError, match="ALERT"):
            client.recv(1)
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"], line["sent"]) == ("tls", 4, 0)
    assert line["detail"] == "decryption failed or bad record mac"


def test_a_flood_of_records_delays_no_other_client(start: Start, certificates: Certificates) -> None:
    """Serve other clients during endless tiny records."""
    daemon = start(*certificates.options(), listen=None)
    with certificates.connect(daemon) as other, certificates.join(daemon) as client:
        records = b"".join(one_byte_records(client, 100_000))
        with pytest.raises(ssl.SSLWantReadError):
            client.object.unwrap()
        records += client.outgoing.read()
        sender = threading.Thread(target=client.sock.sendall, args=[records])
        reader = threading.Thread(target=discard, args=[client.sock])
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


def discard(sock: socket.socket) -> None:
    """Receive until EOF, and discard the data."""
    while sock.recv(1 << 20):
        pass


def one_byte_records(client: TlsSocket, count: int) -> Iterator[bytes]:
    """Yield encrypted records with one byte each."""
    for _ in range(count):
        client.object.write(b"x")
        yield client.outgoing.read()


def test_key_update(start: Start, certificates: Certificates) -> None:
    """Continue the echo after a client requests new keys for both directions."""
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


REAL_CLIENTS = {
    "openssl": "(printf 'x\\r\\n'; sleep 1) | openssl s_client -quiet -no_ign_eof -CAfile {ca} -verify_return_error "
    "-connect {host}:{port}",
    "ncat": "printf 'x\\r\\n' | ncat --ssl-verify --ssl-trustfile {ca} localhost {port}",
    "socat": "printf 'x\\r\\n' | socat -t5 - OPENSSL:localhost:{port},cafile={ca},commonname=localhost",
}


@pytest.mark.parametrize("name", REAL_CLIENTS)
def test_real_clients(start: Start, certificates: Certificates, name: str) -> None:
    """Echo to common clients, which verify the certificate."""
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
    """Send all of the echo to a real client that half-closes over TLS."""
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
    """Return the problems that `echod check` reports for a listener with these files."""
    chosen = {"certificate": certificates.certificate, "private_key": certificates.key} | files
    result = command(
        "check",
        *("--listeners.tls.address", "127.0.0.1:0"),
        *(text for name, file in chosen.items() for text in (f"--listeners.tls.tls.{name}", str(file))),
    )
    assert (result.returncode == 0) == result.stdout.startswith("configuration OK: ")
    return [line.removeprefix("echod: ") for line in result.stderr.splitlines()]


def test_settings(command: Command, certificates: Certificates, tmp_path: Path) -> None:
    """Report each unusable file and its problem."""
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
        (
            {"certificate": key, "private_key": certificate},
            "certificate",
            f"'{key}' holds a private key and no certificate: a private key belongs under private_key",
        ),
        ({"certificate": empty}, "certificate", f"'{empty}' holds no certificate in PEM form"),
        ({"private_key": empty}, "private_key", f"'{empty}' holds no private key in PEM form"),
        (
            {"private_key": certificate},
            "private_key",
            f"'{certificate}' holds a certificate and no private key: a certificate belongs under certificate",
        ),
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
        (
            {"client_ca": key},
            "client_ca",
            f"'{key}' holds a private key and no certificate: a private key belongs under private_key",
        ),
        ({"client_ca": missing}, "client_ca", f"'{missing}' cannot be read: No such file or directory"),
    ]
    for files, setting, message in cases:
        option = f"--listeners.tls.tls.{setting}"
        assert problems(command, certificates, **files) == [f"{option}: listeners.tls.tls.{setting}: {message}"]


def test_reset_in_the_middle(start: Start, certificates: Certificates) -> None:
    """Log the acknowledged bytes as plaintext after a reset."""
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
    """Echo the last bytes before a close_notify in the same segment. Ignore the data after it."""
    daemon = start(*certificates.options(), listen=None)
    with certificates.join(daemon) as client:
        client.send(b"last words")
        client.shutdown(socket.SHUT_WR)
        client.sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        assert client.recv(11) == b"last words"
        assert client.recv(1) == b""
    assert daemon.wait_for("client_closed")["received"] == 10


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_client_answers_close_notify(start: Start, certificates: Certificates, version: str) -> None:
    """A close_notify after the server's own is the client's half-close, not an error of TLS."""
    daemon = start(
        *certificates.options(),
        *("--listeners.tls.fault", "half", "--faults.half.after-bytes", "3", "--faults.half.action", "half_close"),
        listen=None,
    )
    with certificates.join(daemon, certificates.context(version=version)) as client:
        client.send(b"abcde")
        assert receive(client, 6) == b"abc"  # type: ignore[arg-type]  # the part of a socket that it uses
        client.send(b"late")
        client.shutdown(socket.SHUT_WR)
        line = daemon.wait_for("client_closed")
    assert (line["reason"], line["received"], line["acked"]) == ("fault", 9, 3)
