"""One accepted connection, from its transport to the final counts.

`echo` has the session and an overview of its life; `line` and `info` are the other modes, and `faults` misbehaves on
purpose. `proxy_header` and `tls` stand between a transport and its session, and `linger` replaces the session after
FIN. `state` has the phases of a connection, and `outcome` the reasons for its end.

This package imports `echod.net`, `echod.clock` and, for types only, `echod.settings.model`. It never calls the server.
"""
