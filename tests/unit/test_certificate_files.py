"""Test the content of certificate files: fields, encodings and damaged blocks."""

from __future__ import annotations

import ssl
import subprocess
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from cryptography import x509 as made
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID

from echod.net import x509
from echod.net.certificates import CertificateError, load
from issuing import DAY, NOW, Authorities, Issued, client_context, localhost, options, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from harness import Command, Start


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
        (root.pem + timeless, f": the CERTIFICATE on line {line} cannot be decoded: b'"),
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
        (lambda pem: without_line(pem, -1), "the CERTIFICATE on line {} has no line '-----END CERTIFICATE-----'"),
        (lambda pem: without_line(pem, -1) + pem, "the CERTIFICATE on line {} has no line '-----END CERTIFICATE-----'"),
        (lambda pem: without_line(pem, 2), "the CERTIFICATE on line {} cannot be decoded"),
        (lambda pem: b"\xef\xbb\xbf" + without_line(pem, 2), "the CERTIFICATE on line {} cannot be decoded"),
        (lambda pem: b"\r\n" + JUNK + pem, "the CERTIFICATE on line {next} cannot be decoded"),
        (
            lambda pem: without_line(pem.replace(b"CERTIFICATE", b"X509 CRL"), 2),
            "the X509 CRL on line {} cannot be decoded",
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
        (-1, "the PRIVATE KEY on line 1 has no line '-----END PRIVATE KEY-----'"),
        (2, "the PRIVATE KEY on line 1 cannot be decoded"),
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
    assert str(caught.value) == f"'{key}': the PRIVATE KEY on line 1 cannot be used"


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
