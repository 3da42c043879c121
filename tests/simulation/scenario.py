"""Describe a simulation as data: listeners, settings and steps.

A new kind of listener (UDP) or of process (workers) is a field here, a choice in `generator.py`, and its rules in
`invariants.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from steps import Step

Mode = Literal["stream", "line", "info"]
Stop = Literal["unhurried", "quiet", "cut", "short", "forced"]

# The daemon's address. Other programs, which may try ports of 127.0.0.1, do not connect to it.
HOST = "127.200.0.1"

# The settings of each kind of stop. In all except `short`, timeouts that end a drain are too long to be reached.
STOPS: Mapping[Stop, Mapping[str, float]] = {
    # Every client finishes by itself.
    "unhurried": {"quiet_period": 60, "drain_timeout": 60, "linger_timeout": 30},
    # Silent clients are closed.
    "quiet": {"quiet_period": 0.1, "drain_timeout": 60, "linger_timeout": 30},
    # Every client is closed after its echo.
    "cut": {"quiet_period": 60, "drain_timeout": 0.1, "linger_timeout": 30},
    # Clients that do not read are reset.
    "short": {"quiet_period": 0.1, "drain_timeout": 0.2, "linger_timeout": 0.2},
    # A second signal resets every client.
    "forced": {"quiet_period": 60, "drain_timeout": 60, "linger_timeout": 30},
}

FAULTS: Mapping[str, Mapping[str, Any]] = {
    "closing": {"after_bytes": 700, "action": "close"},
    "raising": {"after_bytes": 700, "action": "raise"},
    "resetting": {"after_bytes": 700, "action": "reset"},
    "half": {"after_bytes": 700, "action": "half_close"},
    "stalling": {"after_bytes": 700, "action": "stall"},
    "silent": {"after_bytes": 700, "action": "blackhole"},
    "slow": {"delay": 0.01, "rate": 400_000, "slice": 1000},
    # In mode line, where messages do not depend on reads:
    "doubling": {"action": "duplicate"},
    "halving": {"action": "truncate"},
    "flipping": {"action": "corrupt"},
}
LINE_FAULTS = frozenset({"doubling", "halving", "flipping"})


@dataclass(frozen=True, kw_only=True)
class Listener:
    """A listener of the daemon."""

    name: str
    unix: bool = False
    mode: Mode = "stream"
    proxy: bool = False
    tls: Literal["", "server", "mutual"] = ""
    fault: str = ""
    """A key of FAULTS."""

    def settings(self, folder: Path) -> dict[str, Any]:
        """Return the table of this listener, with files in a folder."""
        table: dict[str, Any] = {
            "address": f"unix:{folder / self.name}" if self.unix else f"{HOST}:0",
            "mode": self.mode,
            "fault": self.fault,
            "proxy_protocol": "require" if self.proxy else "off",
        }
        if self.tls:
            table["tls"] = {"certificate": str(folder / "server.pem"), "private_key": str(folder / "server.key")}
        if self.tls == "mutual":
            table["tls"]["client_ca"] = str(folder / "ca.pem")
        return table


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A configuration, and the steps of the clients and the operator."""

    seed: int
    loop: str
    listeners: tuple[Listener, ...]
    limits: Mapping[str, Any] = field(default_factory=dict)
    stop: Stop = "unhurried"
    connections: str = "all"
    steps: tuple[Step, ...] = ()

    def settings(self, folder: Path) -> dict[str, Any]:
        """Return the settings at the start."""
        used = {listener.fault for listener in self.listeners if listener.fault}
        return {
            "loop": self.loop,
            "limits": {"max_connections": 1000, **self.limits},
            "shutdown": dict(STOPS[self.stop]),
            "log": {"connections": self.connections},
            "faults": {name: dict(FAULTS[name]) for name in sorted(used)},
            "listeners": {listener.name: listener.settings(folder) for listener in self.listeners},
        }

    def __str__(self) -> str:
        head = [f"# seed {self.seed}, loop {self.loop}, stop {self.stop} {dict(STOPS[self.stop])}"]
        head += [f"# limits {dict(self.limits)}, log.connections {self.connections}"]
        head += [f"# {listener}" for listener in self.listeners]
        return "\n".join(head + [f"{number:3}  {step}" for number, step in enumerate(self.steps)])


def toml(settings: Mapping[str, Any], prefix: str = "") -> str:
    """Return settings as TOML. Values of JSON have the same syntax."""
    values = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items() if not isinstance(value, dict)]
    tables = [toml(value, f"{prefix}{key}.") for key, value in settings.items() if isinstance(value, dict)]
    return (f"[{prefix.rstrip('.')}]\n" if prefix and values else "") + "".join(values) + "".join(tables)
