"""Build the image and run it, on a separate dockerd."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import echod
import policy
from crowd import Crowd
from dockerd import BASE_IMAGE, SOURCE, Container, Engine, why_not
from harness import PATIENCE, free_port, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.once

CLIENTS = 50
ENDLESS = 5


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    if reason := why_not():
        pytest.skip(f"cannot start dockerd: {reason}")
    with Engine() as engine:
        engine.docker("build", "--network=host", f"--build-arg=BASE_IMAGE={BASE_IMAGE}", "--tag=echod", ".")
        yield engine


def test_policy() -> None:
    """Check that checkov reports only the base image's tag, which the user chooses."""
    assert policy.failures(SOURCE / "Dockerfile", "dockerfile") == {("CKV_DOCKER_7", "FROM")}


def test_version() -> None:
    """Check that the labels have the package's version. The build checks it too, but takes longer."""
    versions = re.findall("^ARG VERSION=(.*)$", (SOURCE / "Dockerfile").read_text(), re.MULTILINE)
    assert set(versions) == {echod.__version__}


# This is a single test because each test process would build its own image.
@pytest.mark.container
def test_docker(engine: Engine, tmp_path: Path) -> None:
    check_metadata(engine)
    check_contents(engine)
    restricted(engine)
    configured_by_a_file(engine, tmp_path)
    configured_by_arguments(engine)
    not_listening(engine)
    not_ready_while_it_stops(engine)
    stopped_under_load(engine)


def check_metadata(engine: Engine) -> None:
    config = engine.inspect("echod")["Config"]
    assert config["User"] == "65534:65534"
    assert config["Entrypoint"] == ["/opt/echod/bin/echod"]
    assert not config["Cmd"]
    assert config["StopSignal"] == "SIGTERM"
    assert sorted(config["ExposedPorts"]) == ["8000/tcp", "8000/udp"]
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert config["Labels"] == {
        "org.opencontainers.image.authors": "The echod authors",
        "org.opencontainers.image.base.name": BASE_IMAGE,
        "org.opencontainers.image.description": "A TCP echo daemon that loses nothing and says what it did",
        "org.opencontainers.image.licenses": "MIT",
        "org.opencontainers.image.title": "echod",
        "org.opencontainers.image.version": echod.__version__,
    }


def check_contents(engine: Engine) -> None:
    """Check that no installer, compiler or build residue is in any layer, and that all modules are compiled."""

    def shell(script: str, *options: str) -> list[str]:
        run = ("run", "--rm", "--network=none", *options, "--entrypoint=/bin/sh", "echod", "-c", script)
        return engine.docker(*run, check=False).stdout.splitlines()

    # One layer has all files, the other the working directory.
    assert len(engine.inspect("echod")["RootFS"]["Layers"]) <= 2
    # The base image's own interpreter could have modules that the virtual environment lacks.
    for python in ("python", "$(python -c 'import sys; print(sys._base_executable)')"):
        tried = [
            f"{python} -c 'import {module}; print({module})'" for module in ("pip", "ensurepip", "setuptools", "wheel")
        ]
        assert shell(f"{'; '.join(tried)}; {python} -c 'print(1)'") == ["1"]
    tools = "pip pip3 easy_install cc gcc c++ g++ clang make ld as"
    assert shell(f"for tool in {tools} sh; do command -v $tool; done") == ["/usr/bin/sh"]
    assert shell("find / -xdev -type f '(' -name '*.whl' -o -perm /6000 ')'", "--user=0") == []
    assert shell("find /source /wheel /build /root /tmp /var/cache -type f", "--user=0") == [
        "/root/.bashrc",
        "/root/.profile",
    ]
    assert shell("find /opt /etc/echod -xdev '(' -writable -o -user 65534 ')' ! -type l") == []
    output = engine.docker(
        *("run", "--rm", "--network=none", "--read-only", "--entrypoint=python", "echod", "-v"),
        *("-c", "import echod.cli, echod.daemon.daemon, echod.probe.command, uvloop"),
    ).stderr
    read = re.findall("^# code object from '(.*)'$", output, re.MULTILINE)
    assert any(name.startswith("/opt/echod/") for name in read)
    assert [name for name in read if not name.endswith(".pyc")] == []


def restricted(engine: Engine) -> None:
    """Check a container with settings from variables: unprivileged, on a read-only file system, and healthy."""
    variables = ("--env=ECHOD_LISTEN=:9000,:9001", "--env=ECHOD_LOG__CONNECTIONS=all")
    with Container(engine, "restricted", "--network=none", "--health-interval=1s", *variables) as container:
        until(lambda: container.state["Health"]["Status"] == "healthy")
        status = Path(f"/proc/{container.state['Pid']}/status").read_text()
        assert re.findall(r"^(?:Uid|CapEff|NoNewPrivs|Seccomp):\s(.*)$", status, re.MULTILINE) == [
            "65534\t65534\t65534\t65534",
            *("0000000000000000", "1", "2"),
        ]
        assert "Read-only file system" in container.run("touch", "/tmp/x", check=False).stderr
        # The health check connects to the first address of ECHOD_LISTEN.
        assert container.wait_for("client_closed")["listener"] == ":9000"
        assert {event["address"] for event in container.events("listening")} >= {"0.0.0.0:9000", "0.0.0.0:9001"}
        engine.docker("stop", container.name)
        assert container.state["ExitCode"] == 0


def configured_by_a_file(engine: Engine, tmp_path: Path) -> None:
    """Check a settings file at the image's path and at another path, and a reload by SIGHUP."""
    for place, options, hangup in (
        ("/etc/echod/echod.toml", (), ("kill", "--signal=HUP", "by-file")),
        ("/else.toml", ("--env=ECHOD_CONFIG=/else.toml",), ("exec", "by-file", "sh", "-c", "kill -HUP 1")),
    ):
        file = tmp_path / "echod.toml"
        file.write_text('listen = [":7000"]\n')
        mount = f"--volume={file}:{place}:ro"
        health = ("--health-interval=1s", "--health-cmd=echod probe :7000")
        with Container(engine, "by-file", "--network=none", mount, *options, *health) as container:
            until(lambda: container.state["Health"]["Status"] == "healthy")
            assert container.wait_for("listening")["address"] == "0.0.0.0:7000"
            file.write_text('listen = [":7000"]\nlimits.idle_timeout = 60\n')
            engine.docker(*hangup)
            assert container.wait_for("reloaded")["changed"] == ["limits.idle_timeout"]


def configured_by_arguments(engine: Engine) -> None:
    """Check that arguments are passed to echod: options, or another command."""
    with Container(engine, "arguments", "--network=none", arguments=("--log.connections", "all")) as container:
        assert container.wait_for("listening")["address"] == "0.0.0.0:8000"
        container.run("echod", "probe", ":8000")
        assert container.wait_for("client_closed")["received"] == 64
    wrong = engine.docker("run", "--rm", "--network=none", "echod", "check", "--limits.backlog", "0", check=False)
    assert wrong.returncode == 78
    assert "--limits.backlog" in wrong.stderr


def not_listening(engine: Engine) -> None:
    """Check that a container that does not echo is unhealthy, and that the probe's output says why."""
    options = ("--network=none", "--health-interval=1s", "--health-retries=1", "--health-start-period=0s")
    with Container(engine, "deaf", *options, "--env=ECHOD_LISTEN=:9000", arguments=("--listen", ":9001")) as container:
        until(lambda: container.state["Health"]["Status"] == "unhealthy")
        assert ":9000: no connection" in container.state["Health"]["Log"][-1]["Output"]
        assert container.state["Health"]["Log"][-1]["ExitCode"] == 69


# An HTTP client that prints the status code for a path.
ASK = """
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(f"http://127.0.0.1:9000{sys.argv[1]}").status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


def not_ready_while_it_stops(engine: Engine) -> None:
    """Check that readiness fails at the signal, while clients are still served for `shutdown.delay`."""
    variables = ("--env=ECHOD_ADMIN__ADDRESS=:9000", "--env=ECHOD_SHUTDOWN__DELAY=4")
    with Container(engine, "admin", "--network=none", *variables) as container:

        def ask() -> dict[str, int]:
            paths = ("/livez", "/readyz", "/metrics")
            return {path: int(container.run("python", "-c", ASK, path).stdout) for path in paths}

        container.wait_for("listening")
        assert ask() == {"/livez": 200, "/readyz": 200, "/metrics": 200}
        stop = engine.start("stop", container.name)
        container.wait_for("draining")
        assert ask() == {"/livez": 200, "/readyz": 503, "/metrics": 200}
        container.run("echod", "probe", ":8000")
        assert stop.wait(PATIENCE) == 0
        assert container.state["ExitCode"] == 0


def stopped_under_load(engine: Engine) -> None:
    """Check `docker stop` under load: each client receives the echo of all bytes that echod has read.

    Docker kills a container 10 seconds after the signal. With its default settings, echod has stopped by then.
    """
    port = free_port()
    with Container(engine, "loaded", "--network=host", f"--env=ECHOD_LISTEN=:{port}") as container:
        container.wait_for("listening")
        with Crowd() as crowd:
            for seed in range(CLIENTS):
                crowd.add(socket.create_connection(("127.0.0.1", port)), None, seed)
            crowd.run(lambda: all(peer.received for peer in crowd.peers))
            stop = engine.start("stop", container.name)
            # No peer is served while the log is read, but that takes less time than the daemon's timeouts.
            crowd.run(lambda: bool(container.events("draining")))
            for peer in crowd.peers[ENDLESS:]:
                peer.total = peer.sent + 1_000_000
            crowd.finish()
            assert stop.wait(PATIENCE) == 0
            assert [peer.end for peer in crowd.peers] == ["eof"] * CLIENTS
            assert not any(peer.wrong for peer in crowd.peers)
            assert [peer.received for peer in crowd.peers[ENDLESS:]] == [peer.total for peer in crowd.peers[ENDLESS:]]
            lines = {int(line["peer"].rpartition(":")[2]): line for line in container.events("client_closed")}
            assert {peer.port: peer.received for peer in crowd.peers} == {
                port: line["received"] for port, line in lines.items()
            }
        assert container.state["ExitCode"] == 0
        receipt = container.events("drained")[0]
        figures = ("clients", "completed", "quiet", "cut", "aborted", "failed", "unsent_bytes", "unacked_bytes")
        assert [receipt[name] for name in figures] == [CLIENTS, CLIENTS - ENDLESS, 0, ENDLESS, 0, 0, 0, 0]
        assert container.events("stopped")
