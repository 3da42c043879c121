"""Describe errors of OpenSSL."""

from __future__ import annotations

import ssl


def explain(error: ssl.SSLError) -> str:
    """Return an error of OpenSSL as text."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError):
        return "the connection ended without close_notify"
    return (error.reason or str(error)).replace("_", " ").lower()
