"""The options of `Server.listen` and `ServerThread` as types, so that a type checker knows every key.

docs/reference/configuration.md describes the keys. A test compares them with the models of the settings.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, TypedDict

Size = int | str
"""Bytes, or a text with a unit, such as "64KiB"."""
Seconds = float | str
"""Seconds, or a text with a unit, such as "250ms"."""
FileName = str | os.PathLike[str]
Networks = Sequence[str]


class LimitsOptions(TypedDict, total=False):
    """The keys of `[limits]`. The program sets its limit of descriptors itself; accepting pauses if none is free."""

    max_connections: int
    max_connections_per_client: int
    backlog: int
    idle_timeout: Seconds
    write_timeout: Seconds
    handshake_timeout: Seconds
    write_buffer: Size
    max_line: Size
    datagram_rate: int
    datagram_burst: int
    datagram_total_rate: int
    max_flows: int
    flow_timeout: Seconds


class ShutdownOptions(TypedDict, total=False):
    """The keys of `[shutdown]`."""

    delay: Seconds
    quiet_period: Seconds
    drain_timeout: Seconds
    linger_timeout: Seconds


class FaultOptions(TypedDict, total=False):
    """The keys of a `[faults.NAME]`."""

    trigger: str | None
    after_bytes: Size | None
    after_seconds: Seconds | None
    probability: float | None
    burst: float | None
    seed: int | None
    action: (
        Literal[
            "raise", "close", "reset", "half_close", "stall", "blackhole", "corrupt", "duplicate", "truncate", "drop"
        ]
        | None
    )
    delay: Seconds
    jitter: Seconds
    reorder: bool
    rate: Size | None
    slice: Size | None


class IssuedTlsOptions(TypedDict, total=False):
    """The keys of a listener's `tls` except the certificate and its key, which a `ServerThread` issues itself."""

    client_ca: FileName
    minimum_version: Literal["1.2", "1.3"]


class TlsOptions(IssuedTlsOptions):
    """The keys of a listener's `tls`."""

    certificate: FileName
    private_key: FileName


class CommonOptions(TypedDict, total=False):
    """The options of every server. Names, defaults and checks are those of the settings."""

    mode: Literal["stream", "line", "info"]
    limits: LimitsOptions
    shutdown: ShutdownOptions
    proxy_protocol: Literal["off", "require"]
    proxy_trusted: Networks
    allow: Networks
    fault: FaultOptions


class ServerOptions(CommonOptions, total=False):
    """The options of `Server.listen`."""

    socket_mode: str
    tls: TlsOptions


class ThreadOptions(CommonOptions, total=False):
    """The options of a `ServerThread`, of the marker `echod` and of the fixture `echod_factory`."""

    tls: bool | IssuedTlsOptions | TlsOptions
    """True: issue a certificate for the test. Without a certificate in the dict, one is issued too."""
    loop: Literal["auto", "uvloop", "asyncio"]
