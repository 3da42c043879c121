"""The UDP probe against the echo servers of other projects."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE, clean_environment, run, until
from namespaces import namespace
from probing import measure

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.once

# An address of this process alone, and a port that the kernel does not give to clients.
HOST = f"127.44.{os.getpid() // 250 % 250}.{os.getpid() % 250 + 1}"
PORT = 7007
TARGET = f"udp:{HOST}:{PORT}"

XINETD = f"""\
service echo
{{
    type = INTERNAL UNLISTED
    socket_type = dgram
    protocol = udp
    wait = yes
    bind = {HOST}
    port = {PORT}
}}
"""


def answers() -> bool:
    """Return whether a datagram comes back."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        sock.connect((HOST, PORT))
        try:
            sock.send(b"?")
            return sock.recv(1) == b"?"
        except (ConnectionRefusedError, TimeoutError):
            return False


@contextlib.contextmanager
def server(*command: str) -> Iterator[None]:
    """Run a server until the end of the block, its own children included."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"not installed: {command[0]}")
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        try:
            until(answers)
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "command",
    [
        ("socat", f"UDP-LISTEN:{PORT},bind={HOST},fork", "PIPE"),
        ("ncat", "--udp", "--listen", "--keep-open", HOST, str(PORT), "--exec", "/bin/cat"),
    ],
)
def test_servers(command: tuple[str, ...]) -> None:
    """Both echo every datagram if only one is in flight."""
    with server(*command):
        assert run("probe", TARGET).returncode == 0
        found = measure(TARGET, "--count", "300", "--size", "1400", "--timeout", "60")
    assert (found["sent"], found["received"], found["corrupted"], found["foreign"]) == (300, 300, 0, 0)


def test_xinetd(tmp_path: Path) -> None:
    """The quick check passes. A measurement may find losses, as xinetd discards what arrives while it answers."""
    config = tmp_path / "xinetd.conf"
    config.write_text(XINETD)
    with server("xinetd", "-dontfork", "-f", str(config), "-pidfile", str(tmp_path / "pid")):
        assert run("probe", TARGET).returncode == 0


INETD = """\
timeout 120 "$1" -i "$2" &
trap 'kill %1' EXIT
shift 2
until "$@" >/dev/null 2>&1; do sleep 0.1; done
"$@" --count 300 --json
"$@" --count 300 --size 0 --json
"""


def test_openbsd_inetd(tmp_path: Path) -> None:
    """The echo of openbsd-inetd returns every datagram. It refuses loopback addresses, so it gets another one."""
    inetd = shutil.which(os.environ.get("INETD", "inetd"))
    if inetd is None:
        pytest.skip("not installed: inetd (Debian: openbsd-inetd)")
    config = tmp_path / "inetd.conf"
    config.write_text("192.0.2.1:echo dgram udp wait root internal\n")
    probe = [sys.executable, "-m", "echod", "probe", "udp:192.0.2.1:7"]
    command = [
        *namespace("ip address add 192.0.2.1/32 dev lo"),
        "bash",
        "-c",
        INETD,
        "bash",
        inetd,
        str(config),
        *probe,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE, env=clean_environment())
    assert (done.returncode, done.stderr) == (0, "")
    for line in done.stdout.splitlines():
        found = json.loads(line)
        assert (found["sent"], found["received"], found["corrupted"], found["foreign"]) == (300, 300, 0, 0)
    assert done.stdout.count("\n") == 2
