"""Build the TLS context of a listener from its settings. Every error names the file that is at fault."""

from __future__ import annotations

import contextlib
import ssl
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple

from echod.net import files, openssl, pem, x509

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Role = Literal["server", "intermediate", "client_ca"]
"""How a listener uses a certificate."""

Trouble = Literal["certificate_expired", "certificate_not_yet_valid", "certificate_ends_soon"]

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

# Warn if a certificate expires within this time.
_SOON = timedelta(days=14)

_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, for which the ssl module has no name


class CertificateError(ValueError):
    """A file cannot be used; `key` says which setting named it."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


class CertificateWarning(NamedTuple):
    """A warning about the validity of a certificate, which is used all the same."""

    event: Trouble
    key: str
    """The setting that names the file."""
    fields: dict[str, object]
    text: str


class UsedCertificate(NamedTuple):
    """A certificate that a listener depends on."""

    role: Role
    file: str
    certificate: x509.Certificate

    def warning(self, now: datetime) -> CertificateWarning | None:
        """Return the warning about the certificate at that time, if there is one."""
        not_before, not_after = self.certificate.not_before, self.certificate.not_after
        if not_after < now:
            return self._warned("certificate_expired", f"expired at {iso(not_after)}", not_after=iso(not_after))
        if not_before > now:
            text = f"is not valid before {iso(not_before)}"
            return self._warned("certificate_not_yet_valid", text, not_before=iso(not_before))
        if not_after - now < _SOON:
            days = (not_after - now).days
            text = f"expires in {days} days, at {iso(not_after)}"
            return self._warned("certificate_ends_soon", text, days=days, not_after=iso(not_after))
        return None

    def _warned(self, event: Trouble, text: str, **details: object) -> CertificateWarning:
        subject = self.certificate.subject
        key = "client_ca" if self.role == "client_ca" else "certificate"
        fields = {"file": self.file, "subject": subject, **details}
        return CertificateWarning(event, key, fields, f"{self.file!r}: the certificate {subject!r} {text}")


class ServerTls(NamedTuple):
    """The TLS context of a listener, and its certificates."""

    context: ssl.SSLContext
    certificates: tuple[UsedCertificate, ...]
    """The server's own, its intermediates, and the authorities of clients."""

    def warnings(self, now: datetime) -> Iterator[CertificateWarning]:
        """Yield a warning for each certificate that is invalid at that time, or will be soon."""
        for used in self.certificates:
            if (warning := used.warning(now)) is not None:
                yield warning

    @property
    def first_to_expire(self) -> UsedCertificate:
        """The certificate that expires first."""
        return min(self.certificates, key=lambda used: used.certificate.not_after)


def iso(when: datetime) -> str:
    """Return a time in UTC as RFC 3339 writes it."""
    return when.isoformat().replace("+00:00", "Z")


class ServerName(ssl.SSLObject):
    """A connection that keeps the name the client asked for."""

    server_name: str | None = None


def read(file: str) -> bytes:
    """Return the content of a file."""
    return files.read(file).data


def load(
    certificate: str,
    private_key: str,
    client_ca: str,
    minimum_version: str,
    read: Callable[[str], bytes] = read,
) -> ServerTls:
    """Load the certificates of a listener, and verify that clients would accept it, except for its dates.

    OpenSSL's security level determines the ciphers. Renegotiation is off, because a TLS 1.2 client could cause load with
    it at no cost.

    Args:
        certificate: file with the certificate and its intermediates, PEM.
        private_key: file with its key, PEM, not encrypted.
        client_ca: file with the authorities of clients, PEM; empty: clients are not asked for a certificate. An
            intermediate authority is enough.
        minimum_version: "1.2" or "1.3".
        read: reads a file. A cached function reads each file once, so that listeners can share a pipe.

    Raises:
        CertificateError: a file cannot be read, or its content cannot be used.

    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[minimum_version]
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.sslobject_class = ServerName
    context.sni_callback = _keep_name
    with _blamed("certificate", certificate):
        chain_data = read(certificate)
    with _blamed("private_key", private_key):
        key_data = read(private_key)
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    leaf, *intermediates = _trust(trusting, "certificate", certificate, chain_data)
    _load_chain(context, certificate, chain_data, private_key, key_data)
    # Before verify_mode is set: the client of this handshake has no certificate.
    leaf = leaf._replace(subject=_try(context, trusting, certificate))
    used = [
        UsedCertificate("server", certificate, leaf),
        *(UsedCertificate("intermediate", certificate, each) for each in intermediates),
    ]
    if client_ca:
        with _blamed("client_ca", client_ca):
            data = read(client_ca)
        used += (
            UsedCertificate("client_ca", client_ca, each) for each in _trust(context, "client_ca", client_ca, data)
        )
        context.verify_mode = ssl.CERT_REQUIRED
    return ServerTls(context, tuple(used))


def _keep_name(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> None:
    assert isinstance(connection, ServerName)
    connection.server_name = name


@contextlib.contextmanager
def _blamed(key: str, file: str) -> Iterator[None]:
    """Turn an OSError into a CertificateError for the setting and its file."""
    try:
        yield
    except OSError as error:
        message = f"{file!r} cannot be read: {error.strerror}"
        raise CertificateError(message, key) from error


def _trust(context: ssl.SSLContext, key: str, file: str, data: bytes) -> list[x509.Certificate]:
    """Trust each certificate in the data, also one that is not self-signed, and return their fields."""
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    blocks = list(pem.blocks(data))
    missing = f"{file!r} holds no certificate in PEM form"
    if any(block.is_private_key for block in blocks):
        missing = f"{file!r} holds a private key and no certificate: a private key belongs under private_key"
    failure: ssl.SSLError | None = None
    with _blamed(key, file):
        try:
            with pem.named(data) as name:
                context.load_verify_locations(name)
        except ssl.SSLError as error:
            failure = error
        # OpenSSL may read a block without an end, and then ignores the next block.
        if failure is not None or not all(block.is_complete for block in blocks):
            problems = ((block, block.problem()) for block in blocks)
            bad = next((f"{file!r}: {block} {problem}" for block, problem in problems if problem), missing)
            raise CertificateError(bad, key) from failure
    certificates: list[x509.Certificate] = []
    for block in blocks:
        try:
            certificates += x509.read(block.data)
        except ValueError as error:
            message = f"{file!r}: {block} cannot be decoded: {error}"
            raise CertificateError(message, key) from error
    if not certificates:
        raise CertificateError(missing, key)
    return certificates


def _load_chain(
    context: ssl.SSLContext, certificate: str, chain_data: bytes, private_key: str, key_data: bytes
) -> None:
    encrypted = False

    def ask() -> str:
        nonlocal encrypted
        encrypted = True
        return ""

    with _blamed("private_key", private_key):
        try:
            pem.load_pair(context, chain_data, key_data, ask)
        except ssl.SSLError as error:
            if encrypted:
                message = (
                    f"{private_key!r} is encrypted: store it without a passphrase, because a daemon cannot ask for one"
                )
            elif error.reason == "KEY_VALUES_MISMATCH":
                message = f"{private_key!r} is not the key of the certificate in {certificate!r}"
            elif error.reason in {"EE_KEY_TOO_SMALL", "CA_MD_TOO_WEAK", "CA_KEY_TOO_SMALL"}:
                message = f"{certificate!r}: {openssl.explain(error)} for OpenSSL's security level"
                raise CertificateError(message, "certificate") from error
            else:
                message = _key_problem(private_key, list(pem.blocks(key_data)))
            raise CertificateError(message, "private_key") from error


def _key_problem(file: str, blocks: list[pem.Block]) -> str:
    """Return the reason why OpenSSL finds no usable private key in a file."""
    for block in blocks:
        if block.is_private_key:
            return f"{file!r}: {block} {block.problem() or 'cannot be used'}"
    if any(block.label.endswith("CERTIFICATE") for block in blocks):
        return f"{file!r} holds a certificate and no private key: a certificate belongs under certificate"
    return f"{file!r} holds no private key in PEM form"


def _try(context: ssl.SSLContext, trusting: ssl.SSLContext, certificate: str) -> str:
    """Do a handshake in memory with a client that trusts the file, and return the certificate's subject."""
    trusting.check_hostname = False
    trusting.verify_flags |= _NO_CHECK_TIME
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(there, back, server_side=True)
    client = trusting.wrap_bio(back, there)
    try:
        # TLS 1.2 needs all five steps; OpenSSL's configuration may forbid later versions.
        for side in (client, server, client, server, client):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        found = client.getpeercert()
    except ssl.SSLCertVerificationError as error:
        message = f"{certificate!r}: the certificate would be refused: {error.verify_message}"
        raise CertificateError(message, "certificate") from error
    except ssl.SSLError as error:
        message = f"{certificate!r}: the certificate cannot be used: {openssl.explain(error)}"
        raise CertificateError(message, "certificate") from error
    except ValueError as error:  # a name or a URL in it that is not UTF-8
        message = f"{certificate!r}: the certificate cannot be decoded: {error}"
        raise CertificateError(message, "certificate") from error
    assert found
    return x509.subject(found)
