"""Faults: every recipe of docs/faults.md with a client that sees it, how they combine, and that they stop like others."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import select
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import threading
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness import PATIENCE, Daemon, receive, reset, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Event, Start

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
BLOCKS = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)]
RECIPES: dict[str, dict[str, Any]] = {
    name: fault for block in BLOCKS if "listeners" not in block for name, fault in block["faults"].items()
}
# What no recipe has, shown in both modes only.
EXTRA: dict[str, dict[str, Any]] = {
    "place": {"after_bytes": 3, "action": "duplicate"},
    "time": {"after_seconds": 0.5, "action": "truncate"},
    "trigger-and-place": {"trigger": "x\n", "after_bytes": 10, "action": "duplicate"},
    "trigger-and-time": {"trigger": "x\n", "after_seconds": 0.6, "action": "duplicate"},
    "trigger-and-odds": {"trigger": "x\n", "probability": 1e-300, "action": "duplicate"},
    "slow-close": {"after_bytes": 1000, "action": "close", "rate": 2000},
    "slow-raise": {"after_bytes": 1000, "action": "raise", "rate": 2000},
    "slow-half_close": {"after_bytes": 1000, "action": "half_close", "rate": 2000},
    "late-bye": {"trigger": "bye\n", "action": "half_close", "delay": 0.3},
    "late-reset": {"trigger": "die\n", "action": "reset", "delay": 60},
    "sliced": {"slice": 100},
    "some-late": {"probability": 0.3, "seed": 5, "delay": 0.1},
    "large-bye": {"after_seconds": 1, "action": "half_close"},
}
WHERE = ("stream", "line", "tls", "unix")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with a key and a certificate for localhost."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    kind = "ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 400 -subj /CN=localhost"
    command = f"openssl req -x509 -newkey {kind} -keyout {path} -out {path.with_suffix('.crt')}"
    subprocess.run(command.split(), check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


QUICKLY = ("--limits.max-connections=50", "--shutdown.quiet-period=0.2", "--shutdown.drain-timeout=1")


class Lab:
    """A daemon that shows every recipe, each in both modes, over TLS and on a unix socket, as far as that makes sense."""

    def __init__(self, folder: Path, certificate: Path, loop: str) -> None:
        self._folder = folder
        self._certificate = certificate
        self._connections: dict[str, int] = {}
        sections: list[str] = []
        for name, fault in (RECIPES | EXTRA).items():
            sections.append(f"[faults.{name}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in fault.items()))
            for where in WHERE:
                if (where == "unix" and fault.get("action") == "reset") or (where in {"tls", "unix"} and name in EXTRA):
                    continue
                address = f"unix:{folder}/{name}" if where == "unix" else "127.0.0.1:0"
                sections.append(f'[listeners."{name} {where}"]\naddress = "{address}"\nfault = "{name}"')
                if where == "line":
                    sections.append('mode = "line"')
                if where == "tls":
                    sections.append(f'tls = {{certificate = "{certificate}", private_key = "{certificate}"}}')
        path = folder / "lab.toml"
        path.write_text("\n".join(sections))
        self.daemon = Daemon("--loop", loop, "--config", str(path), *QUICKLY, listen=None)

    def connect(self, name: str, where: str) -> socket.socket:
        """Return a client of a recipe."""
        self._connections[f"{name} {where}"] = self._connections.get(f"{name} {where}", 0) + 1
        if where == "unix":
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(PATIENCE)
            sock.connect(f"{self._folder}/{name}")
            return sock
        sock = connect(self.daemon, f"{name} {where}")
        if where != "tls":
            return sock
        context = ssl.create_default_context(cafile=str(self._certificate))
        return context.wrap_socket(sock, server_hostname="localhost")

    def entry(self, name: str, where: str) -> Event:
        """Return the line of the latest client of a recipe, which has shown its fault."""
        count = self._connections[f"{name} {where}"]
        line = self.daemon.wait_for("client_closed", listener=f"{name} {where}", count=count)
        assert line["fault"] == name
        return line


def toml(value: object) -> str:
    """Return a value as TOML."""
    return json.dumps(value)


def connect(daemon: Daemon, listener: str, **options: Any) -> socket.socket:
    """Return a client of one of several listeners."""
    port = int(daemon.wait_for("listening", listener=listener)["address"].rpartition(":")[2])
    sock = socket.socket()
    for option, value in options.items():
        sock.setsockopt(socket.SOL_SOCKET, getattr(socket, option), value)
    sock.settimeout(PATIENCE)
    try:
        sock.connect(("127.0.0.1", port))
    except OSError:
        sock.close()
        raise
    return sock


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def lab(request: pytest.FixtureRequest, certificate: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Return the daemon with all recipes, on each loop; at the end nothing of it is left."""
    lab = Lab(tmp_path_factory.mktemp("lab"), certificate, request.param)
    with lab.daemon as daemon:
        yield lab
        assert daemon.stop() == 0
        loud = [event for event in daemon.events if event["level"] != "info" and event["event"] != "client_failed"]
        assert loud == []
        assert len(daemon.raw) == len(daemon.events), "a line that is not of the log"


@pytest.fixture(params=WHERE)
def where(request: pytest.FixtureRequest) -> str:
    """Return each kind of listener in turn."""
    return str(request.param)


over_tcp = pytest.mark.parametrize("where", ["stream", "line", "tls"])
in_time = pytest.mark.parametrize("where", ["line", "tls"])


def ask(client: socket.socket, message: bytes) -> bytes:
    """Send a message and return as many bytes."""
    client.sendall(message)
    return receive(client, len(message))


def drain(client: socket.socket) -> bytes:
    """Receive until EOF."""
    data = b""
    while more := client.recv(65536):
        data += more
    return data


def silent(client: socket.socket) -> bool:
    """Tell whether there is nothing to receive, no end either."""
    client.settimeout(0.2)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    finally:
        client.settimeout(PATIENCE)
    return False


def ended(where: str) -> set[str]:
    """Return how a session ends whose client has closed: over TLS it is still sent close_notify, and may answer with RST."""
    return {"eof", "reset"} if where == "tls" else {"eof"}


def see_reset(client: socket.socket) -> None:
    """Receive until the connection is reset: not only closed, which the kernel's state of it tells."""
    if isinstance(client, ssl.SSLSocket):
        with contextlib.suppress(ConnectionResetError):  # some versions of Python's TLS take it for an end
            drain(client)
    else:
        with pytest.raises(ConnectionResetError):
            drain(client)
    closed = b"\7"
    assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == closed


LINES = b"".join(b"%03d" % number + b"." * 96 + b"\n" for number in range(20))


def test_every_recipe_is_here() -> None:
    """The page's recipes are those of this file, and its first example is right too."""
    assert {f"test_{name.replace('-', '_')}" for name in RECIPES} <= globals().keys()
    assert [block["listeners"]["lab"]["fault"] for block in BLOCKS if "listeners" in block] == ["boom"]


# The recipes


def test_crash(lab: Lab, where: str) -> None:
    with lab.connect("crash", where) as client:
        assert ask(client, b"one\r\n") == b"one\r\n"
        client.sendall(b"crash\r\n")
        assert client.recv(1) == b""
    line = lab.entry("crash", where)
    assert (line["reason"], line["received"], line["sent"]) == ("fault", 12, 5)
    failed = lab.daemon.wait_for("client_failed", listener=f"crash {where}")
    assert "Traceback" in failed["exception"]
    assert "fault 'crash' was set off" in failed["exception"]


def test_breaks_off(lab: Lab, where: str) -> None:
    with lab.connect("breaks-off", where) as client:
        client.sendall(LINES[:980])
        client.sendall(LINES[980:1900])
        assert drain(client) == LINES[:1000]
    line = lab.entry("breaks-off", where)
    assert (line["reason"], line["sent"], line["acked"]) == ("fault", 1000, 1000)


@pytest.mark.parametrize("size", [999, 1001])
def test_the_line_that_reaches_the_place_is_whole(lab: Lab, size: int) -> None:
    """Lines are not split; what one read has behind the line is not echoed."""
    with lab.connect("breaks-off", "line") as client:
        first, second = b"a" * (size - 1) + b"\n", b"b" * 50 + b"\n"
        client.sendall(first + second + b"c\n")
        assert drain(client) == (first + second if size < 1000 else first)


@over_tcp
def test_dies(lab: Lab, where: str) -> None:
    """Both have to hold, whichever comes last; what has arrived can be read."""
    began = time.monotonic()
    with lab.connect("dies", where) as client:
        assert ask(client, LINES[:1200]) == LINES[:1200]
        see_reset(client)
        assert time.monotonic() - began >= 0.49
    assert lab.entry("dies", where)["reason"] == "fault"
    with lab.connect("dies", where) as client:
        assert ask(client, LINES[:900]) == LINES[:900]
        assert not select.select([client], [], [], 0.7)[0]
        client.sendall(LINES[900:1000])
        see_reset(client)
    assert lab.entry("dies", where)["received"] == 1000


@over_tcp
def test_nobody(lab: Lab, where: str) -> None:
    # Where the reset comes while a client still connects, connect(2) says so.
    with contextlib.suppress(ConnectionResetError), lab.connect("nobody", where) as client:
        see_reset(client)
    line = lab.entry("nobody", where)
    assert (line["reason"], line["received"]) == ("fault", 0)


def test_keep_alive(lab: Lab, where: str) -> None:
    began = time.monotonic()
    with lab.connect("keep-alive", where) as client, lab.connect("keep-alive", where) as mute:
        assert ask(client, b"x\n") == b"x\n"
        assert client.recv(1) == mute.recv(1) == b""
        assert 0.49 < time.monotonic() - began < 5
    assert lab.entry("keep-alive", where)["reason"] == "fault"


def test_says_bye(lab: Lab, where: str) -> None:
    with lab.connect("says-bye", where) as client:
        assert ask(client, b"hello\n") == b"hello\n"
        client.sendall(b"bye\n")
        assert client.recv(1) == b""
        for _ in range(10):
            client.sendall(bytes(100_000))
    line = lab.entry("says-bye", where)
    assert (line["reason"], line["received"], line["sent"]) == ("fault", 1_000_010, 6)
    assert (line["acked"], line["discarded_bytes"]) == (6, 0)


def test_hangs(lab: Lab, where: str) -> None:
    with lab.connect("hangs", where) as client:
        assert ask(client, LINES[:1000]) == LINES[:1000]
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(20_000_000))
        assert silent(client)
        reset(client)
    if where != "unix":  # there the kernel does not tell
        line = lab.entry("hangs", where)
        assert (line["reason"], line["received"], line["sent"]) == ("reset", 1000, 1000)


def test_drops(lab: Lab, where: str) -> None:
    with lab.connect("drops", where) as client:
        client.sendall(LINES * 2500)
        assert silent(client)
    line = lab.entry("drops", where)
    assert (line["received"], line["sent"]) == (5_000_000, 0)
    assert line["reason"] in ended(where)


def flips(daemon: Daemon, listener: str) -> list[list[int]]:
    """Return which bits were wrong, by connection and message."""
    found = []
    for _ in range(2):
        with connect(daemon, listener) as client:
            wrong = []
            for number in range(50):
                message = b"message %02d" % number
                echo = ask(client, message)
                wrong.append(int.from_bytes(message, "little") ^ int.from_bytes(echo, "little"))
            found.append(wrong)
    return found


def test_flips(start: Start) -> None:
    """With a seed, the same messages have the same wrong bit in each run; without one, others."""
    options = [f"--faults.a.{key}={value}" for key, value in RECIPES["flips"].items()]
    options += ["--faults.b.probability=0.25", "--faults.b.action=corrupt"]
    for name in ("a", "b"):
        options += [f"--listeners.{name}.address=127.0.0.1:0", f"--listeners.{name}.fault={name}"]
    one, other = (start(*options, listen=None) for _ in range(2))
    first = flips(one, "a")
    assert first == flips(other, "a")
    assert first[0] != first[1]
    for wrong in first:
        assert all(difference.bit_count() <= 1 for difference in wrong)
        assert 5 <= sum(map(bool, wrong)) <= 20
    assert flips(one, "b") != flips(other, "b")


def test_flips_line(lab: Lab) -> None:
    """In mode line it is the lines that are drawn for."""
    with lab.connect("flips", "line") as client:
        client.sendall(LINES)
        client.shutdown(socket.SHUT_WR)
        echo = drain(client)
    bits = [(a ^ b).bit_count() for a, b in zip(LINES, echo, strict=True)]
    assert 1 <= sum(bits) <= 12
    assert all(sum(bits[place : place + 100]) <= 1 for place in range(0, len(bits), 100))


def test_twice(lab: Lab, where: str) -> None:
    with lab.connect("twice", where) as client:
        assert ask(client, b"give\n") == b"give\n"
        client.sendall(b"pay\n")
        assert receive(client, 8) == b"pay\npay\n"
        assert ask(client, b"take\n") == b"take\n"
        client.close()
    line = lab.entry("twice", where)
    assert (line["received"], line["sent"]) == (14, 18)
    assert line["reason"] in ended(where)


def test_half(lab: Lab, where: str) -> None:
    with lab.connect("half", where) as client:
        client.sendall(b"012345678\n")
        assert receive(client, 5) == b"01234"
        client.sendall(b"ab\n")
        assert receive(client, 1) == b"a"
        client.sendall(b"\n")
        assert silent(client)
    line = lab.entry("half", where)
    assert (line["received"], line["sent"]) == (14, 6)
    assert line["reason"] in ended(where)


@in_time
def test_far(lab: Lab, where: str) -> None:
    """Answers are late by delay and jitter, in order, also when the client closes its direction; none is lost."""
    with lab.connect("far", where) as client:
        took = []
        for _ in range(4):
            began = time.monotonic()
            assert ask(client, b"ping\n") == b"ping\n"
            took.append(time.monotonic() - began)
        # The least, as a busy machine adds to some.
        assert 0.148 < min(took) < 0.3
        began = time.monotonic()
        for place in range(0, 2000, 100):
            client.sendall(LINES[place : place + 100])
        if where == "line":
            client.shutdown(socket.SHUT_WR)
        assert receive(client, 2000) == LINES
        assert 0.148 < time.monotonic() - began < 3  # and not the sum of all delays
        if where == "line":
            assert client.recv(1) == b""
    line = lab.entry("far", where)
    assert (line["sent"], line["acked"]) == (2020, 2020)
    assert line["reason"] in ended(where)


@in_time
def test_hiccups(lab: Lab, where: str) -> None:
    """What is drawn is late by the delay, within 5%; the rest comes at once."""
    took: list[float] = []
    with lab.connect("hiccups", where) as client:
        while sum(seconds > 0.2 for seconds in took) < 3 or min(late(took)) > 0.42:
            began = time.monotonic()
            assert ask(client, b"ping\n") == b"ping\n"
            took.append(time.monotonic() - began)
            assert len(took) < 200
    assert statistics.median(took) < 0.1
    assert min(late(took)) > 0.398


def late(took: list[float]) -> list[float]:
    return [seconds for seconds in took if seconds > 0.2]


class Arrivals:
    """What came back of so many bytes, and when."""

    def __init__(self, client: socket.socket, size: int) -> None:
        began = time.monotonic()
        self.parts: list[bytes] = []
        self._times: list[float] = []
        sender = threading.Thread(target=client.sendall, args=(b"." * (size - 1) + b"\n",))
        sender.start()
        while sum(map(len, self.parts)) < size:
            self.parts.append(client.recv(65536))
            self._times.append(time.monotonic())
            assert self.parts[-1]
        sender.join()
        self.seconds = self._times[-1] - began

    @property
    def rate(self) -> float:
        """The median over half of the arrivals each: a busy machine is late with some."""
        totals = list(itertools.accumulate(map(len, self.parts)))
        half = len(totals) // 2
        return statistics.median(
            (totals[place + half] - totals[place]) / (self._times[place + half] - self._times[place])
            for place in range(half)
        )


@in_time
def test_modem(lab: Lab, where: str) -> None:
    with lab.connect("modem", where) as client:
        arrivals = Arrivals(client, 10_800)
    assert arrivals.rate == pytest.approx(7200, rel=0.05)
    assert arrivals.seconds > 1.5 * 0.95
    assert lab.entry("modem", where)["sent"] == 10_800


def segments(client: socket.socket) -> int:
    """Return how many segments with data a client got (tcpi_data_segs_in)."""
    return int(struct.unpack_from("I", client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160), 152)[0])


@pytest.mark.parametrize("where", ["stream", "tls"])
def test_crumbs(lab: Lab, where: str) -> None:
    """A client that waits for each has them one by one; one that does not finds them in segments, or records, still."""
    with lab.connect("crumbs", where) as client:
        arrivals = Arrivals(client, 10_240)
        assert arrivals.rate == pytest.approx(10_240, rel=0.05)
        assert arrivals.seconds > 0.95
        if where == "tls":
            assert [len(part) for part in arrivals.parts] == [10] * 1024
        else:
            assert segments(client) >= 1024  # and those that were sent twice


@in_time
def test_bad_day(lab: Lab, where: str) -> None:
    began = time.monotonic()
    with lab.connect("bad-day", where) as client:
        # Lines of 100 bytes, so that both modes end at the same.
        client.sendall(LINES * 6)
        first = client.recv(1)
        assert time.monotonic() - began >= 0.2
        assert first + drain(client) == LINES * 5
        assert 0.7 * 0.95 < time.monotonic() - began < 5
    line = lab.entry("bad-day", where)
    assert (line["reason"], line["sent"]) == ("fault", 10_000)


@pytest.mark.parametrize("where", ["stream", "line"])
def test_slices_without_a_rate(lab: Lab, where: str) -> None:
    """Each is a segment of its own, also where the kernel cannot send them all at once."""
    with lab.connect("sliced", where) as client:
        assert b"".join(Arrivals(client, 60_050).parts) == b"." * 60_049 + b"\n"
        # More where the client's write came in several reads, or something was sent twice.
        assert segments(client) >= 601


# Real clients

COMMANDS = {
    "ncat crash": "printf 'one\\r\\ncrash\\r\\n' | ncat 127.0.0.1 {port}",
    "socat breaks-off": "head -c 3000 /dev/zero | tr '\\0' x | socat -t9 - TCP:127.0.0.1:{port} | wc -c",
    "ncat dies": "ncat 127.0.0.1 {port} 2>&1 >/dev/null < <(exec 2>/dev/null; head -c 1000 /dev/zero; exec sleep 9)",
    "ncat says-bye": "(printf 'hi\\n'; printf 'bye\\n') | ncat 127.0.0.1 {port}",
    "socat twice": "printf 'pay\\n' | socat -t9 - TCP:127.0.0.1:{port}",
}
OUTPUT = {
    "ncat crash": b"one\r\n",
    "socat breaks-off": b"1000\n",
    "ncat dies": b"Connection reset by peer",
    "ncat says-bye": b"hi\n",
    "socat twice": b"pay\npay\n",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_real_clients(lab: Lab, name: str) -> None:
    """What people have at hand sees it too."""
    tool, recipe = name.split()
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    # Where several writes may come in one read, the lines are the messages.
    where = "stream" if recipe in {"breaks-off", "dies"} else "line"
    port = lab.daemon.wait_for("listening", listener=f"{recipe} {where}")["address"].rpartition(":")[2]
    result = subprocess.run(
        ["bash", "-c", COMMANDS[name].format(port=port)], capture_output=True, timeout=PATIENCE, check=False
    )
    assert OUTPUT[name] in result.stdout
    assert lab.daemon.wait_for("client_closed", listener=f"{recipe} {where}")["fault"] == recipe


# How they combine


def profiles(*faults: str, mode: str = "stream") -> list[str]:
    """Return the options of a listener for each fault, named a, b and so on, its keys given as `key=value key=value`."""
    options = []
    for name, fault in zip("abcdef", faults, strict=False):
        options += [f"--faults.{name}.{part}" for part in fault.split()]
        options += [f"--listeners.{name}.address=127.0.0.1:0", f"--listeners.{name}.fault={name}"]
        options += [f"--listeners.{name}.mode={mode}"]
    return options


def test_all_conditions_hold_at_once(lab: Lab) -> None:
    """A trigger before its bytes or its time, or against the odds, is a message like any other."""
    for name in ("trigger-and-place", "trigger-and-time"):
        with lab.connect(name, "line") as client:
            began = time.monotonic()
            for message in (b"x\n", b"12345678\n"):
                assert ask(client, message) == message
            if name == "trigger-and-time":
                time.sleep(max(0, began + 0.7 - time.monotonic()))
            assert ask(client, b"y\n") == b"y\n"
            client.sendall(b"x\n")
            assert receive(client, 4) == b"x\nx\n"
        lab.entry(name, "line")
    with lab.connect("trigger-and-odds", "line") as client:
        client.sendall(b"x\n" * 50)
        assert receive(client, 100) == b"x\n" * 50
    assert "fault" not in lab.daemon.wait_for("client_closed", listener="trigger-and-odds line")


def test_messages_behind_a_place_or_a_time(lab: Lab) -> None:
    """What spoils messages does so from there on, and goes on."""
    with lab.connect("place", "stream") as client:
        client.sendall(b"abcde")
        assert receive(client, 7) == b"abcdede"
        client.sendall(b"f")
        assert receive(client, 2) == b"ff"
    with lab.connect("time", "stream") as client:
        assert ask(client, b"abcd") == b"abcd"
        time.sleep(0.6)
        client.sendall(b"efgh")
        client.shutdown(socket.SHUT_WR)
        assert drain(client) == b"ef"


@pytest.mark.parametrize("action", ["close", "raise", "half_close"])
def test_what_is_held_back_arrives_in_its_time(lab: Lab, action: str) -> None:
    """An end that the fault makes comes behind the echo, which is slow all the same."""
    with lab.connect(f"slow-{action}", "line") as client:
        began = time.monotonic()
        client.sendall(LINES)
        assert drain(client) == LINES[:1000]
        assert time.monotonic() - began > 0.45
    line = lab.entry(f"slow-{action}", "line")
    assert (line["reason"], line["acked"]) == ("fault", 1000)


def test_client_closes_before_its_half_close(lab: Lab) -> None:
    """The client's EOF may come while echo is held back that FIN has to wait for."""
    with lab.connect("late-bye", "line") as client:
        client.sendall(b"hello\nbye\n")
        client.shutdown(socket.SHUT_WR)
        assert drain(client) == b"hello\n"
    line = lab.entry("late-bye", "line")
    assert (line["reason"], line["acked"]) == ("fault", 6)


def test_reset_does_not_wait(lab: Lab) -> None:
    """What is held back is lost, and counted."""
    with lab.connect("late-reset", "line") as client:
        client.sendall(b"hello\ndie\n")
        see_reset(client)
    line = lab.entry("late-reset", "line")
    assert (line["reason"], line["received"], line["sent"]) == ("fault", 10, 0)


def test_nothing_overtakes(lab: Lab) -> None:
    """A message that is not held back itself waits for those before it that are."""
    with lab.connect("some-late", "line") as client:
        client.sendall(LINES)
        client.shutdown(socket.SHUT_WR)
        assert drain(client) == LINES
    assert lab.entry("some-late", "line")["acked"] == len(LINES)


def test_half_close_of_a_client_that_does_not_read(lab: Lab) -> None:
    """FIN comes behind the echo, however long that takes."""
    with connect(lab.daemon, "large-bye stream", SO_RCVBUF=4096) as client:
        began = time.monotonic()
        sender = send_until_stuck(client, bytes(20_000_000))
        assert sender.is_alive()
        time.sleep(max(0, began + 1.3 - time.monotonic()))
        echoed = count(client)
        sender.join()
    line = lab.daemon.wait_for("client_closed", listener="large-bye stream")
    assert (line["reason"], line["received"], line["acked"]) == ("fault", 20_000_000, echoed)


def count(client: socket.socket) -> int:
    """Count the bytes until EOF."""
    total = 0
    while more := client.recv(65536):
        total += len(more)
    return total


def send_until_stuck(client: socket.socket, data: bytes) -> threading.Thread:
    """Begin to send in a thread, which ends when all is sent; return when for a while nothing could be."""
    sender = threading.Thread(target=client.sendall, args=(data,))
    sender.start()
    while sender.is_alive() and select.select([], [client], [], 0.3)[1]:
        time.sleep(0.05)
    return sender


def test_stalled_client_closes(lab: Lab) -> None:
    """That is not noticed, since nothing is read; the end of the daemon has an end for it too."""
    with lab.connect("hangs", "line") as client:
        client.sendall(LINES[:1000])
        assert receive(client, 1000) == LINES[:1000]


def test_line_tails(start: Start) -> None:
    """An unfinished line is the last message at the client's EOF; a longer one than may be ends the session behind the rest."""
    daemon = start(
        *profiles("action=duplicate", "action=stall", "delay=0.2", mode="line"),
        *("--limits.max-line=20", "--shutdown.quiet-period=0.2"),
        listen=None,
    )
    with connect(daemon, "a") as client:
        client.sendall(b"ab\ncd")
        client.shutdown(socket.SHUT_WR)
        assert drain(client) == b"ab\nab\ncdcd"
    with connect(daemon, "b") as client:
        client.sendall(b"ab")
        client.shutdown(socket.SHUT_WR)
        assert silent(client)
    with connect(daemon, "c") as client:
        client.sendall(b"ab\n" + bytes(30))
        assert drain(client) == b"ab\n"
    line = daemon.wait_for("client_closed", listener="c")
    assert (line["reason"], line["sent"]) == ("line_too_long", 3)
    with connect(daemon, "c") as client:
        client.sendall(b"cd\nef")
        client.shutdown(socket.SHUT_WR)
        assert drain(client) == b"cd\nef"
    with connect(daemon, "c") as client:
        client.sendall(b"gh\nij")
        assert receive(client, 3) == b"gh\n"
        daemon.send_signal()
        assert drain(client) == b"ij"
    assert daemon.wait() == 0
    assert daemon.receipt()["quiet"] == 2
    assert daemon.wait_for("client_closed", listener="b")["fault"] == "b"


def test_memory_is_bounded(start: Start) -> None:
    """Above the write buffer reading pauses, however much is to be held back; all of it arrives in order."""
    daemon = start(
        *profiles("delay=1", "rate=20MB", "trigger=never action=close"), "--limits.write-buffer=100KiB", listen=None
    )
    with connect(daemon, "a") as client:
        sent = 0
        while select.select([], [client], [], 0.4)[1]:
            sent += client.send(bytes(65536))
        assert sent < 20_000_000
        reset(client)
    for listener in "bc":
        with connect(daemon, listener, SO_RCVBUF=4096) as client:
            pattern = bytes(range(251)) * 60_000
            began = time.monotonic()
            sender = send_until_stuck(client, pattern)
            got = bytearray()
            while len(got) < len(pattern):
                got += client.recv(65536)
            sender.join()
            assert got == pattern
            assert listener == "c" or time.monotonic() - began > len(pattern) / 20_000_000 * 0.9
    assert daemon.stop() == 0


# Limits and stops


def test_limits_hold(start: Start) -> None:
    """idle_timeout ends who is left in silence, write_timeout who does not take its echo."""
    daemon = start(
        *profiles(
            "action=stall",
            "action=blackhole",
            "after_bytes=9 action=half_close",
            "slice=10000",
            "rate=50MB",
            mode="line",
        ),
        *("--limits.idle-timeout=0.8", "--limits.write-timeout=0.8", "--shutdown.linger-timeout=0.2"),
        listen=None,
    )
    with contextlib.ExitStack() as clients:
        quiet = [clients.enter_context(connect(daemon, listener)) for listener in "abc"]
        for client in quiet:
            client.sendall(b"x\n")
        time.sleep(0.3)  # so that the stalled session leaves the rest unread
        for client in quiet:
            client.sendall(b"y" * 1000 + b"\n")
        greedy = [clients.enter_context(connect(daemon, listener, SO_RCVBUF=4096)) for listener in "de"]
        threads = []
        for client in greedy:
            threads.append(threading.Thread(target=flood, args=(client,)))
            threads[-1].start()
        for listener in "abc":
            line = daemon.wait_for("client_closed", listener=listener)
            assert (line["reason"], line["fault"], line["sent"]) == ("idle", listener, 1003 if listener == "c" else 0)
        for listener in "de":
            assert daemon.wait_for("client_closed", listener=listener)["reason"] == "stalled"
        for thread in threads:
            thread.join()
    assert daemon.stop() == 0


def flood(client: socket.socket) -> None:
    """Send until the connection is gone, and read nothing."""
    with contextlib.suppress(OSError):
        while True:
            client.sendall(b"." * 50_000 + b"\n")


def test_stop(start: Start) -> None:
    """None of them holds up a stop beyond its timeouts, and echo that is held back is not lost to it."""
    daemon = start(
        *profiles("action=stall", "action=blackhole", "delay=60", "rate=1000", "after_seconds=0 action=half_close"),
        *("--shutdown.quiet-period=0.3", "--shutdown.drain-timeout=1.2", "--shutdown.linger-timeout=1"),
        listen=None,
    )
    with contextlib.ExitStack() as clients:
        stalled, flooding, dropped, late, left, slow, half = (
            clients.enter_context(connect(daemon, listener)) for listener in "aabccde"
        )
        stalled.sendall(b"x")
        late.sendall(b"late")
        left.sendall(b"left")
        left.shutdown(socket.SHUT_WR)
        slow.sendall(bytes(30_000))
        assert slow.recv(1) == b"\0"
        assert half.recv(1) == b""
        threads = [threading.Thread(target=flood, args=(client,)) for client in (flooding, dropped)]
        for thread in threads:
            thread.start()
        daemon.send_signal(signal.SIGTERM)
        assert stalled.recv(1) == b""
        stalled.close()
        assert drain(late) == b"late"
        assert drain(left) == b"left"
        assert len(drain(slow)) == 29_999
        for client in (late, left, slow):
            client.close()
        assert daemon.wait() == 0
        for thread in threads:
            thread.join()
    receipt = daemon.receipt()
    assert receipt["seconds"] < 1.2 + 1 + 5
    assert receipt["clients"] == 7
    assert receipt["aborted"] == 0
    reasons = {(line["listener"], line["reason"]) for line in daemon.all("client_closed")}
    assert reasons == {("a", "quiet"), ("b", "cut"), ("c", "cut"), ("c", "eof"), ("d", "cut"), ("e", "quiet")}
    assert daemon.wait_for("stopped")["faults"] == {"a": 2, "b": 1, "c": 2, "d": 1, "e": 1}


def test_second_signal(start: Start) -> None:
    """Echo that is held back does not stand against an end at once."""
    daemon = start(*profiles("delay=60"), listen=None)
    with connect(daemon, "a") as client:
        client.sendall(b"x")
        time.sleep(0.1)
        daemon.send_signal()
        daemon.wait_for("draining")
        daemon.send_signal()
        assert daemon.wait() == 143
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_no_fault_no_cost(start: Start) -> None:
    """A listener without a fault has the plain session, beside one that has one: nothing is counted, nothing named."""
    daemon = start(*profiles("delay=1"), "--listeners.plain.address=127.0.0.1:0", listen=None)
    with connect(daemon, "plain") as client:
        assert ask(client, b"x") == b"x"
    assert "fault" not in daemon.wait_for("client_closed", listener="plain")
    daemon.stop()
    assert "faults" not in daemon.wait_for("stopped")


def test_time_of_echo_that_was_released(start: Start) -> None:
    """Echo that a cut has sent ahead of its time is not sent again when that comes."""
    daemon = start(
        *("--faults.slow.delay", "1", "--listeners.lab.address", "127.0.0.1:0", "--listeners.lab.fault", "slow"),
        *("--shutdown.drain-timeout", "0.2", "--shutdown.linger-timeout", "3"),
        listen=None,
    )
    with daemon.connect() as client:
        began = time.monotonic()
        client.sendall(b"x")
        daemon.send_signal(signal.SIGTERM)
        assert client.recv(10) == b"x"
        assert client.recv(10) == b""
        until(lambda: time.monotonic() > began + 1.3)
    assert daemon.wait() == 0
    line = daemon.wait_for("client_closed")
    assert (line["reason"], line["sent"], line["fault"]) == ("cut", 1, "slow")
