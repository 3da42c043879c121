"""Test the systemd units: their text, and the installed service in a container that runs systemd."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import tomllib
from functools import partial
from pathlib import Path

import pytest

from crowd import Crowd
from echod.settings.model import Settings
from harness import PATIENCE, receive, run
from nspawn import Container, wait, why_not

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "packaging" / "systemd"
PAGE = ROOT / "docs" / "how-to" / "systemd.md"


def seconds_to_stop(unit: str) -> float:
    found = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_timeout_of_the_unit_is_above_the_daemons() -> None:
    """Check that a stop with the default timeouts ends before TimeoutStopSec=, even if it is not extended."""
    shutdown = Settings().shutdown
    longest = shutdown.delay + shutdown.quiet_period + shutdown.drain_timeout + shutdown.linger_timeout
    assert seconds_to_stop((UNITS / "echod.service").read_text()) > longest


def test_shipped_settings() -> None:
    """Check the settings file that is installed with the units."""
    assert tomllib.loads((UNITS / "echod.toml").read_text())["listen"] == [":7"]
    result = run("check", "--config", str(UNITS / "echod.toml"))
    assert (result.returncode, result.stdout) == (0, f"configuration OK: {UNITS / 'echod.toml'}\n")


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Return a folder with units, and the command that they start."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    command = tmp_path / "echod"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    for name in ("echod.service", "echod.socket"):
        (tmp_path / name).write_text((UNITS / name).read_text().replace("/opt/echod/bin/echod", str(command)))
    return tmp_path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("dropped_in", [False, True])
def test_verify_is_silent(units: Path, *, dropped_in: bool) -> None:
    """Check that systemd-analyze has no complaints, with and without the drop-in."""
    if dropped_in:
        folder = units / "echod.service.d"
        folder.mkdir()
        shutil.copy(UNITS / "socket-activation.conf", folder)
    result = analyze("verify", "--man=no", str(units / "echod.service"), str(units / "echod.socket"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_exposure(units: Path) -> None:
    """Check that the exposure level is at most 1.5."""
    result = analyze("security", "--no-pager", "--offline=true", "--threshold=15", str(units / "echod.service"))
    assert result.returncode == 0, result.stdout + result.stderr


# In a container

DROP_IN = "/etc/systemd/system/echod.service.d/test.conf"


def block(name: str) -> str:
    """Return the code block of docs/how-to/systemd.md after the comment with this name."""
    found = re.search(rf"^<!-- {name} -->\n```\w+\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None, name
    return found[1]


def drop_in(container: Container, text: str) -> None:
    """Install a drop-in of the test, and restart the service."""
    container.write(DROP_IN, text)
    container.shell("systemctl daemon-reload; systemctl restart echod")


def echo(client: socket.socket, text: bytes) -> None:
    """Send a message, receive its echo, and close."""
    with client:
        client.sendall(text)
        client.shutdown(socket.SHUT_WR)
        assert receive(client, len(text) + 1) == text


def status(container: Container) -> dict[str, str]:
    """Return the fields of the service process in /proc/PID/status."""
    pid = container.property("MainPID")
    lines = container.run("cat", f"/proc/{pid}/status").stdout.splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.container
def test_in_a_container(tmp_path: Path) -> None:
    """Run the commands of docs/how-to/systemd.md under real systemd. All scenes share one container, as booting is slow."""
    if (reason := why_not()) is not None:
        pytest.skip(f"cannot run systemd in a container: {reason}")
    with Container() as container:
        container.shell(block("install"))
        installed(container)
        started(container)
        reloaded(container)
        stuck(container)
        stopped_under_load(container)
        with_tls(container, tmp_path)
        restarted_under_load(container)
        logged(container)


def installed(container: Container) -> None:
    """Check that systemd-analyze has no complaints, and that the exposure level is the page's."""
    units = "/etc/systemd/system/echod.service", "/etc/systemd/system/echod.socket"
    verified = container.run("systemd-analyze", "verify", *units)
    assert (verified.stdout, verified.stderr) == ("", "")
    assert "exposure level for echod.service: 1.4 " in security(container)


def security(container: Container) -> str:
    return container.run("systemd-analyze", "security", "--no-pager", "--threshold=15", "echod.service").stdout


def started(container: Container) -> None:
    """Check that the service echoes on port 7 of both families, and check its user, capability and seccomp filter."""
    assert container.property("ActiveState") == "active"
    echo(container.connect("127.0.0.1"), b"four")
    echo(container.connect("::1"), b"six")
    process = status(container)
    assert set(process["Uid"].split()).isdisjoint({"0"})
    assert {process[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {f"{1 << 10:016x}"}
    assert (process["NoNewPrivs"], process["Seccomp"]) == ("1", "2")
    assert container.property("StatusText").startswith("Serving: ")


def reloaded(container: Container) -> None:
    """Check a reload, and failed reloads by systemctl and by SIGHUP, which leave the service running."""
    path, text = "/etc/echod/echod.toml", (UNITS / "echod.toml").read_text()
    pid = container.property("MainPID")
    container.write(path, text + 'connections = "all"\n')
    container.run("systemctl", "reload", "echod")
    wait(lambda: container.property("StatusText").endswith("; settings reloaded"))
    wait(lambda: container.events("reloaded"))
    assert container.events("reloaded")[-1]["changed"] == ["log.connections"]
    container.write(path, text + 'connections = "everything"\n')
    assert container.run("systemctl", "reload", "echod", check=False).returncode == 1
    assert "log.connections" in "".join(entry["MESSAGE"] for entry in container.journal("_COMM=echod"))
    container.run("systemctl", "kill", "--signal=HUP", "echod")
    line = text.count("\n") + 1
    problem = f"settings not reloaded, 1 problem: {path}:{line}: log.connections"
    wait(lambda: problem in container.property("StatusText"))
    states = {name: container.property(name) for name in ("ActiveState", "SubState", "MainPID", "NRestarts")}
    assert states == {"ActiveState": "active", "SubState": "running", "MainPID": pid, "NRestarts": "0"}
    echo(container.connect(), b"still there")
    container.write(path, text)


def stuck(container: Container) -> None:
    """Check that the watchdog kills a stuck daemon and logs its stack, and that it is restarted."""
    drop_in(container, "[Service]\nWatchdogSec=1\n")
    pid = container.property("MainPID")
    echo(container.connect(), b"before")
    # Wait until the line is written, because a log write during the abort would garble the stack.
    wait(lambda: container.events("client_closed", f"_PID={pid}"))
    container.run("kill", "-STOP", pid)
    wait(lambda: container.property("NRestarts") == "1")
    wait(lambda: container.property("StatusText").startswith("Serving: "))
    assert container.property("MainPID") != pid
    echo(container.connect(), b"after")
    messages = "\n".join(entry["MESSAGE"] for entry in container.journal())
    assert "Watchdog timeout" in messages
    assert "Fatal Python error: Aborted" in messages
    assert re.search(r'File "/opt/echod/.*/echod/daemon/daemon.py", line \d+ in serve', messages)


def stopped_under_load(container: Container) -> None:
    """Check that a stop may exceed TimeoutStopSec=, and that each client receives its whole echo.

    A client is cut off only after the drain timeout of 4 seconds, but TimeoutStopSec= is 1 second.
    """
    drop_in(
        container,
        "[Service]\nTimeoutStopSec=1\nEnvironment=ECHOD_SHUTDOWN__DRAIN_TIMEOUT=4 ECHOD_SHUTDOWN__QUIET_PERIOD=20\n",
    )
    with Crowd() as crowd:
        whole = [crowd.add(container.connect(), 20_000_000, seed) for seed in range(10)]
        endless = crowd.add(container.connect(), None, 99)
        crowd.run(lambda: all(peer.received for peer in crowd.peers))
        stop = container.spawn(lambda: container.run("systemctl", "stop", "echod"))
        draining = container.spawn(lambda: wait(lambda: "Draining: 1 client now" in container.property("StatusText")))
        crowd.finish()
        stop.result()
        draining.result()
        assert not any(peer.wrong for peer in crowd.peers)
        assert [peer.received for peer in whole] == [20_000_000] * 10
        assert endless.end == "eof"
    assert (container.property("Result"), container.property("ExecMainStatus")) == ("success", "0")
    receipt = container.events("drained")[-1]
    assert (receipt["clients"], receipt["completed"], receipt["cut"]) == (11, 10, 1)
    assert receipt["unsent_bytes"] == 0
    assert container.property("StatusText").startswith("Drained: clients=11 completed=10 quiet=0 cut=1 aborted=0 ")


def with_tls(container: Container, folder: Path) -> None:
    """Check the page's TLS drop-in, which passes a key that the service's user cannot read."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "90",
    ]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    for file in (certificate, key):
        container.write(f"/etc/echod/{file.name}", file.read_text())
    container.run("chmod", "600", "/etc/echod/key.pem")
    drop_in(container, block("tls"))
    context = ssl.create_default_context(cafile=certificate)
    with context.wrap_socket(container.connect(port=7443), server_hostname="localhost") as client:
        client.sendall(b"secret")
        assert receive(client, 6) == b"secret"


def restarted_under_load(container: Container) -> None:
    """Check two restarts while eight clients connect again and again: each connect succeeds, and each echo is complete."""
    container.run("rm", DROP_IN)
    container.shell(block("socket activation"))
    process = status(container)
    assert {process[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {f"{0:016x}"}
    assert "exposure level for echod.service: 0." in security(container)
    pids = [container.property("MainPID")]
    over = threading.Event()
    served = [0] * 8

    def come_and_go(number: int) -> None:
        last = False
        while not last:
            last = over.is_set()
            echo(socket.create_connection(("::1", 7) if number % 2 else ("127.0.0.1", 7), PATIENCE), os.urandom(1000))
            served[number] += 1

    def all_served(least: list[int]) -> bool:
        for client in clients:
            if client.done():
                client.result()  # raises its error: no client ends before the restarts
        return all(number >= enough for number, enough in zip(served, least, strict=True))

    clients = [container.spawn(partial(come_and_go, number)) for number in range(len(served))]
    try:
        for _ in range(2):
            wait(partial(all_served, [number + 10 for number in served]))
            container.run("systemctl", "restart", "echod")
            pids.append(container.property("MainPID"))
    finally:
        over.set()
    for client in clients:
        client.result()
    assert len(set(pids)) == 3
    assert [event["listener"] for event in container.events("listening")[-4:]] == [
        "systemd:echo",
        "udp:systemd:echo",
    ] * 2
    began = [event["pid"] for event in container.events("started")][-3:]
    assert [str(pid) for pid in began] == pids
    connections = sum(event["connections"] for event in container.events("stopped")[-2:])
    assert 0 < connections < sum(served)
    container.run("systemctl", "stop", "echod")
    assert container.property("ActiveState") == "inactive"
    echo(container.connect(), b"wake up")
    assert container.property("ActiveState") == "active"


def logged(container: Container) -> None:
    """Check that the journal has each line's fields, and its level as PRIORITY."""
    with container.connect() as client:
        peer = "{}:{}".format(*client.getsockname())
        echo(client, b"noted")
    (line,) = wait(lambda: [event for event in container.events("client_closed") if event["peer"] == peer])
    assert (line["received"], line["acked"], line["reason"]) == (5, 5, "eof")
    failed = container.events("reload_failed", "PRIORITY=3")
    assert "log.connections" in failed[0]["problems"][0]
    assert container.events("started", "PRIORITY=6")
    assert container.events("started", "PRIORITY=3") == []
