"""Issue certificates with any names, dates and extensions."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from cryptography import x509 as made
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


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
