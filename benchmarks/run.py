"""Measure echod and its peers side by side, and write the results as JSON.

    python benchmarks/run.py [--quick] [--only WORKLOAD,...] [--peers NAME;...] [--rounds N] [--output FILE] [--keep]

Install echod for the interpreter that runs this program. The servers written in Python run on the same interpreter.
In each round, every server runs the workload once in a fresh process, so a disturbance affects all servers.
The server has one core. The load generator and this program share another.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import platform
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import echod
import servers
from figures import ECHOD, EPOLL, GO, UVLOOP, WORKLOADS, dump, summarize
from servers import Missing, Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

HERE = Path(__file__).parent
CROWD = 10_000
STEPS = (1, 10, 100, 1_000, CROWD)
QUICK_STEPS = (1, 100, 1_000)
MESSAGE = 512
SHORT = 64
STREAM_WRITE = 65536
CONNECTORS = 50

# The default of shutdown.quiet_period, seconds.
QUIET_PERIOD = 2.0

# Upper bounds in seconds: until a server listens, until it has ended, and until a load is done.
START_TIMEOUT = 20.0
STOP_TIMEOUT = 5.0
LOAD_TIMEOUT = 120.0

QUICK_PEERS = frozenset({ECHOD, UVLOOP, EPOLL, GO})
CROWD_PEERS = QUICK_PEERS | {"echod, asyncio", "asyncio protocol", "tokio"}
DRAINED = frozenset({ECHOD, "echod, asyncio"})

Figures = dict[str, Any]


class Failed(Exception):  # noqa: N818  (an outcome that is recorded)
    """A run has no figures. The text gives the reason."""


class Plan(NamedTuple):
    """The extent of a measurement."""

    rounds: int
    seconds: float
    warmup: float
    quick: bool


class Bench:
    """One measurement: its folder, its cores and its runs so far.

    Args:
        folder: Folder for built programs, configuration and logs.
        plan: The extent of the measurement.

    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            sys.exit("a benchmark needs two cores: one for the server, one for the load generator")
        self._server_core, self._load_core = cores[:2]
        os.sched_setaffinity(0, {self._load_core})
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        self.crowd = min(CROWD, hard - 100)
        self._folder = folder
        self.plan = plan
        self._load = self._build_load()
        self._ca, self._certificate = _certificates(folder)
        self.runs: list[Figures] = []

    def _build_load(self) -> Path:
        target = self._folder / "load"
        command = ["gcc", "-O2", "-Wall", "-Wextra", "-o", str(target), str(HERE / "load.c"), "-lssl", "-lcrypto"]
        if shutil.which("gcc") is None:
            sys.exit("gcc is not installed: the load generator needs it, and OpenSSL's headers (libssl-dev)")
        subprocess.run(command, check=True)
        return target

    def command(self, peer: Peer, port: int, *, tls: bool = False) -> list[str]:
        """Build a server, and return the command that starts it."""
        return servers.command(peer, self._folder / "build", port, self._certificate if tls else None)

    @contextlib.contextmanager
    def serving(self, peer: Peer, *, tls: bool = False) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
        """Run a server on its core, and yield its process and port. At the end, stop it with all its children."""
        port = _free_port()
        server = self._start(self.command(peer, port, tls=tls))
        try:
            _wait_for(server, port)
            yield server, port
        finally:
            _stop(server)

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=partial(os.sched_setaffinity, 0, {self._server_core}),  # noqa: PLW1509  (this process is single-threaded)
        )

    def load(self, mode: str, port: int, pid: int, **options: float | Path) -> Figures:
        """Run the load generator, and return its figures.

        Raises:
            Failed: The load generator reported errors or did not end.

        """
        arguments = [str(self._load), mode, "--port", str(port), "--pid", str(pid), "--warmup", str(self.plan.warmup)]
        for name, value in ({"seconds": self.plan.seconds} | options).items():
            arguments += [f"--{name}", str(value)]
        try:
            done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=LOAD_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise Failed("the load did not end") from error
        try:
            figures: Figures = json.loads(done.stdout)
        except ValueError as error:
            raise Failed(f"the load ended with {done.returncode}: {done.stderr.strip()}") from error
        if "error" in figures:
            raise Failed(figures["error"])
        if figures["errors"]:
            raise Failed(figures["first_error"])
        return figures

    # Workloads.

    def loaded(self, mode: str, peer: Peer, *, tls: bool = False, **options: float) -> Figures:
        """Measure a server under a load."""
        with self.serving(peer, tls=tls) as (server, port):
            trust = {"tls": self._ca} if tls else {}
            return self.load(mode, port, server.pid, **options, **trust)

    def idle(self, peer: Peer) -> Figures:
        """Measure a server with many silent clients."""
        if not peer.serious:
            raise Failed(f"it would need a process for each of {self.crowd:,} clients")
        return self.loaded("idle", peer, clients=self.crowd, size=SHORT, seconds=2 * self.plan.seconds)

    def paced(self, peer: Peer, clients: int) -> Figures:
        """Measure a server at half the rate of the slowest serious server."""
        return self.loaded("rate", peer, clients=clients, size=MESSAGE, rate=self.half_rate) | {"rate": self.half_rate}

    @property
    def half_rate(self) -> float:
        """Half the message rate of the slowest serious server, in messages per second."""
        rates: dict[str, list[float]] = {}
        for run in self.runs:
            if run["workload"] == "pingpong" and "error" not in run:
                rates.setdefault(run["peer"], []).append(run["units"] / run["seconds"])
        slowest = min(median(rates[peer.name]) for peer in servers.PEERS if peer.serious and peer.name in rates)
        return float(round(slowest / 2, -2))

    def drain(self, peer: Peer) -> Figures:
        """Measure a graceful stop of echod with many idle clients. Each client closes when echod half-closes."""
        with self.serving(peer) as (server, port):
            hold = [str(self._load), "hold", "--port", str(port), "--clients", str(self.crowd), "--size", str(SHORT)]
            with subprocess.Popen(hold, stdout=subprocess.PIPE, text=True) as crowd:
                assert crowd.stdout is not None
                if crowd.stdout.readline() != "ready\n":
                    raise Failed("not all clients could connect")
                before, begun = _cpu(server.pid), time.monotonic()
                server.terminate()
                _, status, usage = os.wait4(server.pid, 0)
                seconds = time.monotonic() - begun
                server.returncode = os.waitstatus_to_exitcode(status)
                crowd.communicate(timeout=LOAD_TIMEOUT)
            if server.returncode:
                raise Failed(f"the server ended with {server.returncode}")
            lines = (self._folder / "build" / f"echod-{port}.log").read_text().splitlines()
        receipt = next(line for line in map(json.loads, lines) if line["event"] == "drained")
        if receipt["clients"] != self.crowd:
            raise Failed(f"the receipt counts {receipt['clients']} clients instead of {self.crowd}")
        return {
            "clients": self.crowd,
            "seconds": seconds,
            "quiet_period": QUIET_PERIOD,
            "cpu": usage.ru_utime + usage.ru_stime - before,
            "receipt": {name: value for name, value in receipt.items() if name not in {"timestamp", "level", "event"}},
        }

    def start(self, peer: Peer) -> Figures:
        """Measure the time from the start of a server to its first echo."""
        port = _free_port()
        command = self.command(peer, port)
        begun = time.monotonic()
        server = self._start(command)
        try:
            _wait_for(server, port)
            return {"seconds": time.monotonic() - begun, "cpu": _cpu(server.pid)}
        finally:
            _stop(server)

    def measure(self, workload: str, peers: list[Peer]) -> None:
        """Run one workload with all servers, in a different order in each round."""
        steps: dict[str, list[Callable[[Peer], Figures]]] = {
            "pingpong": [partial(self.loaded, "pingpong", clients=50, size=MESSAGE)],
            "stream": [partial(self.loaded, "stream", clients=8, size=STREAM_WRITE)],
            "connect": [partial(self.loaded, "connect", clients=CONNECTORS, size=SHORT)],
            "idle": [self.idle],
            "latency": [partial(self.paced, clients=50)],
            "clients": [
                partial(self.paced, clients=min(clients, self.crowd))
                for clients in (QUICK_STEPS if self.plan.quick else STEPS)
            ],
            "tls-pingpong": [partial(self.loaded, "pingpong", tls=True, clients=50, size=MESSAGE)],
            "tls-stream": [partial(self.loaded, "stream", tls=True, clients=8, size=STREAM_WRITE)],
            "drain": [self.drain],
            "start": [self.start],
        }
        # A round with thousands of clients is slow, so the quick plan has only one.
        for turn in range(1 if self.plan.quick and workload in {"idle", "drain"} else self.plan.rounds):
            print(f"{workload}, round {turn + 1}:", end=" ", file=sys.stderr, flush=True)
            # A server inherits the state of caches and kernel from the one before it, so the order must vary.
            for peer in random.Random(turn).sample(peers, len(peers)):  # noqa: S311  (not a secret)
                for step in steps[workload]:
                    try:
                        found = step(peer)
                    except Failed as error:
                        found = {"error": str(error)}
                        print(f"\n{peer.name}: {error}", file=sys.stderr)
                    self.runs.append({"workload": workload, "peer": peer.name, "round": turn} | found)
                print(peer.name, end="; ", file=sys.stderr, flush=True)
            print(file=sys.stderr)


def applies(workload: str, peer: Peer) -> bool:
    """Return whether a server is measured with a workload."""
    match workload:
        case "latency":
            return peer.serious
        case "clients":
            return peer.name in CROWD_PEERS
        case "tls-pingpong" | "tls-stream":
            return peer.tls
        case "drain":
            return peer.name in DRAINED
    return True


def machine() -> Figures:
    """Describe the machine and the software."""
    cpu = next(
        (line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu.strip() or platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "memory_gib": round(memory / 2**30),
        "python": platform.python_version(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "echod": f"{echod.__version__} ({git.stdout.strip() or 'no commit'})",
    }


def _certificates(folder: Path) -> tuple[Path, Path]:
    """Return the certificate file of a CA, and a file with the key and certificate chain of `localhost`."""
    import trustme  # noqa: PLC0415  (only a measurement needs it)

    authority, pem = folder / "ca.pem", folder / "server.pem"
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(authority))
    ca.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(pem))
    return authority, pem


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    """Wait until the server accepts a connection and, without TLS, echoes a byte."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise Failed(f"the server ended with {server.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=START_TIMEOUT) as client:
                client.sendall(b"?")
                client.settimeout(0.5)  # over TLS, the byte is not a ClientHello, so no echo comes
                with contextlib.suppress(TimeoutError, ConnectionError):
                    client.recv(1)
                return
        except ConnectionRefusedError:
            time.sleep(0.0005)  # the kernel does not notify when another process listens
    raise Failed(f"the server does not listen after {START_TIMEOUT:g} s")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Stop a server and all the processes it forked."""
    with contextlib.suppress(ProcessLookupError):
        if server.returncode is None:
            server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_TIMEOUT)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        deadline = time.monotonic() + STOP_TIMEOUT
        while time.monotonic() < deadline:
            os.killpg(server.pid, 0)  # raises once the whole group is gone
            time.sleep(0.01)


def _cpu(pid: int) -> float:
    """Return the CPU time of a process in seconds, from the clock of clock_getcpuclockid(3)."""
    return time.clock_gettime(~pid << 3 | 2)


def _measured(workloads: list[str], wanted: Collection[str], plan: Plan) -> Figures:
    """Run the workloads with the servers of these names, and return all runs."""
    with tempfile.TemporaryDirectory(prefix="echod-bench-") as folder:
        bench = Bench(Path(folder), plan)
        found: dict[str, Figures] = {}
        missing: dict[str, str] = {}
        for peer in servers.PEERS:
            if peer.name not in wanted:
                continue
            try:
                bench.command(peer, 1)
                found[peer.name] = {"about": peer.about, "version": servers.version(peer), "serious": peer.serious}
            except Missing as error:
                missing[peer.name] = str(error)
                print(f"missing: {peer.name}: {error}", file=sys.stderr)
        for workload in workloads:
            bench.measure(workload, [peer for peer in servers.PEERS if peer.name in found and applies(workload, peer)])
    return {
        "machine": machine(),
        "settings": {"rounds": plan.rounds, "seconds": plan.seconds, "quick": plan.quick},
        "peers": found,
        "missing": missing,
        "runs": bench.runs,
    }


def _joined(before: Figures, after: Figures) -> Figures:
    """Return the new summary, with the workloads that only the old one has."""
    if any(before["machine"][key] != after["machine"][key] for key in ("cpu", "cores", "kernel", "python")):
        sys.exit("the output comes from another machine or Python: nothing was written")
    return after | {key: before[key] | after[key] for key in ("peers", "workloads")}


def main() -> None:
    """Measure, and write the runs and their summary."""
    names = [workload.name for workload in WORKLOADS]
    parser = argparse.ArgumentParser(description="Measure echod and its peers side by side.")
    parser.add_argument("--quick", action="store_true", help="under 90 seconds, only the servers of the targets")
    parser.add_argument("--only", default=",".join(names), help=f"workloads, comma-separated: {', '.join(names)}")
    parser.add_argument("--peers", help="names, separated by semicolons (default: all)")
    parser.add_argument("--rounds", type=int, help="of each workload (default: 5; with --quick: 3)")
    parser.add_argument("--output", type=Path, default=Path("results.json"), help="summary (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("build/bench/runs.json"), help="runs (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the output's other workloads")
    arguments = parser.parse_args()
    workloads = [name for name in names if name in arguments.only.split(",")]
    if unknown := set(arguments.only.split(",")) - set(names):
        parser.error(f"unknown workload {', '.join(sorted(unknown))}: use {', '.join(names)}")
    wanted: Collection[str] = QUICK_PEERS if arguments.quick else {peer.name for peer in servers.PEERS}
    if arguments.peers is not None:
        wanted = set(arguments.peers.split(";"))
    if unknown := set(wanted) - {peer.name for peer in servers.PEERS}:
        parser.error(f"unknown peer {'; '.join(sorted(unknown))}: use {'; '.join(p.name for p in servers.PEERS)}")
    plan = Plan(3, 0.3, 0.1, quick=True) if arguments.quick else Plan(5, 1.0, 0.3, quick=False)
    plan = plan._replace(rounds=arguments.rounds or plan.rounds)
    if plan.quick:
        workloads = [workload for workload in workloads if not workload.startswith("tls-")]
    if {"latency", "clients"} & set(workloads) and "pingpong" not in workloads:
        workloads.insert(0, "pingpong")  # their rate is half of its slowest

    measured = _measured(workloads, wanted, plan)
    _write(arguments.runs, json.dumps(measured, indent=1))
    summary = summarize(measured)
    if arguments.keep:
        summary = _joined(json.loads(arguments.output.read_text()), summary)
    _write(arguments.output, dump(summary))
    print(f"next: python {HERE / 'report.py'} {arguments.output}", file=sys.stderr)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")
    print(f"written: {file}", file=sys.stderr)


if __name__ == "__main__":
    main()
