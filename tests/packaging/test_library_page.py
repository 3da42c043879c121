"""The programs in docs/how-to/library.md and examples/embedded.py."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from harness import PATIENCE, receive

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "library.md"
EXAMPLE = ROOT / "examples" / "embedded.py"


def programs() -> list[str]:
    """Return the programs in docs/how-to/library.md."""
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_server(number: signal.Signals) -> None:
    """The first program ends gracefully at Ctrl-C and SIGTERM: no traceback, and the client has all its echo."""
    command = [sys.executable, "-c", programs()[0]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            port = int(process.stdout.readline().split()[-1])
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
                client.sendall(b"hello\n")
                assert receive(client, 6) == b"hello\n"
                client.sendall(b"rest")
                process.send_signal(number)
                assert receive(client, 5) == b"rest"
            output, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, "")
    assert output.startswith("Receipt(clients=1,")
    assert "unsent_bytes=0, unacked_bytes=0," in output


def test_other_programs() -> None:
    """The other programs run to their end."""
    _, *others = programs()
    results = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
        for program in others
    ]
    assert [(result.returncode, result.stderr) for result in results] == [(0, "")] * 2
    server, receipt = (result.stdout for result in results)
    assert re.fullmatch(r"<Server 127\.0\.0\.1:\d+ not started, clients=0>\n", server)
    assert receipt == "1 client, 1 reset\n"


def test_example() -> None:
    result = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=PATIENCE)
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "b'hello, echo\\r\\nunfinished'",
        "23 bytes received, 23 acknowledged, end: eof",
        "0 clients were left, 0 bytes unsent",
    ]
