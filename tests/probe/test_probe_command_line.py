"""The command line of `echod probe`, and its documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE, clean_environment, run
from peers import Peer, echo
from probing import REFUSED, measure

if TYPE_CHECKING:
    from harness import Command

pytestmark = pytest.mark.once


def test_documentation() -> None:
    """docs/how-to/probe.md has every option and every key of the JSON report."""
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "probe.md").read_text("utf-8")
    options = set(re.findall(r"--[a-z][a-z0-9-]+", run("probe", "--help").stdout))
    assert len(options) > 20
    assert options - set(re.findall(r"--[a-z][a-z0-9-]+", text)) == {"--help"}
    with Peer(echo) as peer:
        keys = measure(peer.target).keys() | measure(peer.target, "--count", "1").keys()
    assert {key for key in keys if f"`{key}`" not in text} == set()


def test_help() -> None:
    result = run("probe", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for part in ("TARGET", "--rate R", "exit codes: 0 the echo was right", "64KiB", "(default: 64)"):
        assert part in result.stdout
    assert "echod probe TARGET" in run("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: TARGET"),
        (["h:1", "h:2"], "'h:2' is a second TARGET: give only one"),
        (["h:1", "--cuont=3"], "unknown option --cuont; did you mean --count?"),
        (["h:1", "--xyzzy"], "unknown option --xyzzy\n"),
        (["h:1", "--count"], "argument --count: expected one argument"),
        (["h"], "argument TARGET: 'h' has no port"),
        (["h:0"], "argument TARGET: 'h:0': a server cannot listen on port 0: use 1 to 65535"),
        (["systemd:echo"], "argument TARGET: 'systemd:echo': only a server inherits sockets; give the address"),
        (["h:1", "--count", "0"], "argument --count: '0' is not a whole number: use 1 or more"),
        (["h:1", "--seed", "x"], "argument --seed: 'x' is not a whole number: use 0 or more"),
        (["h:1", "--size", "3 apples"], "argument --size: '3 apples' is not a size: write bytes, or for example 64KiB"),
        (["h:1", "--size", "0.5"], "argument --size: '0.5' is not a valid size: use 1 byte to 1TiB"),
        (["h:1", "--timeout", "0"], "argument --timeout: '0' is not a time in seconds"),
        (
            ["h:1", "--timeout", "86401"],
            "argument --timeout: '86401' is not a time in seconds: use more than 0, at most a day",
        ),
        (["h:1", "--duration", "nan"], "argument --duration: 'nan' is not a time in seconds"),
        (["h:1", "--rate", "fast"], "argument --rate: 'fast' is not a number of messages per second"),
        (["h:1", "--source", "h"], "argument --source: 'h' is not an IP address"),
        (["h:1", "--proxy-v1", "h:1"], "argument --proxy-v1: 'h:1' is not an IP address and a port, which"),
        (["h:1", "--proxy-v2", "1.2.3.4"], "argument --proxy-v2: '1.2.3.4' has no port"),
        (["h:1", "--count", "1", "--duration", "1"], "--count and --duration both end the measurement"),
        (["h:1", "--stream", "--count", "1"], "--stream has no messages to --count"),
        (["h:1", "--stream", "--rate", "1"], "--stream sends at full speed"),
        (["h:1", "--stream", "--pipeline", "2"], "--stream never waits for an echo"),
        (["h:1", "--stream", "--plot", "x"], "--stream has no messages, so there is no latency"),
        (["h:1", "--rate", "1", "--pipeline", "2"], "--rate never waits for an echo"),
        (["h:1", "--ca", "x", "--server-name", "y"], "--ca, --server-name: add --tls"),
        (["h:1", "--tls", "--key", "x"], "--key is the key of a certificate: give --cert too"),
        (["h:1", "--tls", "--ca", "x", "--insecure"], "--insecure accepts any certificate, so --ca has no effect"),
        (["h:1", "--tls", "--ca", "/nowhere"], "--ca: '/nowhere' cannot be read: No such file or directory"),
        (["unix:/x", "--tls"], "give --server-name or --insecure"),
        (["unix:/x", "--source", "::1"], "--source is an IP address, but the target is a unix socket"),
        (["unix:/x", "--proxy-v1", "[::1]:1"], "a PROXY header contains IP addresses, but the target is a unix"),
        (["h:1", "--proxy-v1", "1.2.3.4:1", "--proxy-v2", "1.2.3.4:1"], "a connection has only one header"),
        (["127.0.0.1:1", "--proxy-v2", "[::1]:1"], "different IP families: TARGET 127.0.0.1, --proxy-v2 ::1"),
        (["h:1", "--source", "[::1]", "--proxy-v1", "1.2.3.4:1"], "families: --source ::1, --proxy-v1 1.2.3.4"),
    ],
)
def test_usage_errors(command: Command, arguments: list[str], message: str) -> None:
    result = command("probe", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    usage, error = result.stderr.splitlines(keepends=True)
    assert usage == "usage: echod probe TARGET [options]\n"
    assert error.startswith("echod probe: error: ")
    assert message in error


HIDE = """
import sys
sys.modules[sys.argv.pop(1)] = None
from echod.cli import main
sys.exit(main())
"""


def test_broken_installation() -> None:
    """A missing module that is not from the extra is not reported as one."""
    command = [sys.executable, "-c", HIDE, "html", "probe", REFUSED, "--count", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
    assert result.returncode == 1
    assert "ModuleNotFoundError: import of html halted" in result.stderr


@pytest.mark.parametrize(("module", "package"), [("rich", "rich"), ("hdrh", "hdrhistogram")])
def test_without_the_extra(module: str, package: str) -> None:
    """The quick check works without the extra. A measurement reports the missing package."""
    with Peer(echo) as peer:
        command = [sys.executable, "-c", HIDE, module, "probe", peer.target]
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
        assert (result.returncode, result.stderr) == (0, "")
        command += ["--count", "1"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"echod: a measurement needs {package}, which is not installed: pip install 'echod[probe]'\n"
    )
