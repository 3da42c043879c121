"""The client behind `echod probe`: one quick check of an echo server, or a measurement of it.

`arguments` reads the command line, and `command` chooses between `check` and the measurement. `load` is the loop of a
measurement: `workloads` decide when it sends, `connection` compares the echo, `latencies` counts, and `report` shows the
results. The quick check is a container's health check, so it imports no more than it needs: no settings, no
measurement, and TLS only on request. The modules here import `echod.net`, modules without a package and each other.
"""
