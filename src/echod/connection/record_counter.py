"""Follow the record boundaries of a TLS client's data, which the ssl module does not report."""

from __future__ import annotations

# A record begins with its type, its version and the size of its body (RFC 8446, section 5.1).
_HEADER = 5

# A first byte with this bit begins a ClientHello in the format of SSL 2 (RFC 5246, appendix E.2). OpenSSL accepts it.
_SSL2 = 0x80


class RecordCounter:
    """Count the bytes that are missing up to the next record boundary."""

    __slots__ = ("_header", "_known", "_missing")

    def __init__(self) -> None:
        self._header = b""
        self._missing = 0
        self._known: bool | None = None

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next data of the client, at least one byte. This looks at record headers only."""
        if self._known is None:
            self._known = not data[0] & _SSL2
        if not self._known:
            return
        position = self._missing
        if self._header:
            position = -len(self._header)
            self._header += data[: _HEADER + position]
            if len(self._header) < _HEADER:
                return
            position += _HEADER + _body(self._header, 0)
        end = len(data) - _HEADER
        while position <= end:
            position += _HEADER + _body(data, position)
        self._missing = max(0, position - len(data))
        self._header = bytes(data[position:])

    @property
    def is_inside(self) -> bool:
        """Whether the data so far ends inside a record. False after a ClientHello in the format of SSL 2."""
        return bool(self._missing or self._header)


def _body(data: bytes | memoryview, position: int) -> int:
    """Return the size of the body of the record whose header is at this position."""
    return data[position + 3] << 8 | data[position + 4]
