"""Test certificates: their validity, and the files and pipes that provide them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import structlog
from cryptography import x509 as made
from cryptography.x509.oid import ExtendedKeyUsageOID

from echod import Server
from echod.loops import loop_factory
from echod.net import x509
from echod.net.certificates import CertificateError, UsedCertificate, load
from harness import PATIENCE, run
from issuing import (
    DAY,
    EARLY,
    EXPIRED,
    LONG,
    ODD_NAME,
    ODD_URL,
    SOON,
    Authorities,
    Issued,
    client_context,
    localhost,
    named,
    options,
    write,
)
from watching import WATCHED, scrape, status

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Command, Daemon, Start


# Validity


@pytest.mark.parametrize(
    ("valid", "event", "text", "date"),
    [
        (EXPIRED, "certificate_expired", "expired at {}", "not_after"),
        (EARLY, "certificate_not_yet_valid", "is not valid before {}", "not_before"),
        (SOON, "certificate_ends_soon", "expires in 9 days, at {}", "not_after"),
    ],
    ids=["expired", "early", "soon"],
)
def test_validity_is_a_warning(
    start: Start,
    command: Command,
    tmp_path: Path,
    authorities: Authorities,
    valid: tuple[datetime, datetime],
    event: str,
    text: str,
    date: str,
) -> None:
    """Warn in `check`, at the start and at a reload, but accept the certificate. `check` exits with 0."""
    server = localhost(authorities.root, valid=valid)
    file = write(tmp_path / "server.pem", server.key_pem, server.pem)
    when = valid[date == "not_after"].isoformat().replace("+00:00", "Z")
    result = command("check", *options(file))
    assert (result.returncode, result.stdout) == (0, "configuration OK: the command line; no file was checked\n")
    setting = "listeners.tls.tls.certificate"
    assert result.stderr == f"echod: warning: {setting}: '{file}': the certificate 'CN=server' {text.format(when)}\n"
    daemon = start(*WATCHED, *options(file), listen=None)
    warning = daemon.wait_for(event)
    assert warning["level"] == "warning"
    fields = {"listener": "tls", "file": file, "subject": "CN=server", date: when}
    assert fields.items() <= warning.items()
    assert warning.get("days") == (9 if event == "certificate_ends_soon" else None)
    listener = status(daemon)["listeners"][0]
    assert listener["certificate_warnings"] == [f"'{file}': the certificate 'CN=server' {text.format(when)}"]
    samples = scrape(daemon)
    for index, sample in enumerate(("not_before", "expiry")):
        assert samples[f"echod_tls_certificate_{sample}_timestamp_seconds", "server", "tls"] == valid[index].timestamp()
    context = client_context(authorities.root, tmp_path)
    context.verify_flags |= 0x200000  # X509_V_FLAG_NO_CHECK_TIME
    with context.wrap_socket(daemon.connect(), server_hostname="localhost") as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    daemon.send_signal(signal.SIGHUP)
    assert daemon.wait_for(event, count=2).items() >= fields.items()
    assert not daemon.all("reload_failed")


def test_all_certificates_are_watched(start: Start, command: Command, tmp_path: Path, authorities: Authorities) -> None:
    """Warn of expired intermediates and of expired certificates in `client_ca`, also of a single client's."""
    root = authorities.root
    old = Issued(named("old intermediate"), root, ca=True, valid=EXPIRED)
    server = localhost(old)
    pinned = Issued(named("pinned client"), valid=SOON)
    file = write(tmp_path / "server.pem", server.key_pem, server.pem, old.pem)
    clients = write(tmp_path / "clients.pem", root.pem, b"# caf\xc3\xa9\r\n", pinned.pem.replace(b"\n", b"\r\n"))
    result = command("check", *options(file, client_ca=clients))
    warned = [line.removeprefix("echod: warning: listeners.tls.tls.") for line in result.stderr.splitlines()]
    assert [line.partition(" at ")[0] for line in warned] == [
        f"certificate: '{file}': the certificate 'CN=old intermediate' expired",
        f"client_ca: '{clients}': the certificate 'CN=pinned client' expires in 9 days,",
    ]
    assert result.returncode == 0
    daemon = start(*WATCHED, *options(file, client_ca=clients), listen=None)
    assert daemon.wait_for("certificate_expired")["subject"] == "CN=old intermediate"
    soon = daemon.wait_for("certificate_ends_soon")
    assert (soon["file"], soon["subject"], soon["days"]) == (clients, "CN=pinned client", 9)
    samples = scrape(daemon)
    expiry = "echod_tls_certificate_expiry_timestamp_seconds"
    assert {role: samples[expiry, role, "tls"] for role in ("server", "intermediate", "client_ca")} == {
        "server": LONG[1].timestamp(),
        "intermediate": EXPIRED[1].timestamp(),
        "client_ca": SOON[1].timestamp(),
    }
    listener = status(daemon)["listeners"][0]
    assert listener["certificate_subject"] == "CN=old intermediate"
    assert listener["certificate_file"] == file
    assert listener["certificate_expires"] == EXPIRED[1].isoformat().replace("+00:00", "Z")
    assert -3 * 86400 < listener["certificate_seconds_left"] < -2 * 86400


def test_warnings_of_a_server_in_a_program(loop_name: str, tmp_path: Path, authorities: Authorities) -> None:
    """Start a server inside another program with an expired certificate, and warn through its logger."""
    server = localhost(authorities.root, valid=EXPIRED)
    file = write(tmp_path / "server.pem", server.key_pem, server.pem)

    async def listen() -> None:
        async with Server.listen(logger=structlog.get_logger(), tls={"certificate": file, "private_key": file}):
            pass

    with structlog.testing.capture_logs() as lines, asyncio.Runner(loop_factory=loop_factory(loop_name)) as runner:
        runner.run(listen())
    assert lines == [
        {
            "event": "certificate_expired",
            "log_level": "warning",
            "listener": "127.0.0.1:0",
            "file": file,
            "subject": "CN=server",
            "not_after": EXPIRED[1].isoformat().replace("+00:00", "Z"),
        }
    ]


def test_the_bounds_of_validity() -> None:
    """Treat both limits of validity as inclusive, and warn in the last 14 days."""
    first, last = datetime(2030, 1, 1, tzinfo=UTC), datetime(2031, 1, 1, tzinfo=UTC)
    used = UsedCertificate("server", "f", x509.Certificate("CN=s", first, last))
    second = timedelta(seconds=1)
    found = [
        warning.event if (warning := used.warning(now)) is not None else None
        for now in (first - second, first, last - 14 * DAY, last - 14 * DAY + second, last, last + second)
    ]
    soon = "certificate_ends_soon"
    assert found == ["certificate_not_yet_valid", None, None, soon, soon, "certificate_expired"]


# Authorities of client certificates


@pytest.mark.parametrize("name", ["python", "openssl"])
def test_intermediate_as_authority(start: Start, tmp_path: Path, authorities: Authorities, name: str) -> None:
    """Serve clients of an intermediate if `client_ca` holds only that, and refuse clients of its root."""
    if name == "openssl" and not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    root, intermediate = authorities
    server = localhost(root)
    file = write(tmp_path / "server.pem", server.key_pem, server.pem)
    daemon = start(*options(file, client_ca=write(tmp_path / "clients.pem", intermediate.pem)), listen=None)
    client = Issued(named("client"), intermediate)
    other = Issued(named("other"), root)
    for number, shown in enumerate((client, other)):
        reply = (through_openssl if name == "openssl" else through_python)(daemon, root, shown, tmp_path)
        assert reply == (b"" if number else b"hello\n")
    assert daemon.wait_for("client_closed", subject="CN=client")["received"] == 6
    assert daemon.wait_for("client_closed", reason="handshake")["detail"].startswith("certificate verify failed: ")


def through_python(daemon: Daemon, root: Issued, shown: Issued, folder: Path) -> bytes:
    context = client_context(root, folder, [shown])
    with contextlib.suppress(ssl.SSLError), context.wrap_socket(daemon.connect(), server_hostname="localhost") as sock:
        sock.sendall(b"hello\n")
        return sock.recv(6)
    return b""


def through_openssl(daemon: Daemon, root: Issued, shown: Issued, folder: Path) -> bytes:
    trusted = write(folder / "root.pem", root.pem)
    file = write(folder / "openssl.pem", shown.key_pem, shown.pem)
    host, port = daemon.address
    command = ["openssl", "s_client", "-quiet", "-CAfile", trusted, "-cert", file, "-connect", f"{host}:{port}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        line = process.stdout.readline()
        process.kill()
    return line


def test_probe_trusts_an_intermediate(start: Start, tmp_path: Path, authorities: Authorities) -> None:
    intermediate = authorities.intermediate
    server = localhost(intermediate)
    file = write(tmp_path / "server.pem", server.key_pem, server.pem)
    daemon = start(*options(file), listen=None)
    host, port = daemon.address
    for authority, code in ((intermediate, 0), (Issued(named("stranger"), ca=True), 69)):
        result = run(
            *("probe", f"{host}:{port}", "--tls", "--server-name", "localhost"),
            *("--ca", write(tmp_path / "ca.pem", authority.pem)),
        )
        assert result.returncode == code, result.stderr


# Certificates that cannot be decoded or used


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("extension", [ODD_NAME, ODD_URL], ids=["name", "url"])
def test_odd_certificate_of_a_client(
    start: Start, tmp_path: Path, authorities: Authorities, extension: made.ExtensionType, version: str
) -> None:
    """Close with close_notify if a client's certificate cannot be decoded. The ledger has the reason."""
    root = authorities.root
    server = localhost(root)
    file = write(tmp_path / "server.pem", server.key_pem, server.pem)
    daemon = start(*options(file, client_ca=write(tmp_path / "root.pem", root.pem)), listen=None)
    context = client_context(root, tmp_path, [Issued(named("odd"), root, extensions=[extension])])
    context.maximum_version = getattr(ssl.TLSVersion, version)
    with context.wrap_socket(daemon.connect(), server_hostname="localhost", suppress_ragged_eofs=False) as client:
        assert client.version() == version.replace("v1_", "v1.")
        assert client.recv(1) == b""
    line = daemon.wait_for("client_closed")
    assert line["reason"] == "handshake"
    assert line["detail"].startswith("the client's certificate cannot be decoded: 'utf-8' codec")
    assert daemon.stop() == 0
    assert {event["level"] for event in daemon.events} == {"info"}


@pytest.mark.parametrize("extension", [ODD_NAME, ODD_URL], ids=["name", "url"])
def test_odd_certificate_of_our_own(
    command: Command, tmp_path: Path, authorities: Authorities, extension: made.ExtensionType
) -> None:
    """Report a listener's certificate that cannot be decoded as an error in the settings, with its file."""
    server = Issued(named("server"), authorities.root, extensions=[extension])
    file = write(tmp_path / "server.pem", server.key_pem, server.pem)
    result = command("check", *options(file))
    assert result.returncode == 78
    option = "--listeners.tls.tls.certificate: listeners.tls.tls.certificate"
    assert result.stderr.startswith(f"echod: {option}: '{file}': the certificate cannot be decoded: 'utf-8' codec")


def test_certificate_for_clients_only(command: Command, tmp_path: Path, authorities: Authorities) -> None:
    """Report a certificate for clients only as an error in the settings, whatever its dates are."""
    purpose = made.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    server = Issued(named("server"), authorities.root, valid=EXPIRED, extensions=[purpose])
    file = write(tmp_path / "server.pem", server.key_pem, server.pem)
    result = command("check", *options(file))
    assert result.returncode == 78
    assert f"'{file}': the certificate would be refused: unsuitable certificate purpose\n" in result.stderr


def test_reload_of_an_odd_certificate(start: Start, tmp_path: Path, authorities: Authorities) -> None:
    """Fail the reload and name the file. The old certificate stays in use."""
    server = localhost(authorities.root)
    odd = Issued(named("server"), authorities.root, extensions=[ODD_NAME])
    file = write(tmp_path / "server.pem", server.key_pem, server.pem)
    daemon = start(*options(file), listen=None)
    write(tmp_path / "server.pem", odd.key_pem, odd.pem)
    daemon.send_signal(signal.SIGHUP)
    (problem,) = daemon.wait_for("reload_failed")["problems"]
    assert f"'{file}': the certificate cannot be decoded" in problem
    assert not daemon.all("reload_crashed")
    context = client_context(authorities.root, tmp_path)
    with context.wrap_socket(daemon.connect(), server_hostname="localhost") as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            [made.DNSName("a.example"), made.UniformResourceIdentifier("spiffe://example.org/web")],
            "spiffe://example.org/web",
        ),
        ([made.RFC822Name("a@example.org"), made.DNSName("a.example")], "a.example"),
        ([made.DirectoryName(named("inner"))], ""),
    ],
    ids=["uri", "dns", "none"],
)
def test_client_without_a_subject(
    start: Start, tmp_path: Path, authorities: Authorities, names: list[made.GeneralName], expected: str
) -> None:
    """Log a client with an empty subject by an alternative name, preferably its URI."""
    root = authorities.root
    server = localhost(root)
    file = write(tmp_path / "server.pem", server.key_pem, server.pem)
    daemon = start(*options(file, client_ca=write(tmp_path / "root.pem", root.pem)), listen=None)
    client = Issued(made.Name([]), root, extensions=[made.SubjectAlternativeName(names)])
    assert through_python(daemon, root, client, tmp_path) == b"hello\n"
    assert daemon.wait_for("client_closed")["subject"] == expected


# Files


@pytest.mark.parametrize("size", [0, 200_000], ids=["small", "large"])
def test_files_from_pipes(start: Start, tmp_path: Path, authorities: Authorities, size: int) -> None:
    """Read each pipe once, although two listeners name it in three settings. A reload finds it empty and fails."""
    root, intermediate = authorities
    server = localhost(root)
    readers = []
    writers = []
    for data in (server.pem + intermediate.pem + server.key_pem + b"# comment\n" * (size // 10),) * 2:
        reader, writer = os.pipe()
        readers.append(reader)
        writers.append(subprocess.Popen(["cat", write(tmp_path / "data", data)], stdout=writer))
        os.close(writer)
    one, other = (f"/dev/fd/{reader}" for reader in readers)
    daemon = start(
        *options(one, one, one, name="a"), *options(one, other, one, name="b"), listen=None, pass_fds=readers
    )
    daemon.wait_for("listening", count=2)
    for process in writers:
        assert process.wait(PATIENCE) == 0
    for reader in readers:
        os.close(reader)
    client = Issued(named("client"), intermediate)
    assert through_python(daemon, root, client, tmp_path) == b"hello\n"
    daemon.send_signal(signal.SIGHUP)  # the pipes are empty now
    problems = daemon.wait_for("reload_failed")["problems"]
    assert len(problems) == 2
    assert all(problem.endswith(" holds no certificate in PEM form") for problem in problems)
    assert through_python(daemon, root, client, tmp_path) == b"hello\n"


def test_certificate_of_probe_from_a_pipe(start: Start, tmp_path: Path, authorities: Authorities) -> None:
    root = authorities.root
    server, client = localhost(root), Issued(named("client"), root)
    trusted = write(tmp_path / "root.pem", root.pem)
    file = write(tmp_path / "server.pem", server.key_pem, server.pem)
    daemon = start(*options(file, client_ca=trusted), listen=None)
    host, port = daemon.address
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["sh", "-c", f"cat {write(tmp_path / 'c', client.key_pem, client.pem)} >{fifo}"]) as feeder:
        result = run(
            *("probe", f"{host}:{port}", "--tls", "--server-name", "localhost", "--ca", trusted, "--cert", str(fifo))
        )
        feeder.kill()
    assert result.returncode == 0, result.stderr
    assert daemon.wait_for("client_closed")["subject"] == "CN=client"


def test_no_descriptor_for_a_certificate(
    tmp_path: Path, authorities: Authorities, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Name the file in the error if no descriptor is left to load it."""
    server = localhost(authorities.root)
    file = write(tmp_path / "server.pem", server.key_pem, server.pem)

    def refuse(_: str) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(CertificateError, match=f"^'{file}' cannot be read: Too many open files$"):
        load(file, file, "", "1.2")


def test_openssl_without_tls_1_3(tmp_path: Path, authorities: Authorities) -> None:
    """Accept the settings if OpenSSL is limited to TLS 1.2, which has more handshake steps."""
    server = localhost(authorities.root)
    file = write(tmp_path / "server.pem", server.key_pem, server.pem)
    text = b"openssl_conf=a\n[a]\nssl_conf=b\n[b]\nsystem_default=c\n[c]\nMaxProtocol=TLSv1.2\n"
    conf = write(tmp_path / "openssl.cnf", text)
    clients = write(tmp_path / "root.pem", authorities.root.pem)
    result = run("check", *options(file, client_ca=clients), env={"OPENSSL_CONF": conf})
    assert (result.returncode, result.stderr) == (0, "")
