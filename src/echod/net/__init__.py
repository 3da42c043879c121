"""Addresses, sockets and what belongs to them, without an event loop.

`addresses` converts text to addresses and back, and `resolver` looks up host names. `listeners` opens listening
sockets, `listen_errors` explains why one cannot be opened, and `inherited` takes over those of the service manager.
`kernel` asks the kernel about a connection, and `proxy_protocol` parses and encodes PROXY headers. `certificates` builds
TLS contexts with `x509`, `pem` and `openssl`.
Modules of this package may import `echod.text`, `echod.threads` and each other.
"""
