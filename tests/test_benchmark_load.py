"""The benchmark's load generator tells echo from what is none, and charges a server for the time it stands still."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Answer = Callable[[socket.socket, bytes], None]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MESSAGE = 512

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the load generator is built by gcc"),
    pytest.mark.skipif(not Path("/usr/include/openssl/ssl.h").exists(), reason="OpenSSL's headers are not installed"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the load generator, built without a warning."""
    target = tmp_path_factory.mktemp("load") / "load"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover"]
    subprocess.run(["gcc", *flags, "-o", str(target), str(BENCHMARKS / "load.c"), "-lssl", "-lcrypto"], check=True)
    return target


@contextlib.contextmanager
def server(answer: Answer) -> Iterator[int]:
    """Serve each client by a thread that calls `answer` with all it reads; give the port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve(client: socket.socket) -> None:
            with client, contextlib.suppress(OSError):
                while data := client.recv(65536):
                    answer(client, data)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listening.accept()
                    threading.Thread(target=serve, args=(client,), daemon=True).start()

        thread = threading.Thread(target=accept)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE)


def load(program: Path, mode: str, port: int, **options: object) -> dict[str, Any]:
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    command = [str(program), mode, "--port", str(port), "--pid", str(os.getpid()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("mode", ["pingpong", "stream", "connect", "rate", "idle"])
def test_an_echo_has_no_errors(program: Path, mode: str) -> None:
    """Each kind of load takes an echo for one, and counts no more than came back."""
    echoed = 0

    def answer(client: socket.socket, data: bytes) -> None:
        nonlocal echoed
        echoed += len(data)
        client.sendall(data)

    with server(answer) as port:
        options = {"rate": 2000} if mode == "rate" else {}
        figures = load(program, mode, port, clients=3, size=MESSAGE, seconds=0.2, warmup=0.05, **options)
    assert figures["errors"] == 0
    assert figures["seconds"] >= 0.2
    assert 0 <= figures["load_cpu"] <= figures["seconds"] + 0.1
    if mode == "idle":
        assert figures["units"] == 3
        assert figures["memory_before"] > 0
    else:
        assert figures["cpu"] > 0
        assert 0 < figures["bytes"] <= echoed
        assert figures["units"] - 3 <= figures["bytes"] / MESSAGE <= figures["units"] + 3


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize("mode", ["pingpong", "stream", "connect"])
@pytest.mark.parametrize(
    "damage",
    [flipped, lambda data: data[1:] + data[:1], lambda data: data + data, lambda data: data[:-1] + b"\0"],
    ids=["a bit", "moved", "twice", "the last byte"],
)
def test_what_is_no_echo_is_an_error(program: Path, mode: str, damage: Callable[[bytes], bytes]) -> None:
    """A single wrong byte is found, wherever it is."""
    seen = 0

    def answer(client: socket.socket, data: bytes) -> None:
        nonlocal seen
        seen += 1
        client.sendall(damage(data) if seen == 20 else data)

    with server(answer) as port:
        figures = load(program, mode, port, clients=2, size=MESSAGE, seconds=0.5, warmup=0)
    assert figures["errors"] == 1
    assert figures["first_error"].startswith("the echo differs")


def test_a_server_that_closes_is_an_error(program: Path) -> None:
    """A client that is closed in the middle is counted."""
    with server(lambda client, _: client.close()) as port:
        figures = load(program, "pingpong", port, clients=1, seconds=0.5, warmup=0)
    assert figures["errors"] == 1


def test_a_pause_is_charged_to_all_who_would_have_come(program: Path) -> None:
    """On a schedule, a pause shows in as many latencies as there were messages due in it, and not in one."""
    paused = False

    def answer(client: socket.socket, data: bytes) -> None:
        nonlocal paused
        if not paused:
            paused = True
            time.sleep(0.3)
        client.sendall(data)

    with server(answer) as port:
        figures = load(program, "rate", port, clients=1, rate=500, size=MESSAGE, seconds=1, warmup=0)
    assert figures["errors"] == 0
    assert 0.25 <= figures["latency"]["max"] < PATIENCE
    assert figures["latency"]["p99"] >= 0.2, "150 of 500 messages were due in the pause"


def test_the_runner_measures_and_writes(tmp_path: Path) -> None:
    """One work of one peer, from the building of the load to the results."""
    output = tmp_path / "results.json"
    options = ["--quick", "--rounds", "1", "--only", "connect,start", "--peers", "echod"]
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("a benchmark needs two cores")
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "run.py", *options, "--output", output],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    connect, start = results["runs"]
    assert (connect["work"], connect["peer"], connect["round"]) == ("connect", "echod", 0)
    assert connect["units"] > 0
    assert connect["cpu"] > 0
    assert start["cpu"] > 0
    assert start["seconds"] < 20
    assert results["peers"].keys() == {"echod"}
