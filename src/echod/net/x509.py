"""Read the subject and the validity of certificates (RFC 5280).

The ssl module decodes the certificate of a verified peer, and authorities. It cannot decode any other certificate in a
file. So this module reads three fields from the DER.
"""

from __future__ import annotations

import binascii
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_PEM = re.compile(
    rb"^-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----\s(.*?)^-----END (?:X509 |TRUSTED )?CERTIFICATE-----",
    re.DOTALL | re.MULTILINE,
)

# Tags of DER (X.690).
_UTC_TIME, _VERSION = 0x17, 0xA0
# Encodings of the string types that are not ASCII.
_ENCODINGS = {0x0C: "utf-8", 0x14: "latin-1", 0x1C: "utf-32-be", 0x1E: "utf-16-be"}

_FIRST_UTC_YEAR = b"50"  # 1950; the last one is 2049
_TIME = re.compile(rb"(\d{4})(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)Z")

# RFC 4514, section 3; by the names that OpenSSL has, and by the identifiers in DER.
_SHORT = {
    "commonName": "CN",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
    "2.5.4.3": "CN",
    "2.5.4.5": "serialNumber",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
    "2.5.4.6": "C",
    "2.5.4.9": "STREET",
    "2.5.4.97": "organizationIdentifier",
    "0.9.2342.19200300.100.1.25": "DC",
    "0.9.2342.19200300.100.1.1": "UID",
    "1.2.840.113549.1.9.1": "emailAddress",
}

# Kinds of subject alternative names in order of preference. SPIFFE allows a single URI, and DNS names beside it.
_ALTERNATIVES = ("URI", "DNS", "email", "IP Address")


class Certificate(NamedTuple):
    """The fields of a certificate that concern its operator."""

    subject: str
    """As RFC 4514 writes it."""
    not_before: datetime
    not_after: datetime


def read(data: bytes) -> list[Certificate]:
    """Return the certificates in PEM data, in the order of the file. OpenSSL must have loaded the data before.

    Raises:
        ValueError: one does not follow RFC 5280.

    """
    return [_parse(binascii.a2b_base64(block)) for block in _PEM.findall(data.replace(b"\r", b""))]


def subject(certificate: Mapping[str, Any]) -> str:
    """Return the subject of a certificate that the ssl module has decoded.

    A certificate may have an empty subject and only alternative names (SPIFFE). Then one of these is returned.
    """
    if name := _text(certificate.get("subject", ())):
        return name
    alternatives = certificate.get("subjectAltName", ())
    return next((str(value) for kind in _ALTERNATIVES for found, value in alternatives if found == kind), "")


# Names as text


def _text(name: Iterable[Iterable[tuple[str, str]]]) -> str:
    """Return a name with the most specific part first and the special characters of RFC 4514 escaped."""
    parts = ["+".join(f"{_SHORT.get(kind, kind)}={_escape(value)}" for kind, value in part) for part in name]
    return ",".join(reversed(parts))


def _escape(value: str) -> str:
    escaped = "".join(f"\\{char}" if char in '"+,;<>\\' else char for char in value)
    if escaped.startswith((" ", "#")):
        escaped = f"\\{escaped}"
    return f"{escaped[:-1]}\\ " if escaped.endswith(" ") and len(value) > 1 else escaped


# DER


def _parse(der: bytes) -> Certificate:
    (_, certificate), *_ = _values(der)  # OpenSSL's TRUSTED CERTIFICATE has trust settings after it
    (_, signed), *_ = _values(certificate)
    fields = [field for field in _values(signed) if field[0] != _VERSION]
    _serial, _algorithm, _issuer, (_, validity), (_, name), *_ = fields
    not_before, not_after = _values(validity)
    return Certificate(_text(_parts(name)), _time(*not_before), _time(*not_after))


def _values(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the tag and the content of each value."""
    while data:
        tag, size, *_ = data[:2].ljust(2, b"\xff")
        start = 2
        if size & 0x80:  # the size of the size
            start += size & 0x7F
            size = int.from_bytes(data[2:start])
        end = start + size
        if end > len(data):
            msg = "a value is cut short"
            raise ValueError(msg)
        yield tag, data[start:end]
        data = data[end:]


def _time(tag: int, content: bytes) -> datetime:
    if tag == _UTC_TIME:  # it has two digits of the year
        content = (b"19" if content >= _FIRST_UTC_YEAR else b"20") + content
    match = _TIME.fullmatch(content)
    if match is None:
        msg = f"{content!r} is not a time"
        raise ValueError(msg)
    year, month, day, hour, minute, second = map(int, match.groups())
    return datetime(year, month, day, hour, minute, second, tzinfo=UTC)


def _parts(name: bytes) -> Iterator[list[tuple[str, str]]]:
    for _, part in _values(name):
        yield [_attribute(attribute) for _, attribute in _values(part)]


def _attribute(content: bytes) -> tuple[str, str]:
    (_, oid), (tag, value) = _values(content)
    return _dotted(oid), value.decode(_ENCODINGS.get(tag, "ascii"), "backslashreplace")


def _dotted(oid: bytes) -> str:
    """Return an object identifier as text. The first two numbers share one value."""
    numbers, number = [], 0
    for octet in oid:
        number = number << 7 | octet & 0x7F
        if not octet & 0x80:
            numbers.append(number)
            number = 0
    both, *rest = numbers
    first = min(both // 40, 2)
    return ".".join(map(str, (first, both - 40 * first, *rest)))
