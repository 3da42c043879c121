"""Run commands in their own network and mount namespaces, with kernel settings and a name server for the test."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE

if TYPE_CHECKING:
    from pathlib import Path

# The address of a name server that never answers. The loopback device drops packets to foreign addresses.
DEAD_SERVER = "192.0.2.53"


def namespace(*commands: str) -> list[str]:
    """Return the prefix of a command line that runs the command in its own namespaces.

    Args:
        commands: shell commands that run first, when the loopback device is up.

    """
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("not installed: unshare, ip (Debian: util-linux, iproute2)")
    script = "; ".join(["set -e", "ip link set lo up", *commands, 'exec "$@"'])
    prefix = ["unshare", "--net", "--mount", "sh", "-c", script, "sh"]
    done = subprocess.run([*prefix, "true"], capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        pytest.skip(f"there can be no namespace here: {done.stderr.strip()}")
    return prefix


def without_name_server(folder: Path) -> list[str]:
    """Return the prefix of a command line that makes each name lookup of the command wait for minutes."""
    configuration, hosts = folder / "resolv.conf", folder / "hosts"
    configuration.write_text(f"nameserver {DEAD_SERVER}\noptions timeout:30 attempts:5\n")
    hosts.touch()
    return namespace(
        f"ip route add {DEAD_SERVER} dev lo",
        f"mount --bind {shlex.quote(str(configuration))} /etc/resolv.conf",
        f"mount --bind {shlex.quote(str(hosts))} /etc/hosts",
    )
