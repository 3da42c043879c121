"""echod: a TCP echo daemon that returns every byte and says exactly what it did (RFC 862)."""

__version__ = "0.1.0"
