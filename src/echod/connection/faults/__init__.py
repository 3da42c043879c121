"""Connections that misbehave on purpose, as a profile in `[faults.NAME]` says.

`session` is the only module with I/O. It divides reads into messages (`framer`), asks what to do with each message
(`injector`) and delays, slows or slices the echo (`shaper`). This package may import `echod.connection`, `echod.net`
and the settings models. Only listeners with a fault use it.
"""
