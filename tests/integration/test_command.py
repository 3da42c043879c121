"""Test the output and the exit codes of the command."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import PATIENCE, Daemon, clean_environment, free_port, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Command

pytestmark = pytest.mark.once

CHECKED = "configuration OK: the command line; no file was checked\n"

UNPRIVILEGED_PORTS = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


def test_check(tmp_path: Path) -> None:
    path = tmp_path / "echo.toml"
    path.write_text("[limits]\nidle_timout = 3\nbacklog = 0\n")
    result = run("check", "--config", str(path))
    assert (result.returncode, result.stdout) == (78, "")
    assert result.stderr.splitlines() == [
        f"echod: {path}:3: limits.backlog: should be at least 1, not 0",
        f"echod: {path}:2: limits.idle_timout: unknown key; did you mean 'idle_timeout'?",
    ]
    path.write_text("[limits]\nidle_timeout = 3\n")
    variables = {"ECHOD_PORT": "tcp://10.0.0.1:80", "ECHOD_LIMITS_BACKLOG": "3"}
    result = run("check", env={"ECHOD_CONFIG": str(path), **variables})
    assert (result.returncode, result.stdout) == (0, f"configuration OK: {path}\n")
    assert result.stderr.splitlines() == [
        "echod: warning: ECHOD_LIMITS_BACKLOG is not a setting: did you mean ECHOD_LIMITS__BACKLOG?",
        "echod: warning: ECHOD_PORT is not a setting",
    ]


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "only the defaults were checked; name a file with --config FILE"),
        ([], {"ECHOD_CONFIG": ""}, "only the defaults were checked; name a file with --config FILE"),
        ([], {"ECHOD_LOOP": "asyncio"}, "ECHOD_LOOP; no file was checked"),
        (
            [":1", "--faults.a.seed", "1", "--loop", "auto"],
            {"ECHOD_LOOP": "x", "ECHOD_FAULTS__A__ACTION": "corrupt", "ECHOD_LIMITS__BACKLOG": "3"},
            "ECHOD_FAULTS__A__ACTION, ECHOD_LIMITS__BACKLOG, the command line; no file was checked",
        ),
        (["--config", "FILE"], {"ECHOD_LOOP": "asyncio"}, "FILE, ECHOD_LOOP"),
        (["--config", "FILE", "8000"], {}, "FILE, the command line"),
    ],
)
def test_sources_that_were_checked(
    arguments: list[str], variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    """`check` names the file, and the other sources that a setting came from."""
    path = tmp_path / "echo.toml"
    path.write_text('loop = "auto"\n')
    result = run("check", *(text.replace("FILE", str(path)) for text in arguments), env=variables)
    assert result.stderr == ""
    assert (result.returncode, result.stdout) == (
        0,
        f"configuration OK: {message}\n".replace("OK: FILE", f"OK: {path}"),
    )


def test_config_round_trip(tmp_path: Path) -> None:
    """`--config` reads the output of `config`. Options may precede the command."""
    options = ("--limits.idle-timeout", "5", "--listen", "127.0.0.1:1")
    first = run(*options, "config")
    assert first.returncode == 0
    assert "idle_timeout = 5.0  # --limits.idle-timeout\n" in first.stdout
    path = tmp_path / "echo.toml"
    path.write_text(first.stdout)
    second = run("config", "--config", str(path))
    assert [line.partition("  #")[0] for line in second.stdout.splitlines()] == [
        line.partition("  #")[0] for line in first.stdout.splitlines()
    ]


def test_config_of_odd_texts(tmp_path: Path) -> None:
    """`config` quotes names and escapes values, so that both are read back. Each line has its source."""
    path = tmp_path / "echo.toml"
    path.write_text("""\
[listeners."a b.c"]
address = "[::1]:1"
fault = "#\\""
[faults."#\\""]
trigger = "q\\"\\\\\\u0000\\u007f#\\r\\n🎉"
action = "raise"
""")
    environment = {"ECHOD_FAULTS__ENV__TRIGGER": "ü # \t\n", "ECHOD_LOG__FILE": "#'\\"}
    first = run("config", "--faults.env.action", "raise", "--config", str(path), env=environment)
    assert (first.returncode, first.stderr) == (0, "")
    assert [line for line in first.stdout.splitlines() if line and not line.endswith("  # default")] == [
        "[limits]",
        "[shutdown]",
        "[log]",
        'file = "#\'\\\\"  # ECHOD_LOG__FILE',
        "[admin]",
        '[faults."#\\""]',
        f'trigger = "q\\"\\\\\\u0000\\u007f#\\r\\n🎉"  # {path}:5',
        f'action = "raise"  # {path}:6',
        "[faults.env]",
        'trigger = "ü # \\t\\n"  # ECHOD_FAULTS__ENV__TRIGGER',
        'action = "raise"  # --faults.env.action',
        '[listeners."a b.c"]',
        f'address = "[::1]:1"  # {path}:2',
        f'fault = "#\\""  # {path}:3',
    ]
    printed = tmp_path / "printed.toml"
    printed.write_text(first.stdout)
    second = run("config", "--config", str(printed))
    assert second.returncode == 0
    assert tomllib.loads(second.stdout) == tomllib.loads(first.stdout)


def test_config_is_utf8_everywhere() -> None:
    """`config` prints UTF-8 in any encoding of the terminal, as TOML requires."""
    command = [sys.executable, "-m", "echod", "config", "--faults.b.trigger", "ü🎉", "--faults.b.action", "raise"]
    environment = clean_environment({"PYTHONIOENCODING": "latin-1"})
    result = subprocess.run(command, capture_output=True, timeout=PATIENCE, env=environment)
    assert (result.returncode, result.stderr) == (0, b"")
    assert tomllib.loads(result.stdout.decode())["faults"]["b"]["trigger"] == "ü🎉"


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command in which "$@" stands for echod."""
    words = ["sh", "-c", command, "sh", sys.executable, "-m", "echod"]
    return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_output_that_cannot_be_written() -> None:
    """A full standard output is one line and exit code 1. A full standard error does not change the exit code."""
    for command in ("config", "check", "--help", "--version", "probe --help"):
        result = shell(f'"$@" {command} >/dev/full')
        assert (result.returncode, result.stderr) == (1, "echod: standard output: No space left on device\n"), command
    assert shell('"$@" check --loop none 2>/dev/full').returncode == 78


def test_output_without_a_reader() -> None:
    receiver, sender = os.pipe()
    os.close(receiver)
    try:
        command = [sys.executable, "-m", "echod", "config"]
        environment = clean_environment()
        result = subprocess.run(
            command, stdout=sender, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, env=environment
        )
    finally:
        os.close(sender)
    assert (result.returncode, result.stderr) == (1, "echod: standard output: Broken pipe\n")


def test_closed_output() -> None:
    """If standard output or standard error is closed, its lines are dropped and do not go to the other one."""
    result = shell('"$@" config >&-')
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    result = shell('ECHOD_PORT=1 "$@" check --loop auto 2>&-')
    assert (result.returncode, result.stdout, result.stderr) == (0, CHECKED, "")
    result = shell('"$@" check --loop none 2>&-')
    assert (result.returncode, result.stdout, result.stderr) == (78, "", "")


def test_check_opens_nothing(taken: str, tmp_path: Path) -> None:
    """`check` neither opens the address, which may be in use, nor creates the log file."""
    log = tmp_path / "echo.log"
    result = run("check", "--listen", taken, "--log.file", str(log))
    assert (result.returncode, result.stdout, result.stderr) == (0, CHECKED, "")
    assert not log.exists()


def test_sources_of_the_file(tmp_path: Path) -> None:
    """The option overrides the variable. An empty variable is ignored, but an empty option is an error."""
    path = tmp_path / "echo.toml"
    path.write_text('loop = "asyncio"\n')
    missing = str(tmp_path / "none.toml")
    result = run("config", "--config", str(path), env={"ECHOD_CONFIG": missing})
    assert f'loop = "asyncio"  # {path}:1\n' in result.stdout
    result = run("check", env={"ECHOD_CONFIG": missing})
    assert (result.returncode, result.stderr) == (78, f"echod: {missing}: cannot be read: No such file or directory\n")
    assert run("check", env={"ECHOD_CONFIG": ""}).returncode == 0
    for arguments in (["--config", ""], ["--config="]):
        result = run("check", *arguments, env={"ECHOD_CONFIG": str(path)})
        assert (result.returncode, result.stderr) == (78, "echod: --config: names no file\n")


def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "echo.toml"
    path.write_text('loop = "asyncio"\n')
    path.chmod(0)
    result = run_without("dac_override,dac_read_search", "check", "--config", str(path))
    assert (result.returncode, result.stderr) == (78, f"echod: {path}: cannot be read: Permission denied\n")


def test_names_that_break_lines() -> None:
    """A warning stays on one line even if the name of the variable contains a line break."""
    result = run("check", env={"ECHOD_A\nB\x1b": "1"})
    assert result.stderr == "echod: warning: ECHOD_A\\nB\\x1b is not a setting\n"


@pytest.mark.parametrize("name", ["serve", "check", "config"])
def test_invalid_settings(command: Command, name: str, tmp_path: Path) -> None:
    """Every command exits with 78 and reports all problems, a log file that cannot be written included."""
    result = command(name, "--limits.backlog", "none", "--limits.colour", "red")
    assert result.returncode == 78
    assert len(result.stderr.splitlines()) == 2
    missing = tmp_path / "none" / "log"
    link = tmp_path / "link"
    link.symlink_to(missing)
    reasons = {
        str(tmp_path): "Is a directory",
        str(missing): f"No such file or directory: create the folder '{missing.parent}'",
        str(link): f"No such file or directory: create the folder '{missing.parent}'",
        "x" * 300: "File name too long",
    }
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        reasons[str(tmp_path / "socket")] = "No such device or address"
        for file, reason in reasons.items():
            result = command(name, "--log.file", file)
            problem = f"echod: --log.file: log.file: {file!r} cannot be written: {reason}\n"
            assert (result.returncode, result.stderr) == (78, problem)
    assert not missing.parent.exists()


@pytest.mark.parametrize("name", ["serve", "check"])
def test_log_pipe_without_a_reader(command: Command, name: str, tmp_path: Path) -> None:
    """`check` and `serve` refuse a FIFO without a reader with the same message."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    result = command(name, "--log.file", str(fifo))
    reason = "No such device or address: no process reads this FIFO; start its reader first"
    problem = f"echod: --log.file: log.file: {str(fifo)!r} cannot be written: {reason}\n"
    assert (result.returncode, result.stderr) == (78, problem)


def test_check_leaves_the_log_alone(command: Command, tmp_path: Path) -> None:
    """`check` neither creates nor changes a log file, and accepts a FIFO with a reader."""
    new, old, fifo = tmp_path / "new", tmp_path / "old", tmp_path / "fifo"
    old.write_text("a line\n")
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    for file in (new, old, fifo):
        assert command("check", "--log.file", str(file)).stdout == CHECKED
    os.close(reader)
    assert not new.exists()
    assert old.read_text() == "a line\n"


@pytest.fixture
def taken() -> Iterator[str]:
    """Return an address that another socket listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield f"127.0.0.1:{sock.getsockname()[1]}"


def test_addresses_that_cannot_be_opened(taken: str) -> None:
    """The exit code is 69, with a line for each address. An address that was opened is free again."""
    host, port = "127.0.0.1", free_port()
    listen = (f"{host}:{port}", taken, "192.0.2.1:0", "name.invalid:0")
    result = run(*(text for address in listen for text in ("--listen", address)))
    assert result.returncode == 69
    in_use, not_ours, no_name = result.stderr.splitlines()
    find = f"find the process with: ss -ltnp 'sport = :{taken.partition(':')[2]}'"
    assert in_use == f"echod: cannot listen on {taken}: Address already in use: {find}"
    assert not_ours.startswith("echod: cannot listen on 192.0.2.1:0: Cannot assign requested address: this host ")
    assert no_name.startswith("echod: cannot listen on name.invalid:0: the name cannot be resolved (")
    socket.create_server((host, port)).close()


def run_without(capabilities: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command without some of the capabilities of root."""
    command = [sys.executable, "-m", "echod", *arguments]
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv is not installed, and root has all capabilities")
        # Keep the user: another user may not be able to read the interpreter.
        dropped = ",".join(f"-{name}" for name in capabilities.split(","))
        command = ["setpriv", f"--inh-caps={dropped}", f"--bounding-set={dropped}", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())


@pytest.mark.skipif(
    not UNPRIVILEGED_PORTS.exists() or int(UNPRIVILEGED_PORTS.read_text()) < 8, reason="every user may listen on port 7"
)
def test_privileged_port() -> None:
    """Without permission for port 7, the message names the address and the capability, and the exit code is 69."""
    host, port = "127.0.0.1", free_port()
    result = run_without("net_bind_service", "--listen", f"{host}:{port},127.0.0.1:7")
    assert result.returncode == 69
    (line,) = result.stderr.splitlines()
    assert line.startswith("echod: cannot listen on 127.0.0.1:7: Permission denied: ports below ")
    for advice in ("CAP_NET_BIND_SERVICE", "AmbientCapabilities=", "packaging/systemd", "docker run -p 7:8000"):
        assert advice in line
    socket.create_server((host, port)).close()


HIDE_UVLOOP = """
import sys
from importlib.machinery import PathFinder
class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "uvloop" else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hide
from echod.cli import main
sys.exit(main())
"""


def test_without_uvloop() -> None:
    """If uvloop is not installed, `auto` chooses asyncio, and `uvloop` is an error that says so."""
    with Daemon(module=("-c", HIDE_UVLOOP)) as daemon:
        assert daemon.wait_for("started")["loop"] == "asyncio"
        daemon.echo(b"x")
        assert daemon.stop() == 0
    command = [sys.executable, "-c", HIDE_UVLOOP, "check", "--loop", "uvloop"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=clean_environment())
    assert result.returncode == 78
    assert result.stderr == ("echod: --loop: loop: uvloop is not installed: install it, or choose auto or asyncio\n")


# A stand-in for uvloop without descriptors for the sockets that it opens to close itself.
UNCLOSABLE = """
import asyncio, errno
class Loop(asyncio.SelectorEventLoop):
    async def shutdown_asyncgens(self):
        raise OSError(errno.EMFILE, "Too many open files")
new_event_loop = Loop
"""


def test_crash(tmp_path: Path) -> None:
    """An unexpected exception is logged on one line with its traceback, and the exit code is 1."""
    (tmp_path / "uvloop.py").write_text("raise RuntimeError('a broken uvloop')")
    result = run("--listen", "127.0.0.1:0", "--loop", "uvloop", env={"PYTHONPATH": str(tmp_path)})
    assert (result.returncode, result.stdout) == (1, "")
    line = json.loads(result.stderr)
    assert (line["level"], line["event"]) == ("error", "crashed")
    assert "RuntimeError: a broken uvloop" in line["exception"]


def test_loop_that_cannot_be_closed(tmp_path: Path) -> None:
    """A failure of the loop after the stop does not change the exit code: nothing is lost any more."""
    (tmp_path / "uvloop.py").write_text(UNCLOSABLE)
    with Daemon("--loop", "uvloop", env={"PYTHONPATH": str(tmp_path)}) as daemon:
        daemon.echo(b"x")
        assert daemon.stop() == 0
        assert daemon.loud() == []


def test_garbage_collection() -> None:
    """Once the daemon serves, garbage is collected, but not among the imported objects."""
    code = (
        "import gc, sys; from echod import cli; sys.exit(cli.main() or not gc.isenabled() or not gc.get_freeze_count())"
    )
    with Daemon(module=("-c", code)) as daemon:
        assert daemon.stop() == 0


def test_plugins_of_pydantic(tmp_path: Path) -> None:
    """Plugins of Pydantic run only if PYDANTIC_DISABLE_PLUGINS allows it."""
    (tmp_path / "meddler.py").write_text("print('here I am')\nplugin = None\n")
    metadata = tmp_path / "meddler-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: meddler\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[pydantic]\nmeddler = meddler\n")
    path = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    assert run("check", "--loop", "auto", env=path).stdout == CHECKED
    assert "here I am" in run("check", env=path | {"PYDANTIC_DISABLE_PLUGINS": ""}).stdout


def test_auto_takes_uvloop() -> None:
    with Daemon() as daemon:
        assert daemon.wait_for("started")["loop"] == "uvloop"


def test_unknown_variables_are_a_warning() -> None:
    with Daemon(env={"ECHOD_PORT": "tcp://10.0.0.1:80", "ECHOD_LIMITS_BACKLOG": "3"}) as daemon:
        warning = daemon.wait_for("unknown_variable", variable="ECHOD_PORT")
        assert warning["level"] == "warning"
        assert "did_you_mean" not in warning
        warning = daemon.wait_for("unknown_variable", variable="ECHOD_LIMITS_BACKLOG")
        assert warning["did_you_mean"] == "ECHOD_LIMITS__BACKLOG"
        assert len(daemon.all("unknown_variable")) == 2
        assert daemon.stop() == 0


def test_file_and_variables_alone(tmp_path: Path) -> None:
    """A file and variables are enough, without a command line."""
    path = tmp_path / "echo.toml"
    path.write_text('listen = ["127.0.0.1:0"]\n')
    environment = {"ECHOD_CONFIG": str(path), "ECHOD_LOG__CONNECTIONS": "all", "ECHOD_LOOP": "asyncio"}
    with Daemon(listen=None, env=environment) as daemon:
        assert daemon.wait_for("started")["loop"] == "asyncio"
        daemon.connect().close()
        daemon.wait_for("client_closed")
        assert daemon.stop() == 0


def test_closed_standard_descriptors() -> None:
    """If standard error is closed at the start, no client's socket gets its descriptor."""
    host, port = "127.0.0.1", free_port()
    command = f"exec {sys.executable} -m echod --listen {host}:{port} --log.connections all 0<&- 1>&- 2>&-"
    process = subprocess.Popen(["sh", "-c", command], env=clean_environment())
    try:
        client = None
        while client is None:
            assert process.poll() is None
            with contextlib.suppress(ConnectionRefusedError):
                client = socket.create_connection((host, port), PATIENCE)
        with client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_readme_commands_exist() -> None:
    """The commands of the README are targets of the Makefile, and the example settings are valid."""
    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text()
    for target in ("run", "test"):
        assert re.search(rf"^`?make {target}\b", readme, re.MULTILINE)
        subprocess.run(["make", "--dry-run", target], cwd=root, check=True, capture_output=True, timeout=PATIENCE)
    assert run("check", "--listen", ":7000", "--config", str(root / "config.example.toml")).returncode == 0
