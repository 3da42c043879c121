"""Test the load generator of the benchmark, and the program that runs it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import run as runner
from figures import dump, summarize
from harness import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Answer = Callable[[socket.socket, bytes], None]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MESSAGE = 512

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the load generator is built by gcc"),
    pytest.mark.skipif(not Path("/usr/include/openssl/ssl.h").exists(), reason="OpenSSL's headers are not installed"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the load generator without warnings, and return its path."""
    target = tmp_path_factory.mktemp("load") / "load"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover"]
    subprocess.run(["gcc", *flags, "-o", str(target), str(BENCHMARKS / "load.c"), "-lssl", "-lcrypto"], check=True)
    return target


@contextlib.contextmanager
def server(answer: Answer) -> Iterator[int]:
    """Serve each client in a thread that passes all data to `answer`; yield the port."""
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
def test_a_correct_echo_has_no_errors(program: Path, mode: str) -> None:
    """Every mode accepts a correct echo and counts only echoed data."""
    echoed = 0

    def answer(client: socket.socket, data: bytes) -> None:
        nonlocal echoed
        echoed += len(data)
        client.sendall(data)

    with server(answer) as port:
        options = {"rate": 2000} if mode == "rate" else {}
        figures = load(program, mode, port, clients=3, size=MESSAGE, seconds=0.2, warmup=0.05, **options)
    assert figures["errors"] == 0
    assert figures["load_cpu"] >= 0
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
def test_a_wrong_echo_is_an_error(program: Path, mode: str, damage: Callable[[bytes], bytes]) -> None:
    """A single wrong, moved or repeated byte is detected."""
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
    """A connection that the server closes counts as an error."""
    with server(lambda client, _: client.close()) as port:
        figures = load(program, "pingpong", port, clients=1, seconds=0.5, warmup=0)
    assert figures["errors"] == 1


def test_a_pause_shows_in_all_latencies_that_it_delays(program: Path) -> None:
    """With a schedule, a pause of the server counts for every message that is due meanwhile.

    The server holds its first 150 echoes back until all of these messages have arrived. The gaps between them come from
    a fixed sequence, so the first one waits at least 0.25 s, however fast the machine is.
    """
    held = bytearray()
    missing = 150 * MESSAGE

    def answer(client: socket.socket, data: bytes) -> None:
        nonlocal missing
        missing -= len(data)
        held.extend(data)
        if missing <= 0:
            client.sendall(held)
            held.clear()

    with server(answer) as port:
        figures = load(program, "rate", port, clients=1, rate=500, size=MESSAGE, seconds=1, warmup=0)
    assert figures["errors"] == 0
    assert figures["latency"]["max"] >= 0.25
    assert figures["latency"]["p99"] >= 0.2


def test_the_runner_measures_and_writes(tmp_path: Path) -> None:
    """The runner builds the load generator, measures two workloads, and writes the runs and their summary."""
    output, runs = tmp_path / "results.json", tmp_path / "build" / "runs.json"
    options = ["--quick", "--rounds", "1", "--only", "connect,start", "--peers", "echod", "--runs", str(runs)]
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("a benchmark needs two cores")
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "run.py", *options, "--output", output],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(runs.read_text())
    connect, start = measured["runs"]
    assert (connect["workload"], connect["peer"], connect["round"]) == ("connect", "echod", 0)
    assert connect["units"] > 0
    assert connect["cpu"] > 0
    assert start["cpu"] > 0
    assert start["seconds"] > 0
    assert measured["peers"].keys() == {"echod"}
    assert output.read_text() == dump(summarize(measured)) + "\n"


def test_the_runner_keeps_other_workloads() -> None:
    """With --keep, workloads and servers of the old summary stay unless they were measured again."""
    machine = dict.fromkeys(("cpu", "cores", "kernel", "python"), "same")
    old = {"machine": machine, "peers": {"a": 1, "b": 2}, "workloads": {"connect": 3, "start": 4}}
    new = {"machine": machine, "peers": {"b": 5}, "workloads": {"start": 6}}
    joined = runner._joined(old, new)
    assert joined["peers"] == {"a": 1, "b": 5}
    assert joined["workloads"] == {"connect": 3, "start": 6}
    with pytest.raises(SystemExit, match="another machine"):
        runner._joined(old | {"machine": machine | {"cpu": "other"}}, new)
