"""The command line of `echod probe`, and its documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import datagrams
from datagrams import UdpPeer
from echod.probe import arguments, workloads
from harness import PATIENCE, clean_environment, run
from peers import Peer, echo
from probing import REFUSED, measure

if TYPE_CHECKING:
    from harness import Command

pytestmark = pytest.mark.once


def test_documentation() -> None:
    """docs/reference/probe.md has every option and every key of the JSON report."""
    text = (Path(__file__).parents[2] / "docs" / "reference" / "probe.md").read_text("utf-8")
    options = set(re.findall(r"--[a-z][a-z0-9-]+", run("probe", "--help").stdout))
    assert len(options) > 20
    assert options - set(re.findall(r"--[a-z][a-z0-9-]+", text)) == {"--help"}
    keys = set()
    with Peer(echo) as peer, UdpPeer(datagrams.echo) as udp:
        for target in (peer.target, udp.target):
            keys |= measure(target).keys() | measure(target, "--count", "1").keys()
    assert len(keys) > 40
    assert {key for key in keys if f"`{key}`" not in text} == set()


def test_help() -> None:
    result = run("probe", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for part in ("TARGET", "--rate N", "0         the echo was right", "64KiB", "(default: 64)"):
        assert part in result.stdout
    assert "echod probe TARGET" in run("--help").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "TARGET is missing: write the server's address, such as 127.0.0.1:8000"),
        (["h:1", "h:2"], "'h:2' is a second TARGET: give only one"),
        (["h:1", "--cuont=3"], "unknown option --cuont; did you mean --count?"),
        (["h:1", "--xyzzy"], "unknown option --xyzzy\n"),
        (["h:1", "--count"], "argument --count: expected one argument"),
        (["h"], "TARGET 'h' has no port: write HOST:PORT, [V6]:PORT, :PORT, udp:HOST:PORT, unix:PATH"),
        (["h:0"], "TARGET 'h:0': a server cannot listen on port 0: use 1 to 65535"),
        (["systemd:echo"], "TARGET 'systemd:echo': only a server inherits sockets; give the address"),
        (["h:1", "--count", "0"], "argument --count: '0' is not a number of at least 1: write for example 50 or 10k\n"),
        (["h:1", "--seed", "x"], "argument --seed: 'x' is not a whole number: use 0 or more"),
        (["h:1", "--size", "3 apples"], "argument --size: '3 apples' is not a size: write bytes, or for example 64KiB"),
        (["h:1", "--size", "0"], "--size 0: only a datagram (udp:HOST:PORT) may be empty; use 1 byte or more\n"),
        (["h:1", "--size", "2TB"], "argument --size: '2TB' is not a valid size: use at most 1TiB\n"),
        (["h:1", "--timeout", "0"], "argument --timeout: '0': use more than 0, at most a day\n"),
        (["h:1", "--timeout", "25h"], "argument --timeout: '25h': use more than 0, at most a day\n"),
        (["h:1", "--timeout", "5x"], "'5x' is not a duration: write seconds, or for example 250ms, 10s, 5m or 1h\n"),
        (["h:1", "--duration", "nan"], "argument --duration: 'nan' is not a duration: write seconds, or for example"),
        (["h:1", "--duration", "10000h"], "argument --duration: '10000h': use more than 0, at most a year\n"),
        (["h:1", "--rate", "fast"], "argument --rate: 'fast' is not a rate: use messages per second, more than 0"),
        (["h:1", "--rate", "11M"], "argument --rate: '11M' is not a rate: use messages per second, more than 0"),
        (["h:1", "--rate", ""], "argument --rate: '' is not a rate"),
        (["h:1", "--plot", "x.png"], "argument --plot: 'x.png': the plot is an SVG file: write 'x.svg'\n"),
        (["h:1", "--source", "h"], "argument --source: 'h' is not an IP address"),
        (["h:1", "--proxy-v1", "h:1"], "argument --proxy-v1: 'h:1' is not an IP address and a port, which"),
        (["h:1", "--proxy-v2", "1.2.3.4"], "argument --proxy-v2: '1.2.3.4' has no port: write SRC:PORT\n"),
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
        (["h:1", "--dscp", "64"], "argument --dscp: '64' is not a DSCP: use 0 to 63, CS0 to CS7, AF11 to AF43, EF or"),
        (["h:1", "--dscp", "AF44"], "argument --dscp: 'AF44' is not a DSCP: use 0 to 63"),
        (["h:1", "--ttl", "0"], "argument --ttl: '0' is not a TTL: use 1 to 255\n"),
        (["h:1", "--ttl", "256"], "argument --ttl: '256' is not a TTL: use 1 to 255\n"),
        (["unix:/x", "--ttl", "5"], "--dscp and --ttl are for IP, but the target is a unix socket"),
        (["unix:/x", "--dscp", "0"], "--dscp and --ttl are for IP, but the target is a unix socket"),
        (["h:1", "--rate", "5", "--interval", "1"], "--interval TIME is the same as --rate 1/TIME: give only one"),
        (["h:1", "--interval", "1", "--pipeline", "2"], "--interval never waits for an echo, so --pipeline has no"),
        (["h:1", "--interval", "1", "--stream"], "--stream sends at full speed, not at an --interval: give only one"),
        (["h:1", "--window", "5"], "--window is for UDP: for connections, write --pipeline"),
        (["h:1", "--max-loss", "0"], "--max-loss is for UDP: over TCP, a lost message is always an error"),
        (["udp:h:1", "--max-loss", "101"], "argument --max-loss: '101' is not a percentage: use 0 to 100, such as 0.5"),
        (["udp:h:1", "--max-loss", "1/2"], "argument --max-loss: '1/2' is not a percentage: use 0 to 100"),
        (["udp:h:1", "--tls"], "--tls: there is no TLS over UDP; remove --tls"),
        (["udp:h:1", "--insecure", "--ca", "x"], "--ca, --insecure: there is no TLS over UDP; remove it"),
        (["udp:h:1", "--proxy-v2", "1.2.3.4:1"], "a PROXY header starts a connection, but UDP has none: remove the"),
        (["udp:h:1", "--half-close"], "--half-close ends a connection, but UDP has none: remove it"),
        (["udp:h:1", "--connections", "2"], "--connections: UDP has none; --window N sets the datagrams in flight"),
        (["udp:h:1", "--pipeline", "2"], "--pipeline is for connections: for UDP, write --window"),
        (["udp:h:1", "--stream"], "--stream is for connections: for UDP, give --rate or --window"),
        (["udp:h:1", "--seed", "0"], "--seed has no effect on UDP, as the bytes depend on a random session"),
        (["udp:h:1", "--size", "65508"], "--size: a datagram has at most 65,507 bytes, not 65,508"),
        (["udp:h:1", "--window", "5", "--rate", "1"], "--window waits for echoes, --rate does not: give only one"),
        (["udp:h:1", "--window", "5", "--interval", "1"], "--window waits for echoes, --rate does not: give only"),
        (["udp:1.2.3.4:1", "--source", "::1"], "different IP families: TARGET 1.2.3.4, --source ::1"),
    ],
)
def test_usage_errors(command: Command, words: list[str], message: str) -> None:
    result = command("probe", *words)
    assert (result.returncode, result.stdout) == (2, "")
    usage, error = result.stderr.splitlines(keepends=True)
    assert usage == "usage: echod probe TARGET [options]\n"
    assert error.startswith("echod probe: error: ")
    assert message in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-c", "10", "h:1"], "unknown option -c; write --connections"),
        (["h:1", "-c10"], "unknown option -c; write --connections"),
        (["h:1", "-n", "5"], "unknown option -n; write --count"),
        (["-d", "10s", "h:1"], "unknown option -d; write --duration"),
        (["h:1", "-t", "5"], "unknown option -t; write --duration or --timeout"),
        (["h:1", "-timeout=5"], "unknown option -timeout; did you mean --timeout?"),
        (["--host", "h", "--port", "1"], "unknown option --host; write HOST:PORT"),
        (["h:1", "--qps=5"], "unknown option --qps; write --rate"),
        (["h:1", "-x6"], "unknown option -x"),
        (["--version"], "unknown option --version; write echod --version"),
        (["h:1", "--a\n\x1b"], "unknown option --a\\n\\x1b"),
        (
            ["h\n:1"],
            f"TARGET 'h\\n:1': 'h\\n' is not a host name: write {arguments._FORMS}",
        ),
        (["http://h:80/path"], "TARGET 'http://h:80/path' is a URL: write h:80"),
        (["HTTP://user@h?x"], "TARGET 'HTTP://user@h?x' is a URL: write h:80"),
        (["https://[::1]/"], "TARGET 'https://[::1]/' is a URL: write [::1]:443 --tls"),
        (["tcp://h:7"], "TARGET 'tcp://h:7' is a URL: write h:7"),
        (["tcp://h"], "TARGET 'tcp://h' is a URL: write h:PORT"),
        (["/run/echo.sock"], "TARGET '/run/echo.sock' has no port: for a unix socket, write unix:/run/echo.sock"),
        (["@name"], "TARGET '@name' has no port: for a unix socket, write unix:@name"),
        (["h:1", "8000"], "'8000' is a second TARGET: give only one"),
        (["99999"], "TARGET ':99999': '99999' is not a port: use 0 to 65535"),
        (["udp:99999"], "TARGET 'udp::99999': '99999' is not a port: use 0 to 65535"),
        (
            ["udp:h"],
            "TARGET 'udp:h' has no port: write HOST:PORT, [V6]:PORT, :PORT, udp:HOST:PORT, unix:PATH or unix:@NAME",
        ),
        (["udp:::1:7"], "TARGET 'udp:::1:7': an IPv6 address needs brackets: write udp:[V6]:PORT"),
        (["udp:h:0"], "TARGET 'udp:h:0': a server cannot listen on port 0: use 1 to 65535"),
        (
            ["udp:unix:/x"],
            "TARGET 'udp:unix:/x': a unix socket has no UDP: write udp:HOST:PORT, or unix:/x for a stream",
        ),
        (["udp://h:7"], "TARGET 'udp://h:7' is a URL: write udp:h:7"),
        (["h:7", "-u"], "unknown option -u; write udp:HOST:PORT"),
        (["h:7", "-i", "0.2"], "unknown option -i; write --interval"),
    ],
)
def test_first_guesses(command: Command, words: list[str], message: str) -> None:
    """The options and addresses of similar tools are answered with what to write."""
    result = command("probe", *words)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[1] == f"echod probe: error: {message}"


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (["8000"], ":8000"),
        (["localhost", "8000"], "localhost:8000"),
        (["192.0.2.1", "8000"], "192.0.2.1:8000"),
        (["::1", "8000"], "[::1]:8000"),
        (["[::1]", "8000"], "[::1]:8000"),
        (["udp:7"], "udp::7"),
        (["udp:[::1]:7"], "udp:[::1]:7"),
        (["udp:Echo.Example:7"], "udp:echo.example:7"),
    ],
)
def test_targets(words: list[str], target: str) -> None:
    """A port alone is on localhost, and HOST PORT is HOST:PORT. Options may stand before, between and after them."""
    assert str(arguments.parse(["--", *words]).target) == target
    for place in range(len(words) + 1):
        options = arguments.parse([*words[:place], "--timeout", "1m", *words[place:]])
        assert (str(options.target), options.timeout) == (target, 60)


def test_units() -> None:
    """Times, sizes and numbers have units."""
    parsed = arguments.parse(["h:1", "--timeout", "250ms", "--duration", "1h30m", "--size", "64k", "--rate", "1.5k/s"])
    assert (parsed.timeout, parsed.duration, parsed.size, parsed.rate) == (0.25, 5400, 64000, 1500)
    parsed = arguments.parse(["h:1", "--count", "10k", "--connections", "007", "--size", "64KiB"])
    assert (parsed.messages, parsed.connections, parsed.size) == (10_000, 7, 65536)
    assert arguments.parse(["h:1", "--rate", "0.5"]).rate == 0.5
    assert arguments.parse(["h:1", "--rate", "10M"]).rate == 10_000_000


def test_any_measurement_option_starts_one() -> None:
    """A value of 0 is a value too."""
    for option in (("--seed", "0"), ("--stream",)):
        assert arguments.parse(["h:1", *option]).measure
    for option in (("--size", "0"), ("--max-loss", "0"), ("--window", "2"), ("--interval", "1")):
        assert arguments.parse(["udp:h:1", *option]).measure
    for option in (("--timeout", "1"), ("--dscp", "0"), ("--ttl", "1"), ("--json",)):
        assert not arguments.parse(["udp:h:1", *option]).measure


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("63", 63), ("cs0", 0), ("CS7", 56), ("af11", 10), ("AF43", 38), ("ef", 46), ("LE", 1)],
)
def test_dscp(text: str, number: int) -> None:
    assert arguments.parse(["h:1", "--dscp", text]).route.dscp == number


def test_interval() -> None:
    """An interval is a rate. Every datagram that is due within the duration is sent, and no further one."""
    for interval, duration, count in (("30ms", "3", 100), ("0.1", "0.7", 7), ("20ms", "10", 500), ("1m", "1", 1)):
        workload = workloads.choose(arguments.parse(["udp:h:1", "--interval", interval, "--duration", duration]))
        due = 0
        while not workload.exhausted:
            due += len(workload.schedule(10**18)[0])
        assert due == count


def test_plot_files() -> None:
    """An SVG file, or a device without a suffix."""
    for path in ("x.svg", "x.SVG", "/dev/stdout", "run.1/x"):
        assert str(arguments.parse(["h:1", "--plot", path]).plot) == path


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
        f"echod: a measurement needs {package}, which is not installed: {sys.executable} -m pip install {package}\n"
    )
