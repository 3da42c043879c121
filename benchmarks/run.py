"""Measure echod and its peers side by side, and write what was found as JSON.

    python benchmarks/run.py [--quick] [--only WORK,...] [--peers NAME;...] [--rounds N] [--output FILE] [--keep]

Everything is run by the interpreter that runs this, in which echod has to be installed. The servers take turns: in each
round each of them has every work once, in a fresh process, and what disturbs the machine meanwhile meets them all.
The server has one core, and the load generator, this program with it, another one.
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
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import servers
from figures import ECHOD, EPOLL, GO, UVLOOP, WORKS
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

# Seconds: until a server listens, until it has ended, until a load that should long be done has.
START_TIMEOUT = 20.0
STOP_TIMEOUT = 5.0
LOAD_TIMEOUT = 120.0

QUICK_PEERS = frozenset({ECHOD, UVLOOP, EPOLL, GO})
CROWD_PEERS = QUICK_PEERS | {"echod, asyncio", "asyncio protocol", "tokio"}
DRAINED = frozenset({ECHOD, "echod, asyncio"})

Figures = dict[str, Any]


class Failed(Exception):  # noqa: N818  (an outcome, which is written down)
    """A run has no figures; the text says why."""


class Plan(NamedTuple):
    """How much is measured."""

    rounds: int
    seconds: float
    warmup: float
    quick: bool


class Bench:
    """One measurement: its folder, its cores, and what it has found so far.

    Args:
        folder: for what is built, configuration, logs.
        plan: how much is measured.

    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            sys.exit("two cores are needed: one for the server, one for the load")
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
            sys.exit("the load generator needs gcc, and the headers of OpenSSL (libssl-dev)")
        subprocess.run(command, check=True)
        return target

    def command(self, peer: Peer, port: int, *, tls: bool = False) -> list[str]:
        """Return what starts a server, built."""
        return servers.command(peer, self._folder / "build", port, self._certificate if tls else None)

    @contextlib.contextmanager
    def serving(self, peer: Peer, *, tls: bool = False) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
        """Have a server run on its core, with its port; end it and all its children."""
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
            preexec_fn=partial(os.sched_setaffinity, 0, {self._server_core}),  # noqa: PLW1509  (there are no threads)
        )

    def load(self, mode: str, port: int, pid: int, **options: float | Path) -> Figures:
        """Run the load generator, and return what it says.

        Raises:
            Failed: it had errors.

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

    # The works

    def loaded(self, mode: str, peer: Peer, *, tls: bool = False, **options: float) -> Figures:
        """Have a server serve a load."""
        with self.serving(peer, tls=tls) as (server, port):
            trust = {"tls": self._ca} if tls else {}
            return self.load(mode, port, server.pid, **options, **trust)

    def idle(self, peer: Peer) -> Figures:
        """Have a server hold a crowd that says nothing."""
        if not peer.serious:
            raise Failed(f"it would need a process for each of {self.crowd:,} clients")
        return self.loaded("idle", peer, clients=self.crowd, size=SHORT, seconds=2 * self.plan.seconds)

    def paced(self, peer: Peer, clients: int) -> Figures:
        """Have a server answer messages at half of the rate that the slowest serious one can."""
        return self.loaded("rate", peer, clients=clients, size=MESSAGE, rate=self.half_rate) | {"rate": self.half_rate}

    @property
    def half_rate(self) -> float:
        """Half of the messages a second of the serious peer that answers fewest."""
        rates: dict[str, list[float]] = {}
        for run in self.runs:
            if run["work"] == "pingpong" and "error" not in run:
                rates.setdefault(run["peer"], []).append(run["units"] / run["seconds"])
        slowest = min(median(rates[peer.name]) for peer in servers.PEERS if peer.serious and peer.name in rates)
        return float(round(slowest / 2, -2))

    def drain(self, peer: Peer) -> Figures:
        """Stop echod while a crowd is connected that closes when it is asked to."""
        with self.serving(peer) as (server, port):
            hold = [str(self._load), "hold", "--port", str(port), "--clients", str(self.crowd), "--size", str(SHORT)]
            with subprocess.Popen(hold, stdout=subprocess.PIPE, text=True) as crowd:
                assert crowd.stdout is not None
                if crowd.stdout.readline() != "ready\n":
                    raise Failed("the crowd could not connect")
                before, begun = _cpu(server.pid), time.monotonic()
                server.terminate()
                _, status, usage = os.wait4(server.pid, 0)
                seconds = time.monotonic() - begun
                server.returncode = os.waitstatus_to_exitcode(status)
                crowd.communicate(timeout=LOAD_TIMEOUT)
            if server.returncode:
                raise Failed(f"it ended with {server.returncode}")
            lines = (self._folder / "build" / f"echod-{port}.log").read_text().splitlines()
        receipt = next(line for line in map(json.loads, lines) if line["event"] == "drained")
        if receipt["clients"] != self.crowd:
            raise Failed(f"its receipt has {receipt['clients']} clients")
        return {
            "clients": self.crowd,
            "seconds": seconds,
            "quiet_period": QUIET_PERIOD,
            "cpu": usage.ru_utime + usage.ru_stime - before,
            "receipt": {name: value for name, value in receipt.items() if name not in {"timestamp", "level", "event"}},
        }

    def start(self, peer: Peer) -> Figures:
        """Time a server from its start to its first echo."""
        port = _free_port()
        command = self.command(peer, port)
        begun = time.monotonic()
        server = self._start(command)
        try:
            _wait_for(server, port)
            return {"seconds": time.monotonic() - begun, "cpu": _cpu(server.pid)}
        finally:
            _stop(server)

    def measure(self, work: str, peers: list[Peer]) -> None:
        """Do one work with each peer in turn, round after round, each in an order of its own."""
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
        # With thousands of clients a round takes its time, so the quick plan has one.
        for turn in range(1 if self.plan.quick and work in {"idle", "drain"} else self.plan.rounds):
            print(f"{work}, round {turn + 1}:", end=" ", file=sys.stderr, flush=True)
            # Nobody comes always behind the same one: a server that forks leaves caches and kernel otherwise than one that
            # does not.
            for peer in random.Random(turn).sample(peers, len(peers)):  # noqa: S311  (no secret)
                for step in steps[work]:
                    try:
                        found = step(peer)
                    except Failed as error:
                        found = {"error": str(error)}
                        print(f"\n{peer.name}: {error}", file=sys.stderr)
                    self.runs.append({"work": work, "peer": peer.name, "round": turn} | found)
                print(peer.name, end="; ", file=sys.stderr, flush=True)
            print(file=sys.stderr)


def taking_part(work: str, peer: Peer) -> bool:
    """Tell whether a peer is measured at a work."""
    match work:
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
    """Describe where it was measured."""
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
        "echod": f"{metadata.version('echod')} ({git.stdout.strip() or 'no commit'})",
    }


def _certificates(folder: Path) -> tuple[Path, Path]:
    """Return the file of an authority, and one with the key and the chain of `localhost`."""
    import trustme  # noqa: PLC0415  (for the works over TLS only)

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
    """Return when the server has accepted a connection and, without TLS, could have echoed."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise Failed(f"the server ended with {server.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=START_TIMEOUT) as client:
                client.sendall(b"?")
                client.settimeout(0.5)  # a handshake over TLS has more to say first
                with contextlib.suppress(TimeoutError, ConnectionError):
                    client.recv(1)
                return
        except ConnectionRefusedError:
            time.sleep(0.0005)  # nothing tells when another process listens
    raise Failed("the server does not listen")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End a server and what it has forked."""
    with contextlib.suppress(ProcessLookupError):
        if server.returncode is None:
            server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_TIMEOUT)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        deadline = time.monotonic() + STOP_TIMEOUT
        while time.monotonic() < deadline:
            os.killpg(server.pid, 0)  # fails when all that it forked are gone, too
            time.sleep(0.01)


def _cpu(pid: int) -> float:
    """Return a process's CPU time in seconds, by the clock that clock_getcpuclockid(3) gives."""
    return time.clock_gettime(~pid << 3 | 2)


def _measured(works: list[str], wanted: Collection[str], plan: Plan) -> Figures:
    """Do the works with the peers of these names, and return the results."""
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
        for work in works:
            bench.measure(work, [peer for peer in servers.PEERS if peer.name in found and taking_part(work, peer)])
    return {
        "machine": machine(),
        "settings": {"rounds": plan.rounds, "seconds": plan.seconds, "quick": plan.quick},
        "peers": found,
        "missing": missing,
        "runs": bench.runs,
    }


def _joined(before: Figures, after: Figures, works: list[str]) -> Figures:
    """Return the results of now, and of other works those from before."""
    if any(before["machine"][key] != after["machine"][key] for key in ("cpu", "cores", "kernel", "python")):
        sys.exit("the output comes from another machine or Python: nothing was written")
    runs = [run for run in before["runs"] if run["work"] not in works] + after["runs"]
    return after | {"runs": runs, "peers": before["peers"] | after["peers"]}


def main() -> None:
    """Measure, and write the results."""
    names = [work.name for work in WORKS]
    parser = argparse.ArgumentParser(description="Measure echod and its peers side by side.")
    parser.add_argument("--quick", action="store_true", help="in under 90 seconds, only who is in the targets")
    parser.add_argument("--only", default=",".join(names), help=f"works, comma-separated: {', '.join(names)}")
    parser.add_argument("--peers", help="names, separated by semicolons (default: all)")
    parser.add_argument("--rounds", type=int, help="of each work (default: 5; with --quick: 3)")
    parser.add_argument("--output", type=Path, default=Path("results.json"), help="(default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep what the output has of other works")
    arguments = parser.parse_args()
    works = [name for name in names if name in arguments.only.split(",")]
    if unknown := set(arguments.only.split(",")) - set(names):
        parser.error(f"no such work: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    wanted: Collection[str] = QUICK_PEERS if arguments.quick else {peer.name for peer in servers.PEERS}
    if arguments.peers is not None:
        wanted = set(arguments.peers.split(";"))
    if unknown := set(wanted) - {peer.name for peer in servers.PEERS}:
        parser.error(
            f"no such peer: {'; '.join(sorted(unknown))}; there are {'; '.join(p.name for p in servers.PEERS)}"
        )
    plan = Plan(3, 0.3, 0.1, quick=True) if arguments.quick else Plan(5, 1.0, 0.3, quick=False)
    plan = plan._replace(rounds=arguments.rounds or plan.rounds)
    if plan.quick:
        works = [work for work in works if not work.startswith("tls-")]
    if {"latency", "clients"} & set(works) and "pingpong" not in works:
        works.insert(0, "pingpong")  # which gives their rate

    results = _measured(works, wanted, plan)
    if arguments.keep:
        results = _joined(json.loads(arguments.output.read_text()), results, works)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {arguments.output}; python {HERE / 'report.py'} makes a page of it", file=sys.stderr)


if __name__ == "__main__":
    main()
