"""Test the content of the log, and that its reader can neither delay nor end the echo."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from echod.daemon.log_writer import LogWriter
from echod.daemon.logs import Log
from echod.settings.model import LogSettings
from harness import PATIENCE, clean_environment, free_port, receive, reset

if TYPE_CHECKING:
    from collections.abc import Iterator

    from certificates import Certificates, TlsSocket
    from harness import Start

pytestmark = pytest.mark.once


@pytest.fixture
def port() -> int:
    """Return a free port, for a daemon with an unreadable log."""
    return free_port()


def connected(port: int) -> socket.socket:
    """Return a client of a daemon that may still be starting."""
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), PATIENCE)
        except ConnectionRefusedError:
            continue


def serve_one(port: int) -> None:
    with connected(port) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"


def test_log_without_reading(start: Start, port: int) -> None:
    """With a full log pipe, 8,000 connections are served, and the dropped lines are counted."""
    connections = 8000
    daemon = start(listen=f"127.0.0.1:{port}", read_log=False)
    for _ in range(connections):
        serve_one(port)
    daemon.start_reading()
    dropped = daemon.wait_for("log_lines_dropped")["lines"]
    assert dropped > 1000
    assert daemon.stop() == 0
    assert len(daemon.all("log_lines_dropped")) == 1
    assert len(daemon.all("client_closed")) + dropped == connections
    assert daemon.wait_for("stopped")["connections"] == connections


def test_closed_log_pipe(start: Start, port: int) -> None:
    """A closed log pipe does not end the echo, and the exit code of a stop is 0."""
    daemon = start(listen=f"127.0.0.1:{port}", read_log=False)
    daemon.log_pipe.close()
    for _ in range(100):
        serve_one(port)
    assert daemon.stop() == 0


def test_full_disk(start: Start, port: int) -> None:
    """A full disk does not end the echo."""
    daemon = start("--log.file", "/dev/full", listen=f"127.0.0.1:{port}", read_log=False)
    for _ in range(100):
        serve_one(port)
    assert daemon.stop() == 0


def test_reader_stuck_at_the_end(start: Start, port: int) -> None:
    """A full pipe does not prevent the exit."""
    daemon = start(listen=f"127.0.0.1:{port}", read_log=False)
    serve_one(port)
    filler = os.dup(daemon.log_pipe.fileno())
    fcntl.fcntl(filler, fcntl.F_SETPIPE_SZ, 4096)
    os.close(filler)
    for _ in range(100):
        serve_one(port)
    assert daemon.stop() == 0


def test_file(start: Start, tmp_path: Path) -> None:
    """Lines are appended to `log.file` in each format."""
    for form in ("json", "logfmt", "console"):
        path = tmp_path / form
        path.write_text("before\n")
        port_file = ("--log.file", str(path), "--log.format", form)
        port = free_port()
        daemon = start(*port_file, listen=f"127.0.0.1:{port}", read_log=False)
        serve_one(port)
        assert daemon.stop() == 0
        first, *lines = path.read_text().splitlines()
        assert first == "before"
        (closed,) = (line for line in lines if "closed" in line)
        match form:
            case "json":
                assert list(json.loads(closed))[:3] == ["timestamp", "level", "event"]
                assert json.loads(closed)["received"] == 1
            case "logfmt":
                assert " level=info event=client_closed " in closed
                assert " received=1 " in closed
            case _:
                assert re.fullmatch(
                    r"[-\d]+ [:.\d]+[+-]\d{4}    closed    127\.0\.0\.1:\d+ eof, 1 B echoed in .*", closed
                )


def test_level(start: Start, tmp_path: Path, port: int) -> None:
    """Events below `log.level` are not logged."""
    options = ("--log.level", "warning", "--log.file", str(tmp_path / "log"))
    daemon = start(*options, listen=f"127.0.0.1:{port}", read_log=False)
    serve_one(port)
    assert daemon.stop() == 0
    assert (tmp_path / "log").read_bytes() == b""


@pytest.mark.parametrize(
    ("choice", "reasons"),
    [("all", ["eof", "eof", "reset"]), ("nonempty", ["eof", "reset"]), ("failed", ["reset"]), ("none", [])],
)
def test_connections(start: Start, choice: str, reasons: list[str]) -> None:
    """`log.connections` selects the logged connections. All are counted."""
    daemon = start("--log.connections", choice)
    daemon.echo(b"hello")
    daemon.connect().close()
    with daemon.connect() as client:
        client.sendall(b"hello")
        assert receive(client, 5) == b"hello"
        reset(client)
    assert daemon.stop() == 0
    assert sorted(line["reason"] for line in daemon.all("client_closed")) == reasons
    totals = daemon.wait_for("stopped")
    assert (totals["connections"], totals["empty"], totals["received"], totals["acked"]) == (3, 1, 10, 10)


def test_ledger_line(start: Start) -> None:
    """The line of a connection has its figures, and no payload."""
    daemon = start("--listeners.lab.address", "127.0.0.1:0", listen=None)
    with daemon.connect() as client:
        port = client.getsockname()[1]
        client.sendall(b"secret")
        assert receive(client, 6) == b"secret"
    line = daemon.wait_for("client_closed")
    assert daemon.stop() == 0
    assert line["listener"] == "lab"
    assert line["peer"] == f"127.0.0.1:{port}"
    counts = ("received", "sent", "acked", "discarded_bytes", "reason", "retransmits")
    assert [line[name] for name in counts] == [6, 6, 6, 0, "eof", 0]
    assert 0 < line["rtt_ms"] < 1000
    assert 0 <= line["seconds"] < PATIENCE
    assert "secret" not in "".join(daemon.raw)


SCRIPT = """
import asyncio, logging, sys, warnings
from echod.daemon.logs import Log
from echod.settings.model import LogSettings
log = Log(LogSettings(format={form!r}))
log.capture()
{body}
log.close()
"""


def log_of(body: str, form: str = "json", *python: str) -> str:
    """Return the standard error of a small program that uses echod's log."""
    program = SCRIPT.format(form=form, body=body)
    result = subprocess.run(
        [sys.executable, *python, "-c", program],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=clean_environment(),
        check=True,
    )
    return result.stderr


def test_warnings_and_logging_are_captured() -> None:
    """Python's warnings, messages of `logging` and exceptions in destructors become log lines."""
    body = """
warnings.warn("be warned")
logging.getLogger("asyncio").error("it is %s", "slow")
logging.getLogger("odd").log(55, "odd level")
logging.getLogger("chatty").info("not this")
class Bad:
    def __del__(self): raise ValueError("in a destructor")
Bad()
"""
    warning, error, odd, ignored = map(json.loads, log_of(body).splitlines())
    assert (warning["level"], warning["logger"]) == ("warning", "py.warnings")
    assert "UserWarning: be warned" in warning["event"]
    assert (error["level"], error["event"], error["logger"]) == ("error", "it is slow", "asyncio")
    assert odd["level"] == "critical"
    assert (ignored["event"], ignored["level"]) == ("exception_ignored", "error")
    assert "ValueError: in a destructor" in ignored["exception"]


@pytest.mark.parametrize("form", ["json", "logfmt", "console"])
def test_no_line_breaks_in_a_line(form: str) -> None:
    """A value with a line break or an invalid character cannot forge or break a line."""
    text = log_of("log.logger.info('event', value='a\\nlevel=critical', bad='\\udc80')", form)
    assert len(text.splitlines()) == 1
    assert text.endswith("\n")


def test_console_on_a_terminal() -> None:
    """On a terminal, `auto` means console lines with colours."""
    master, slave = os.openpty()
    program = SCRIPT.format(form="auto", body="log.logger.info('hello', number=1)")
    subprocess.run([sys.executable, "-c", program], stderr=slave, timeout=PATIENCE, env=clean_environment(), check=True)
    os.close(slave)
    line = os.read(master, 10_000).decode()
    os.close(master)
    assert "\x1b[" in line
    assert "hello" in line


class Pipe:
    """A log writer with a pipe as its destination."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, 4096)
        self.writer = LogWriter(self.writing, lambda lines: b"dropped %d\n" % lines)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    for descriptor in (pipe.reading, pipe.writing):
        os.close(descriptor)


def read_lines(descriptor: int) -> list[bytes]:
    """Read the available lines, and complete the last one."""
    data = b""
    while not data.endswith(b"\n"):
        assert select.select([descriptor], [], [], PATIENCE)[0]
        data += os.read(descriptor, 1 << 20)
    return data.splitlines(keepends=True)


@pytest.mark.parametrize("blocking", [True, False])
def test_writer_drops_and_counts(pipe: Pipe, blocking: bool) -> None:
    """Lines that do not fit into the queue are dropped, and a line after the others counts them."""
    os.set_blocking(pipe.writing, blocking)
    line = b"x" * 999 + b"\n"
    total = 5000
    for _ in range(total):
        pipe.writer.write(line)
    kept = dropped = 0
    while kept + dropped < total:
        for read in read_lines(pipe.reading):
            if read == line:
                kept += 1
            else:
                dropped += int(read.split()[1])
    assert kept + dropped == total
    assert kept >= 1024 * 1024 // len(line)
    assert dropped > 0
    pipe.writer.close()


def test_writer_closes_at_once(pipe: Pipe) -> None:
    """Closing writes a line that was queued just before."""
    for _ in range(20):
        writer = LogWriter(pipe.writing, lambda _: b"")
        writer.write(b"x\n")
        assert read_lines(pipe.reading) == [b"x\n"]
        writer.write(b"last\n")
        writer.close(timeout=PATIENCE)
        assert writer.ended
        assert read_lines(pipe.reading) == [b"last\n"]
    pipe.writer.close()


def test_writer_takes_no_signals(start: Start) -> None:
    """The writer thread blocks signals, because only the main thread runs Python's handlers."""
    daemon = start()
    stop_signals = 1 << (signal.SIGTERM - 1) | 1 << (signal.SIGINT - 1)
    blocked = {}
    for task in Path(f"/proc/{daemon.pid}/task").iterdir():
        status = dict(line.split(":\t") for line in (task / "status").read_text().splitlines() if ":\t" in line)
        blocked[int(task.name) == daemon.pid] = int(status["SigBlk"], 16) & stop_signals
    assert blocked == {True: 0, False: stop_signals}


def test_messages_after_the_log_is_closed() -> None:
    """Messages after the log is closed go to standard error."""
    body = """
class Late:
    def __del__(self): raise ValueError("too late for the log")
late = Late()
log.close()
logging.getLogger("asyncio").error("said afterwards")
warnings.warn("warned afterwards")
"""
    text = log_of(body)
    for late in ("too late for the log", "said afterwards", "warned afterwards"):
        assert late in text


def log_on_a_full_disk(path: Path, size: int, body: str) -> bytes:
    """Return the file of a writer. The file is limited to `size` bytes until `body` has run."""
    program = f"""
import resource, signal, sys
from echod.daemon.log_writer import LogWriter
from echod.daemon.logs import Log
from echod.settings.model import LogSettings
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
out = open(sys.argv[1], "ab", buffering=0)
writer = LogWriter(out.fileno(), lambda lines: b"dropped %d\\n" % lines)
{body}
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
writer.write(b"next\\n")
writer.close()
out.close()
"""
    subprocess.run([sys.executable, "-c", program, str(path)], timeout=PATIENCE, check=True)
    return path.read_bytes()


def test_writer_ends_a_torn_line(tmp_path: Path) -> None:
    """After an error in the middle of a line, the next line starts on its own, and the loss is counted."""
    body = """
for _ in range(4):
    writer.write(b"123456789\\n")
while not writer.lost:
    pass
"""
    log = log_on_a_full_disk(tmp_path / "log", 25, body)
    assert log == b"123456789\n123456789\n12345\nnext\ndropped 2\n"


def test_writer_keeps_counting_while_it_fails(tmp_path: Path) -> None:
    """If the notice of dropped lines cannot be written, their count is kept."""
    body = """
for number in range(1, 4):
    writer.write(b"lost\\n")
    while writer.lost != number:
        pass
"""
    assert log_on_a_full_disk(tmp_path / "log", 0, body) == b"next\ndropped 3\n"


def test_the_time_of_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line has its own time in UTC with microseconds, even if the clock goes back."""
    file = tmp_path / "log"
    log = Log(LogSettings(file=str(file), format="json"))
    times = [1_795_800_001_999_999_999, 1_795_800_002_000_000_000, 1_795_800_001_000_042_000]
    for moment in times:
        monkeypatch.setattr(time, "time_ns", lambda moment=moment: moment)
        log.logger.info("tick")
    monkeypatch.undo()
    log.close()
    assert [json.loads(line)["timestamp"] for line in file.read_text().splitlines()] == [
        "2026-11-27T17:20:01.999999Z",
        "2026-11-27T17:20:02.000000Z",
        "2026-11-27T17:20:01.000042Z",
    ]


@pytest.mark.parametrize("preamble", [[], ["handshake"], ["proxy_header", "handshake"]])
def test_states(start: Start, certificates: Certificates, preamble: list[str]) -> None:
    """At level debug, each client has a line when it connects and when its session enters another state."""
    proxy = ("--listeners.x.proxy-protocol", "require", "--listeners.x.proxy-trusted", "127.0.0.1")
    daemon = start(
        *("--log.level", "debug", "--listeners.x.address", "127.0.0.1:0"),
        *(proxy if "proxy_header" in preamble else ()),
        *(certificates.options("x") if preamble else ()),
        listen=None,
    )
    with daemon.connect() as plain:
        peer = f"127.0.0.1:{plain.getsockname()[1]}"
        client: socket.socket | TlsSocket = plain
        if "proxy_header" in preamble:
            plain.sendall(b"PROXY UNKNOWN\r\n")
        if preamble:
            client = certificates.over(plain)
        client.send(b"hello")
        assert client.recv(5) == b"hello"
        client.shutdown(socket.SHUT_WR)
        daemon.wait_for("client_closed")
    states = [line["state"] for line in daemon.all("client_state") if line["peer"] == peer]
    assert states[: len(preamble) + 3] == [*preamble, "open", "half_closed", "flushing"]
    names = [line["event"] for line in daemon.events if line.get("peer") == peer]
    assert (names[0], names[-1]) == ("client_connected", "client_closed")
    assert {line["level"] for line in daemon.all("client_state")} == {"debug"}


def test_states_of_clients_that_have_already_finished(start: Start) -> None:
    """A client that closes its direction before it is accepted is open first, too."""
    daemon = start("--log.level", "debug", "--log.connections", "all")
    daemon.freeze()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(daemon.connect()) for _ in range(50)]
        for client in clients:
            client.shutdown(socket.SHUT_WR)
        daemon.send_signal(signal.SIGCONT)
        daemon.wait_for("client_closed", count=len(clients))
    states: dict[str, list[str]] = {}
    for line in daemon.all("client_state"):
        states.setdefault(line["peer"], []).append(line["state"])
    assert [found[:3] for found in states.values()] == [["open", "half_closed", "flushing"]] * len(clients)


@pytest.mark.parametrize("fault", [(), ("--faults.slow.rate", "1GB", "--listeners.x.fault", "slow")])
def test_states_of_a_slow_reader(start: Start, fault: tuple[str, ...]) -> None:
    """A session that stops reading is paused, and resumed when its client has read. A reload applies to new clients."""
    daemon = start(
        *("--log.level", "debug", "--limits.write-buffer", "4096", "--listeners.x.address", "127.0.0.1:0"),
        *fault,
        listen=None,
    )
    size = 16 << 20
    with daemon.connect(receive_buffer=4096) as client:
        sender = threading.Thread(target=client.sendall, args=(bytes(size),))
        sender.start()
        daemon.wait_for("client_state", state="paused")
        assert len(receive(client, size)) == size
        sender.join(PATIENCE)
        daemon.wait_for("client_state", state="resumed")


def test_states_after_a_reload(start: Start, tmp_path: Path) -> None:
    """Level debug shows the clients that connect after the reload that sets it, and no client after it is removed."""
    config = tmp_path / "echo.toml"
    config.write_text("")
    daemon = start("--config", str(config))
    daemon.echo(b"x")
    for reload, level in enumerate(("debug", "info"), 1):
        config.write_text(f'log.level = "{level}"\n')
        daemon.send_signal(signal.SIGHUP)
        daemon.wait_for("reloaded", count=reload)
        daemon.echo(b"x")
        daemon.wait_for("client_closed", count=reload + 1)
    assert daemon.stop() == 0
    assert len(daemon.all("client_connected")) == 1


CONTROLS = {"NUL": "\0", "TAB": "\t", "LF": "\n", "CR": "\r", "ESC": "\x1b", "DEL": "\x7f", "C1": "\x9b", "NEL": "\x85"}
CONTROLS |= {
    "LS": "\u2028",
    "PS": "\u2029",
    "bidi": "\u202e",
    "BOM": "\ufeff",
    "surrogate": "\udc80",
    "tag": "\U000e0041",
}


@pytest.mark.parametrize("name", CONTROLS)
def test_logfmt_has_no_control_characters(tmp_path: Path, name: str) -> None:
    """Each class of control character is escaped in an event, a key, a value, a nested value and a traceback."""
    char = CONTROLS[name]
    log = Log(LogSettings(file=str(tmp_path / "log"), format="logfmt"))
    nested = {"list": [char], f"a{char}": {f"b{char}": (char, char.encode(errors="surrogatepass"))}}
    name = f"a{char}b"
    log.logger.info(name, **{f"k{char}k": 1, char: 2}, value=name, nested=nested)
    log.logger.error("failed", exc_info=ValueError(char))
    log.close()
    text = (tmp_path / "log").read_bytes().decode()
    assert text.count("\n") == 2
    assert text.replace("\n", "").isprintable()
    fields = re.fullmatch(
        r'timestamp=\S+ level=info event=("[^"]+") k_k=1 _=2 value=("[^"]+") nested=.+', text.split("\n")[0]
    )
    assert fields is not None
    assert [json.loads(field) for field in fields.groups()] == [name] * 2


HOSTILE = 'CN=a\x00\x1b[2J\r\nb\x7f\x9b\u2028\u202e\udc80 \\ "='


@pytest.mark.parametrize("text", [HOSTILE, "\x1b", "a\x1bb"])
@pytest.mark.parametrize("form", ["json", "logfmt", "console"])
def test_control_characters_are_escaped(tmp_path: Path, form: Literal["json", "logfmt", "console"], text: str) -> None:
    """Control characters in names, keys, values and tracebacks are escaped."""
    log = Log(LogSettings(file=str(tmp_path / "log"), format=form))
    log.logger.info(text, **{text: 1})
    log.logger.info("closed", subject=text, parts=[text], logger=text)
    log.logger.error("failed", detail=text, exc_info=ValueError(text))
    log.close()
    written = (tmp_path / "log").read_text()
    # JSON leaves DEL as it is, and a terminal ignores it.
    assert [char for char in written if not char.isprintable() and char not in "\n\x7f"] == []
    first, closed, *failed = written.splitlines()
    assert len(failed) == 1 or form == "console"
    assert any("ValueError: " in line for line in failed)
    match form:
        case "json":
            assert json.loads(first)[text] == 1
            assert json.loads(closed)["subject"] == text
        case "logfmt":
            assert re.fullmatch(r"timestamp=\S+ level=info event=\".*\" \w+=1", first)
            quoted = re.search(r' subject=("(?:[^"\\]|\\.)*") parts=', closed)
            assert quoted is not None
            assert json.loads(quoted[1]) == text
        case _:
            assert f" subject={text!r} " in f"{closed} "
            assert len(failed) > 1


def test_logfmt_values(tmp_path: Path) -> None:
    """Values are quoted only if necessary. Booleans and None are written as logfmt does."""
    log = Log(LogSettings(file=str(tmp_path / "log"), format="logfmt"))
    log.logger.info("event", a="b", number=1.5, yes=True, no=False, nothing=None, empty="", path="C:\\x", words="a b")
    log.close()
    line = (tmp_path / "log").read_text().partition(" event=")[2]
    assert line == 'event a=b number=1.5 yes=true no=false nothing= empty= path=C:\\x words="a b"\n'
