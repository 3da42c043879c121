"""Test certificates: their validity, their fields, and the files and pipes that provide them."""

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
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import structlog
from cryptography import x509 as made
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from echod import Server
from echod.loops import loop_factory
from echod.net import x509
from echod.net.certificates import CertificateError, UsedCertificate, load
from harness import PATIENCE, run
from watching import WATCHED, scrape, status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from harness import Command, Daemon, Start

DAY = timedelta(days=1)
NOW = datetime.now(UTC).replace(microsecond=0)
LONG = (NOW - DAY, NOW + 365 * DAY)
EXPIRED = (NOW - 9 * DAY, NOW - 2 * DAY)
EARLY = (NOW + 2 * DAY, NOW + 365 * DAY)
SOON = (NOW - DAY, NOW + 9 * DAY + DAY / 2)

# Extensions with text that is not ASCII, as DER: a SAN with one DNS name, and an AIA with one OCSP responder.
ODD_NAME = made.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, bytes.fromhex("3005 8203 61ff62"))
ODD_URL = made.UnrecognizedExtension(
    ExtensionOID.AUTHORITY_INFORMATION_ACCESS, bytes.fromhex("3011 300f 0608 2b06010505073001 8603 61ff62")
)


def named(*attributes: made.NameAttribute[str] | str) -> made.Name:
    """Build a distinguished name. A plain string becomes a common name."""
    return made.Name(
        each if isinstance(each, made.NameAttribute) else made.NameAttribute(NameOID.COMMON_NAME, each)
        for each in attributes
    )


class Issued:
    """A certificate and its key.

    Args:
        name: the subject.
        by: the issuer; None makes the certificate self-signed.
        valid: the first and the last time of validity.
        ca: whether the certificate is an authority.
        extensions: additional extensions.

    """

    def __init__(
        self,
        name: made.Name,
        by: Issued | None = None,
        *,
        valid: tuple[datetime, datetime] = LONG,
        ca: bool = False,
        extensions: Sequence[made.ExtensionType] = (),
    ) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        issuer = by or self
        self.name = name
        builder = made.CertificateBuilder(
            issuer.name, name, self.key.public_key(), made.random_serial_number(), *valid
        ).add_extension(made.BasicConstraints(ca=ca, path_length=None), critical=True)
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        self.certificate = builder.sign(issuer.key, hashes.SHA256())
        self.pem = self.certificate.public_bytes(serialization.Encoding.PEM)
        self.key_pem = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


class Authorities(NamedTuple):
    """A root certificate, and an intermediate signed by it."""

    root: Issued
    intermediate: Issued


@pytest.fixture(scope="module")
def authorities() -> Authorities:
    root = Issued(named("root"), ca=True)
    return Authorities(root, Issued(named("intermediate"), root, ca=True))


def localhost(by: Issued, **options: Any) -> Issued:
    """Issue a server certificate for localhost."""
    return Issued(named("server"), by, extensions=[made.SubjectAlternativeName([made.DNSName("localhost")])], **options)


def write(path: Path, *parts: bytes) -> str:
    path.write_bytes(b"".join(parts))
    return str(path)


def options(certificate: str, private_key: str = "", client_ca: str = "", name: str = "tls") -> tuple[str, ...]:
    """Return the options of a TLS listener. Without a key file, the certificate file contains the key."""
    listener = f"--listeners.{name}"
    return (
        *(f"{listener}.address", "127.0.0.1:0", f"{listener}.tls.certificate", certificate),
        *(f"{listener}.tls.private-key", private_key or certificate, f"{listener}.tls.client-ca", client_ca),
    )


def client_context(root: Issued, folder: Path, shown: Sequence[Issued] = ()) -> ssl.SSLContext:
    """Return the context of a client that trusts the root and presents a certificate with its intermediates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=root.pem.decode())
    if shown:
        context.load_cert_chain(write(folder / "shown.pem", shown[0].key_pem, *(each.pem for each in shown)))
    return context


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
    assert (result.returncode, result.stdout) == (0, "configuration OK\n")
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
        tls = {"certificate": file, "private_key": file}
        async with Server.listen(logger=structlog.get_logger(), tls=tls):
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


# Fields


def test_subject() -> None:
    """Escape special characters as RFC 4514 requires."""
    names = ((("commonName", " a,b#"),), (("organizationName", "#c"), ("emailAddress", "d ")), (("countryName", "é "),))
    assert x509.subject({"subject": names}) == "C=é\\ ,O=\\#c+emailAddress=d\\ ,CN=\\ a\\,b#"
    assert x509.subject({}) == ""


def test_fields() -> None:
    """Decode each type of string, attribute and time that `cryptography` encodes."""
    strings = [
        made.NameAttribute(NameOID.COUNTRY_NAME, "XX"),
        made.NameAttribute(NameOID.COMMON_NAME, "é,€", _type=_ASN1Type.UTF8String),
        made.NameAttribute(NameOID.ORGANIZATION_NAME, "#Ж ", _type=_ASN1Type.BMPString),
        made.NameAttribute(NameOID.LOCALITY_NAME, "𝄞", _type=_ASN1Type.UniversalString),
        made.NameAttribute(NameOID.EMAIL_ADDRESS, "a@example.org", _type=_ASN1Type.IA5String),
        made.NameAttribute(made.ObjectIdentifier("2.999.3"), "x"),
        made.NameAttribute(made.ObjectIdentifier("1.2.3"), "y"),
    ]
    name = made.Name([*(made.RelativeDistinguishedName([each]) for each in strings[:-2]), pair(*strings[-2:])])
    for valid in (
        (datetime(1950, 1, 1, tzinfo=UTC), datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (datetime(1999, 12, 31, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
    ):
        issued = Issued(name, valid=valid)
        ((subject, *dates),) = x509.read(issued.pem)
        assert tuple(dates) == valid
        assert subject == "1.2.3=y+2.999.3=x,emailAddress=a@example.org,L=𝄞,O=\\#Ж\\ ,CN=é\\,€,C=XX"


def pair(*attributes: made.NameAttribute[str]) -> made.RelativeDistinguishedName:
    return made.RelativeDistinguishedName(attributes)


def test_other_forms_of_pem(authorities: Authorities, tmp_path: Path) -> None:
    """Read certificates with OpenSSL's own PEM labels too, in the order of the file."""
    root, intermediate = authorities
    trusted = subprocess.run(
        ["openssl", "x509", "-trustout", "-addtrust", "clientAuth"], input=root.pem, capture_output=True, check=True
    ).stdout
    assert b"TRUSTED" in trusted
    labelled = intermediate.pem.replace(b"CERTIFICATE", b"X509 CERTIFICATE")
    assert [each.subject for each in x509.read(trusted + b"text\n" + labelled)] == ["CN=root", "CN=intermediate"]
    server = localhost(root)
    spaced = server.pem.replace(b"CERTIFICATE-----", b"CERTIFICATE-----  ")
    file = write(tmp_path / "server.pem", spaced, server.key_pem)
    assert [used.certificate.subject for used in load(file, file, "", "1.2").certificates] == ["CN=server"]


@pytest.mark.parametrize("place", range(0, 200, 7))
def test_invalid_der(authorities: Authorities, place: int) -> None:
    """Raise ValueError for truncated data and for an invalid time."""
    der = authorities.root.certificate.public_bytes(serialization.Encoding.DER)
    with pytest.raises(ValueError, match=r"values to unpack|cut short"):
        x509.read(ssl.DER_cert_to_PEM_cert(der[:place]).encode())
    with pytest.raises(ValueError, match="is not a time"):
        x509.read(ssl.DER_cert_to_PEM_cert(der.replace(b"Z\x17", b"X\x17")).encode())


def test_certificate_that_only_openssl_can_read(command: Command, tmp_path: Path, authorities: Authorities) -> None:
    """Report an invalid time, or a file with only a revocation list, as an error in the settings."""
    root = authorities.root
    server = localhost(root)
    file = write(tmp_path / "server.pem", server.key_pem, server.pem)
    der = root.certificate.public_bytes(serialization.Encoding.DER)
    timeless = ssl.DER_cert_to_PEM_cert(der.replace(b"Z\x17", b"X\x17")).encode()
    line = root.pem.count(b"\n") + 1
    for data, text in (
        (root.pem + timeless, f": the CERTIFICATE in line {line} cannot be decoded: b'"),
        (revocation_list(root), " holds no certificate in PEM form"),
    ):
        clients = write(tmp_path / "clients.pem", data)
        result = command("check", *options(file, client_ca=clients))
        assert result.returncode == 78
        assert f"client_ca: '{clients}'{text}" in result.stderr


def revocation_list(authority: Issued) -> bytes:
    return (
        made.CertificateRevocationListBuilder(authority.name, NOW, NOW + DAY)
        .sign(authority.key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def without_line(pem: bytes, number: int) -> bytes:
    lines = pem.splitlines(keepends=True)
    del lines[number]
    return b"".join(lines)


JUNK = b"-----BEGIN CERTIFICATE-----\nnot base64!\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda pem: without_line(pem, -1), "the CERTIFICATE in line {} has no line '-----END CERTIFICATE-----'"),
        (lambda pem: without_line(pem, -1) + pem, "the CERTIFICATE in line {} has no line '-----END CERTIFICATE-----'"),
        (lambda pem: without_line(pem, 2), "the CERTIFICATE in line {} cannot be decoded"),
        (lambda pem: b"\xef\xbb\xbf" + without_line(pem, 2), "the CERTIFICATE in line {} cannot be decoded"),
        (lambda pem: b"\r\n" + JUNK + pem, "the CERTIFICATE in line {next} cannot be decoded"),
        (
            lambda pem: without_line(pem.replace(b"CERTIFICATE", b"X509 CRL"), 2),
            "the X509 CRL in line {} cannot be decoded",
        ),
    ],
    ids=["cut", "cut-in-the-middle", "truncated", "byte-order-mark", "junk", "revocation-list"],
)
def test_damaged_block(
    tmp_path: Path, authorities: Authorities, damage: Callable[[bytes], bytes], problem: str
) -> None:
    """The message names the block that OpenSSL cannot read, although a good certificate precedes it."""
    server = localhost(authorities.root)
    start = server.key_pem + server.pem
    file = write(tmp_path / "server.pem", start, damage(authorities.root.pem))
    line = start.count(b"\n") + 1
    for files in ((file, file, ""), (write(tmp_path / "good.pem", start), file, file)):
        with pytest.raises(CertificateError) as caught:
            load(*files, "1.2")
        assert str(caught.value) == f"'{file}': {problem.format(line, next=line + 1)}"


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (-1, "the PRIVATE KEY in line 1 has no line '-----END PRIVATE KEY-----'"),
        (2, "the PRIVATE KEY in line 1 cannot be decoded"),
    ],
)
def test_damaged_private_key(tmp_path: Path, authorities: Authorities, number: int, problem: str) -> None:
    server = localhost(authorities.root)
    certificate = write(tmp_path / "server.pem", server.pem)
    key = write(tmp_path / "server.key", without_line(server.key_pem, number))
    with pytest.raises(CertificateError) as caught:
        load(certificate, key, "", "1.2")
    assert str(caught.value) == f"'{key}': {problem}"


def test_private_key_of_another_kind(tmp_path: Path, authorities: Authorities) -> None:
    """A key for key exchange alone has no certificate."""
    certificate = write(tmp_path / "server.pem", localhost(authorities.root).pem)
    encoding = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key = write(tmp_path / "server.key", x25519.X25519PrivateKey.generate().private_bytes(*encoding))
    with pytest.raises(CertificateError) as caught:
        load(certificate, key, "", "1.2")
    assert str(caught.value) == f"'{key}': the PRIVATE KEY in line 1 cannot be used"


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_byte_order_marks(start: Start, tmp_path: Path, authorities: Authorities, end: bytes) -> None:
    """OpenSSL skips the mark of each file that was joined, so the certificate behind it is served and watched."""
    root, intermediate = authorities
    server = localhost(intermediate)
    parts = (b"\xef\xbb\xbf" + each.pem.replace(b"\n", end) for each in (server, intermediate))
    file = write(tmp_path / "server.pem", *parts)
    key = write(tmp_path / "server.key", b"\xef\xbb\xbf" + server.key_pem)
    used = load(file, key, file, "1.2").certificates
    assert [each.certificate.subject for each in used] == ["CN=server", "CN=intermediate"] * 2
    daemon = start(*options(file, key), listen=None)
    with client_context(root, tmp_path).wrap_socket(daemon.connect(), server_hostname="localhost") as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"


def test_revocation_list_beside_a_certificate(tmp_path: Path, authorities: Authorities) -> None:
    """OpenSSL takes a file with a revocation list and a certificate."""
    root = authorities.root
    server = localhost(root)
    file = write(tmp_path / "server.pem", server.key_pem, server.pem, revocation_list(root))
    assert [each.certificate.subject for each in load(file, file, "", "1.2").certificates] == ["CN=server"]
