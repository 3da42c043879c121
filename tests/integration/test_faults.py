"""Each recipe in docs/how-to/faults.md, as a client observes it in each mode, over TLS and on a unix socket."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import struct
import subprocess
import threading
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fault_lab import KINDS, Lab, connect, drain, is_silent, see_reset, send_until_stuck
from harness import PATIENCE, receive, reset

if TYPE_CHECKING:
    from collections.abc import Iterator

    from certificates import Certificates
    from harness import Daemon, Start

pytestmark = pytest.mark.once

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "faults.md"
BLOCKS = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)]
RECIPES: dict[str, dict[str, Any]] = {
    name: fault for block in BLOCKS if "listeners" not in block for name, fault in block["faults"].items()
}
# More faults, in both modes only.
EXTRA: dict[str, dict[str, Any]] = {
    "slow-close": {"after_bytes": 1000, "action": "close", "rate": 5000},
    "slow-raise": {"after_bytes": 1000, "action": "raise", "rate": 5000},
    "slow-half_close": {"after_bytes": 1000, "action": "half_close", "rate": 5000},
    "late-bye": {"trigger": "bye\n", "action": "half_close", "delay": 0.3},
    "late-reset": {"trigger": "die\n", "action": "reset", "delay": 60},
    "sliced": {"slice": 100},
    "some-late": {"probability": 0.3, "seed": 5, "delay": 0.1},
    "large-bye": {"after_bytes": 5_000_000, "action": "half_close"},
}
LINES = b"".join(b"%03d" % number + b"." * 96 + b"\n" for number in range(20))


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def lab(
    request: pytest.FixtureRequest, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    """Return the daemon with all recipes on each loop. At the end, check that it stops cleanly."""
    lab = Lab(RECIPES | EXTRA, EXTRA, tmp_path_factory.mktemp("lab"), certificates, request.param)
    with lab.daemon as daemon:
        yield lab
        assert daemon.stop() == 0
        assert [event for event in daemon.loud() if event["event"] != "client_failed"] == []
        assert len(daemon.raw) == len(daemon.events), "a line that is not JSON"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Return each kind of listener in turn."""
    return str(request.param)


over_tcp = pytest.mark.parametrize("kind", ["stream", "line", "tls"])
line_and_tls = pytest.mark.parametrize("kind", ["line", "tls"])
both_modes = pytest.mark.parametrize("kind", ["stream", "line"])


def ask(client: socket.socket, message: bytes) -> bytes:
    """Send a message and return as many bytes."""
    client.sendall(message)
    return receive(client, len(message))


def reasons_after_close(kind: str) -> set[str]:
    """Return the possible reasons after a client has closed. Over TLS, its kernel may answer close_notify with RST."""
    return {"eof", "reset"} if kind == "tls" else {"eof"}


def test_every_recipe_is_here() -> None:
    """Each recipe of the page has a test here, and the page's first example names its fault."""
    assert {f"test_{name.replace('-', '_')}" for name in RECIPES} <= globals().keys()
    assert [block["listeners"]["lab"]["fault"] for block in BLOCKS if "listeners" in block] == ["boom"]


# The recipes


def test_crash(lab: Lab, kind: str) -> None:
    with lab.connect("crash", kind) as client:
        assert ask(client, b"one\r\n") == b"one\r\n"
        client.sendall(b"crash\r\n")
        assert client.recv(1) == b""
    line = lab.entry("crash", kind)
    assert (line["reason"], line["received"], line["sent"]) == ("fault", 12, 5)
    failed = lab.daemon.wait_for("client_failed", listener=f"crash {kind}")
    assert "Traceback" in failed["exception"]
    assert "fault 'crash' was triggered" in failed["exception"]


def test_breaks_off(lab: Lab, kind: str) -> None:
    with lab.connect("breaks-off", kind) as client:
        client.sendall(LINES[:980])
        client.sendall(LINES[980:1900])
        assert drain(client) == LINES[:1000]
    line = lab.entry("breaks-off", kind)
    assert (line["reason"], line["sent"], line["acked"]) == ("fault", 1000, 1000)


@pytest.mark.parametrize("size", [999, 1001])
def test_the_line_that_reaches_the_place_is_whole(lab: Lab, size: int) -> None:
    """A line is not split. The lines after it are not echoed."""
    with lab.connect("breaks-off", "line") as client:
        first, second = b"a" * (size - 1) + b"\n", b"b" * 50 + b"\n"
        client.sendall(first + second + b"c\n")
        assert drain(client) == (first + second if size < 1000 else first)


@over_tcp
def test_dies(lab: Lab, kind: str) -> None:
    """The client can read the echo that arrived before the reset."""
    with lab.connect("dies", kind) as client:
        assert ask(client, LINES[:1200]) == LINES[:1200]
        see_reset(client)
    line = lab.entry("dies", kind)
    assert (line["reason"], line["received"]) == ("fault", 1200)


@over_tcp
def test_nobody(lab: Lab, kind: str) -> None:
    # connect(2) fails if the reset arrives before it returns.
    with contextlib.suppress(ConnectionResetError), lab.connect("nobody", kind) as client:
        see_reset(client)
    line = lab.entry("nobody", kind)
    assert (line["reason"], line["received"]) == ("fault", 0)


def test_keep_alive(lab: Lab, kind: str) -> None:
    with lab.connect("keep-alive", kind) as client, lab.connect("keep-alive", kind) as mute:
        assert ask(client, b"x\n") == b"x\n"
        assert client.recv(1) == mute.recv(1) == b""
    assert lab.entry("keep-alive", kind)["reason"] == "fault"


def test_says_bye(lab: Lab, kind: str) -> None:
    with lab.connect("says-bye", kind) as client:
        assert ask(client, b"hello\n") == b"hello\n"
        client.sendall(b"bye\n")
        assert client.recv(1) == b""
        for _ in range(10):
            client.sendall(bytes(100_000))
    line = lab.entry("says-bye", kind)
    assert (line["reason"], line["received"], line["sent"]) == ("fault", 1_000_010, 6)
    assert (line["acked"], line["discarded_bytes"]) == (6, 0)


def test_hangs(lab: Lab, kind: str) -> None:
    with lab.connect("hangs", kind) as client:
        assert ask(client, LINES[:1000]) == LINES[:1000]
        assert send_until_stuck(lab.daemon, client, bytes(20_000_000)) < 20_000_000
        assert is_silent(lab.daemon, client)
        reset(client)
    if kind != "unix":  # the kernel does not report the reset of a unix socket
        line = lab.entry("hangs", kind)
        assert (line["reason"], line["received"], line["sent"]) == ("reset", 1000, 1000)


def test_drops(lab: Lab, kind: str) -> None:
    with lab.connect("drops", kind) as client:
        client.sendall(LINES * 2500)
        assert is_silent(lab.daemon, client)
    line = lab.entry("drops", kind)
    assert (line["received"], line["sent"]) == (5_000_000, 0)
    assert line["reason"] in reasons_after_close(kind)


def flips(daemon: Daemon, listener: str) -> list[list[int]]:
    """Return the wrong bits by connection and message."""
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
    """With a seed, the same messages have the same wrong bit in each run. Without one, each run differs."""
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
    """In mode line, the probability applies to each line."""
    with lab.connect("flips", "line") as client:
        client.sendall(LINES)
        client.shutdown(socket.SHUT_WR)
        echo = drain(client)
    bits = [(a ^ b).bit_count() for a, b in zip(LINES, echo, strict=True)]
    assert 1 <= sum(bits) <= 12
    assert all(sum(bits[place : place + 100]) <= 1 for place in range(0, len(bits), 100))


def test_twice(lab: Lab, kind: str) -> None:
    with lab.connect("twice", kind) as client:
        assert ask(client, b"give\n") == b"give\n"
        client.sendall(b"pay\n")
        assert receive(client, 8) == b"pay\npay\n"
        assert ask(client, b"take\n") == b"take\n"
        client.close()
    line = lab.entry("twice", kind)
    assert (line["received"], line["sent"]) == (14, 18)
    assert line["reason"] in reasons_after_close(kind)


def test_half(lab: Lab, kind: str) -> None:
    with lab.connect("half", kind) as client:
        client.sendall(b"012345678\n")
        assert receive(client, 5) == b"01234"
        client.sendall(b"ab\n")
        assert receive(client, 1) == b"a"
        client.sendall(b"\n")
        assert is_silent(lab.daemon, client)
    line = lab.entry("half", kind)
    assert (line["received"], line["sent"]) == (14, 6)
    assert line["reason"] in reasons_after_close(kind)


@line_and_tls
def test_far(lab: Lab, kind: str) -> None:
    """Answers arrive in order, also if the client closes its direction. None is lost."""
    with lab.connect("far", kind) as client:
        assert ask(client, b"ping\n") == b"ping\n"
        for start in range(0, 2000, 100):
            client.sendall(LINES[start : start + 100])
        if kind == "line":
            client.shutdown(socket.SHUT_WR)
        assert receive(client, 2000) == LINES
        if kind == "line":
            assert client.recv(1) == b""
    line = lab.entry("far", kind)
    assert (line["sent"], line["acked"]) == (2005, 2005)
    assert line["reason"] in reasons_after_close(kind)


@line_and_tls
def test_hiccups(lab: Lab, kind: str) -> None:
    """Late answers are complete too. With the recipe's seed, two of the first connection's first ten are late."""
    with lab.connect("hiccups", kind) as client:
        for _ in range(10):
            assert ask(client, b"ping\n") == b"ping\n"
    assert lab.entry("hiccups", kind)["acked"] == 50


def receive_parts(client: socket.socket, size: int) -> list[bytes]:
    """Send a line of this size, and return the data of each recv until all of it is back."""
    parts: list[bytes] = []
    sender = threading.Thread(target=client.sendall, args=(b"." * (size - 1) + b"\n",))
    sender.start()
    while sum(map(len, parts)) < size:
        parts.append(client.recv(65536))
        assert parts[-1]
    sender.join()
    return parts


@line_and_tls
def test_modem(lab: Lab, kind: str) -> None:
    with lab.connect("modem", kind) as client:
        assert b"".join(receive_parts(client, 10_800)) == b"." * 10_799 + b"\n"
    assert lab.entry("modem", kind)["sent"] == 10_800


def segments(client: socket.socket) -> int:
    """Return the number of segments with data that a client has received (tcpi_data_segs_in)."""
    return int(struct.unpack_from("I", client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160), 152)[0])


@pytest.mark.parametrize("kind", ["stream", "tls"])
def test_crumbs(lab: Lab, kind: str) -> None:
    """Each slice is a segment, and over TLS a record."""
    with lab.connect("crumbs", kind) as client:
        parts = receive_parts(client, 10_240)
        if kind == "tls":
            assert [len(part) for part in parts] == [10] * 1024
        else:
            assert segments(client) >= 1024  # more if segments were retransmitted


@line_and_tls
def test_bad_day(lab: Lab, kind: str) -> None:
    with lab.connect("bad-day", kind) as client:
        # The lines have 100 bytes, so that both modes end at the same byte.
        client.sendall(LINES * 6)
        assert drain(client) == LINES * 5
    line = lab.entry("bad-day", kind)
    assert (line["reason"], line["sent"]) == ("fault", 10_000)


@both_modes
def test_slices_without_a_rate(lab: Lab, kind: str) -> None:
    """Each slice is a segment, even if the kernel cannot send them all at once."""
    with lab.connect("sliced", kind) as client:
        assert b"".join(receive_parts(client, 60_050)) == b"." * 60_049 + b"\n"
        # More if the client's write was divided into several reads, or segments were retransmitted.
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
    """Common command-line clients observe the faults too."""
    tool, recipe = name.split()
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    # Several writes may arrive in one read, so the messages are lines.
    kind = "stream" if recipe in {"breaks-off", "dies"} else "line"
    port = lab.daemon.wait_for("listening", listener=f"{recipe} {kind}")["address"].rpartition(":")[2]
    result = subprocess.run(
        ["bash", "-c", COMMANDS[name].format(port=port)], capture_output=True, timeout=PATIENCE, check=False
    )
    assert OUTPUT[name] in result.stdout
    assert lab.daemon.wait_for("client_closed", listener=f"{recipe} {kind}")["fault"] == recipe


# Combinations


@both_modes
@pytest.mark.parametrize("action", ["close", "raise", "half_close"])
def test_end_after_held_echo(lab: Lab, action: str, kind: str) -> None:
    """Held echo arrives before the FIN of the fault."""
    with lab.connect(f"slow-{action}", kind) as client:
        client.sendall(LINES)
        assert drain(client) == LINES[:1000]
    line = lab.entry(f"slow-{action}", kind)
    assert (line["reason"], line["acked"]) == ("fault", 1000)


def test_client_closes_before_its_half_close(lab: Lab) -> None:
    """The client's EOF may arrive while the FIN of the fault waits for held echo."""
    with lab.connect("late-bye", "line") as client:
        client.sendall(b"hello\nbye\n")
        client.shutdown(socket.SHUT_WR)
        assert drain(client) == b"hello\n"
    line = lab.entry("late-bye", "line")
    assert (line["reason"], line["acked"]) == ("fault", 6)


def test_reset_does_not_wait(lab: Lab) -> None:
    """A reset discards held echo, and the log counts it."""
    with lab.connect("late-reset", "line") as client:
        client.sendall(b"hello\ndie\n")
        see_reset(client)
    line = lab.entry("late-reset", "line")
    assert (line["reason"], line["received"], line["sent"]) == ("fault", 10, 0)


def test_order_stays(lab: Lab) -> None:
    """A message that is not delayed waits for the delayed ones before it."""
    with lab.connect("some-late", "line") as client:
        client.sendall(LINES)
        client.shutdown(socket.SHUT_WR)
        assert drain(client) == LINES
    assert lab.entry("some-late", "line")["acked"] == len(LINES)


def test_half_close_of_a_client_that_does_not_read(lab: Lab) -> None:
    """FIN comes after all of the echo, however long the client takes."""
    data = bytes(20_000_000)
    with lab.connect("large-bye", "stream", SO_RCVBUF=4096) as client:
        sent = send_until_stuck(lab.daemon, client, data)
        assert sent < len(data)
        sender = threading.Thread(target=client.sendall, args=(data[sent:],))
        sender.start()
        assert len(drain(client)) == 5_000_000
        sender.join()
    line = lab.entry("large-bye", "stream")
    assert (line["reason"], line["received"], line["acked"]) == ("fault", 20_000_000, 5_000_000)


def test_stalled_client_closes(lab: Lab) -> None:
    """A stalled session does not notice the close, and does not hold up the daemon's stop."""
    with lab.connect("hangs", "line") as client:
        assert ask(client, LINES[:1000]) == LINES[:1000]
