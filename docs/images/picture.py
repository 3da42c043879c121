"""Draw docs/images/terminal.svg: the server's terminal above the client's. `make picture` runs it.

It runs echod on the ports 8000 and 8001. It requires the extra `probe`, and tests/support in PYTHONPATH.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from terminal import COLUMNS, Terminal

PICTURE = Path(__file__).with_name("terminal.svg")
CONFIG = """
[limits]
max_connections = 1000

[listeners.good]
address = "127.0.0.1:8000"

[listeners.flaky]
address = "127.0.0.1:8001"
fault = "torn"

[faults.torn]
after_bytes = 32
action = "close"
"""
FOREGROUND = (230, 237, 243)
RED, YELLOW = (255, 123, 114), (227, 179, 65)
THEME = TerminalTheme((13, 17, 23), FOREGROUND, [FOREGROUND, RED, FOREGROUND, YELLOW, *[FOREGROUND] * 4])
# The fields are rich's. The background is dark on light and dark pages, and the font is the reader's own.
FORMAT = """<svg viewBox="0 0 {width} {{height}}" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="A session with echod">
<style>
.{unique_id}-matrix {{ font: 20px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre }}
{styles}
</style>
<defs>{lines}</defs>
<rect width="100%" height="100%" rx="8" fill="#0d1117" stroke="#30363d" stroke-width="2"/>
<g transform="translate({terminal_x}, 12)">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def probe(port: int) -> str:
    """Return the command of a quick check and its output, as a terminal shows them."""
    arguments = ("probe", f"127.0.0.1:{port}")
    command = [sys.executable, "-m", "echod", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"$ echod {' '.join(arguments)}\n{result.stdout}{result.stderr}"


def session() -> tuple[str, str]:
    """Return the output of the server and of its clients."""
    with TemporaryDirectory() as folder:
        config = Path(folder) / "lab.toml"
        config.write_text(CONFIG)
        with Terminal("--config", str(config)) as server:
            server.wait_for("8001")
            clients = probe(8000)
            server.wait_for("eof")
            clients += probe(8001)
            server.wait_for("torn")
            with socket.create_connection(("127.0.0.1", 8000)) as client:
                client.sendall(b"hello\n")
                client.recv(6)
                server.type("\x03")
                server.wait()
            clients += "$ nc 127.0.0.1 8000\nhello\nhello\n"
            return server.output, clients


def drawn(server: str, clients: str) -> str:
    """Return the picture of both terminals."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), legacy_windows=False)
    lines = [line.rpartition("\r\x1b[K")[2] for line in server.replace("\r\n", "\n").split("\n")]
    console.print(Text.from_ansi("\n".join(["$ echod --config lab.toml", *lines]).rstrip()))
    console.rule(style="dim")
    console.print(Text.from_ansi(clients.rstrip()))
    picture = console.export_svg(title="", theme=THEME, code_format=FORMAT, unique_id="terminal")
    picture = re.sub(r' clip-path="[^"]*"|<defs>.*?</defs>\n', "", picture, flags=re.DOTALL)
    bottom = max(float(y) for y in re.findall(r' y="([\d.]+)"', picture))
    return picture.replace("{height}", f"{bottom + 32:.0f}")


if __name__ == "__main__":
    PICTURE.write_text(drawn(*session()))
