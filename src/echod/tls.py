"""From the settings of a listener's TLS to a context, every mistake in them told with the file it is in."""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from typing import NamedTuple

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

# A certificate that ends within this time is warned of, seconds.
_SOON = 14 * 86400

_EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED


class TlsError(ValueError):
    """A file cannot be used; `key` says which setting named it."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


class Tls(NamedTuple):
    """What a listener needs for TLS."""

    context: ssl.SSLContext
    certificate: str
    """The file."""
    expires: float
    """When the certificate ends, seconds since the epoch."""

    @property
    def ends_soon(self) -> bool:
        """Whether the certificate ends within 14 days."""
        return self.expires - time.time() < _SOON


class ServerName(ssl.SSLObject):
    """A connection that keeps the name the client asked for."""

    server_name: str | None = None


def load(certificate: str, private_key: str, client_ca: str, minimum_version: str) -> Tls:
    """Load what a server shows, and make sure that a client would take it.

    Ciphers are left to OpenSSL's own level; renegotiation, with which a client of TLS 1.2 can make a server work for
    nothing, is off.

    Args:
        certificate: file with the certificate and the ones between it and its authority, PEM.
        private_key: file with its key, PEM, not encrypted.
        client_ca: file with the authorities one of which has to have signed a client's certificate, PEM; empty: none
            is asked for.
        minimum_version: "1.2" or "1.3".

    Raises:
        TlsError: a file cannot be read, does not hold what it should, or the certificate has ended.

    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[minimum_version]
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.sslobject_class = ServerName
    context.sni_callback = _keep_name
    _load_chain(context, certificate, private_key)
    if client_ca:
        _load_authorities(context, "client_ca", client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return Tls(context, certificate, _expiry(context, certificate))


def _keep_name(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> None:
    assert isinstance(connection, ServerName)
    connection.server_name = name


def _load_chain(context: ssl.SSLContext, certificate: str, private_key: str) -> None:
    for key, file in (("certificate", certificate), ("private_key", private_key)):
        try:
            Path(file).read_bytes()
        except OSError as error:
            message = f"{file!r} cannot be read: {error.strerror}"
            raise TlsError(message, key) from error
    _load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "certificate", certificate)
    encrypted = False

    def ask() -> str:
        nonlocal encrypted
        encrypted = True
        return ""

    try:
        context.load_cert_chain(certificate, private_key, ask)
    except ssl.SSLError as error:
        if encrypted:
            message = f"{private_key!r} is encrypted: a daemon has nobody to ask, so store it without a passphrase"
        elif error.reason == "KEY_VALUES_MISMATCH":
            message = f"{private_key!r} is not the key of the certificate in {certificate!r}"
        elif error.reason in {"EE_KEY_TOO_SMALL", "CA_MD_TOO_WEAK", "CA_KEY_TOO_SMALL"}:
            message = f"{certificate!r}: {_reason(error)}, for OpenSSL's security level"
            raise TlsError(message, "certificate") from error
        else:
            message = f"{private_key!r} holds no private key in PEM form"
        raise TlsError(message, "private_key") from error


def _load_authorities(context: ssl.SSLContext, key: str, file: str) -> None:
    try:
        context.load_verify_locations(file)
    except ssl.SSLError as error:
        message = f"{file!r} holds no certificate in PEM form"
        raise TlsError(message, key) from error
    except OSError as error:
        message = f"{file!r} cannot be read: {error.strerror}"
        raise TlsError(message, key) from error


def _expiry(context: ssl.SSLContext, certificate: str) -> float:
    """Return when the certificate ends, by a handshake with a client that trusts just what is in the file.

    The ssl module shows the fields of a certificate only to whoever has verified it.
    """
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    trusting.load_verify_locations(certificate)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(there, back, server_side=True)
    client = trusting.wrap_bio(back, there)
    for side in (client, server, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            what = "has expired" if error.verify_code == _EXPIRED else f"would be refused: {error.verify_message}"
            message = f"{certificate!r}: the certificate {what}"
            raise TlsError(message, "certificate") from error
        except ssl.SSLError as error:
            message = f"{certificate!r}: the certificate cannot be used: {_reason(error)}"
            raise TlsError(message, "certificate") from error
    found = client.getpeercert()
    assert found
    return float(ssl.cert_time_to_seconds(str(found["notAfter"])))


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "").replace("_", " ").lower()
