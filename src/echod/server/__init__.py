"""The echo server of one listener.

`server` owns the parts: the listener task accepts, each client has a task, the sweep applies the timeouts, the drain ends
the clients, and the ledger counts and logs them. This package may import `connection`, `net`, `settings.model` and the
modules below them. It never imports the daemon, the admin listener or `embed`, and it loads no settings.
"""
