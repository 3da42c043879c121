"""UDP echo (RFC 862): guards against loops, flows, the ledger, and calibrated loss.

`guards`, `bucket`, `flows` and `shaping` do no I/O. `echo` is the receive path of one socket, and `server` has the verbs of
`echod.server.server.Server`. This package may import `echod.connection.faults`, `echod.net` and the settings models.
"""
