"""Test the parts of the workers that need no process."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from echod.daemon.log_writer import LogWriter
from echod.daemon.plan import Plan
from echod.net.addresses import InheritedAddress, TcpAddress
from echod.net.listeners import ListenError, ListenerSpec, ListeningSocket, open_listeners
from echod.settings.problems import SettingsError
from echod.settings.resources import acquire
from echod.workers import channel, cpus, messages, sockets, spawner, worker
from echod.workers.channel import Channel
from echod.workers.heartbeats import SILENT, Heartbeats
from echod.workers.process import WorkerProcess
from echod.workers.restarts import Restarts
from echod.workers.slots import Slots
from echod.workers.sockets import ListenerSockets
from harness import PATIENCE
from loading import loaded
from serving import run_in_loop

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.once

# The number of CPUs


def cgroup(root: Path, groups: str, **files: str) -> Path:
    """Write /proc/self/cgroup and files of the group `a/b`, of the group above it, or of the root."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "250000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "10000 100000\n"}, 1),
        ("0::/not/mounted\n", {"cpu.max": "200000 100000\n"}, 2),
        (
            "2:memory:/a\n1:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("0::/\n", {}, 8),
    ],
)
def test_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], expected: int
) -> None:
    """The quota of the process's group or of one above it limits the number of CPUs, rounded up."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cpus.usable(cgroup(tmp_path, groups, **files)) == expected


def test_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without control groups, the affinity mask decides."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3})
    assert cpus.usable(tmp_path) == 2


def test_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several workers need Linux."""
    monkeypatch.setattr(sys, "platform", "darwin")
    acquire(loaded())
    with pytest.raises(SettingsError, match="workers: more than one process needs Linux: set 1"):
        acquire(loaded("--workers", "2"))


# Supervision


def test_restarts() -> None:
    """The delay doubles with each death, up to a maximum, and begins again after a worker has run for ten seconds."""
    restarts = Restarts()
    delays = [restarts.delay(now, lived=1) for now in range(0, 100, 10)]
    assert delays == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert restarts.delay(200, lived=10) == 0.05
    assert restarts.count == 11


def test_five_deaths() -> None:
    """Five deaths within ten seconds are too many."""
    restarts = Restarts()
    assert [restarts.delay(now, lived=1) is None for now in (0, 1, 2, 3, 11, 11.5, 12)] == [False] * 6 + [True]


def test_heartbeats() -> None:
    """A worker is silent since its last heartbeat was seen. A pause of the parent does not count."""
    now, beats = [100.0], {0: 1, 1: 1}
    heartbeats = Heartbeats(lambda worker: beats[worker], lambda: now[0])
    heartbeats.watch(0)
    heartbeats.watch(1)
    assert heartbeats.look(1) == {0: 0, 1: 0}
    now[0] += 1
    beats[0] += 1
    assert heartbeats.look(1) == {0: 0, 1: 1}
    assert heartbeats.are_recent()
    now[0] += 1000
    assert heartbeats.look(1) == {0: 1.25, 1: 2.25}
    now[0] += 1
    heartbeats.look(1)
    assert not heartbeats.are_recent()
    assert SILENT == 3
    heartbeats.forget(1)
    heartbeats.forget(1)
    beats[0] += 1
    assert heartbeats.look(1) == {0: 0}
    assert heartbeats.are_recent()


def test_slots() -> None:
    """Each worker has a heartbeat and its clients of each listener. Those of a worker that has ended are removed."""
    descriptor = Slots.create(3, 2)
    parent, worker = Slots(descriptor, 3, 2), Slots(descriptor, 3, 2)
    os.close(descriptor)
    parent.limits[1] = 7
    assert worker.limits.tolist() == [0, 7]
    worker.clients(0)[1] = 5
    worker.clients(1)[1] = 6
    worker.clients(1)[2] = 9
    worker.beat(1)
    assert parent.is_alive(1)
    assert not parent.is_alive(0)
    assert parent.clients(1).tolist() == [0, 6, 9]
    assert parent.clear(1) == [5, 6]
    assert parent.clients(1).tolist() == [0, 0, 9]
    assert worker.last_beat(1) == 0
    assert parent.limits.tolist() == [0, 7]


def test_refused_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spawner reports that the system refuses another process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end, other_end = socket.socketpair()
    refused = OSError(errno.EAGAIN, "Resource temporarily unavailable")

    def fork() -> int:
        raise refused

    monkeypatch.setattr(os, "fork", fork)
    with ours, theirs, end, other_end:
        parent = spawner.Spawner(os.getpid(), ours)
        parent.fork(3, end)
        assert spawner._take_order(theirs, lambda _: 0, {}, select.poll())
        assert parent.report() == spawner.Report("refused", 3, errno.EAGAIN)
        with pytest.raises(OSError, match="temporarily"):
            spawner.Spawner.start(lambda _: 0)


# Sockets


def listener(workers: int) -> ListenerSockets:
    """Return the sockets of a listener at a free port."""
    address = TcpAddress("127.0.0.1", 0)
    (opened,) = open_listeners([ListenerSpec("a", address)], 5, share_ports=True)
    return ListenerSockets.open(opened, address, workers, 5)


def test_address_in_use() -> None:
    """The sockets of the workers share a port. Another daemon of the same user cannot join them."""
    own = listener(3)
    try:
        descriptors = {descriptor for worker in range(3) for descriptor in own.descriptors(worker)}
        assert len(descriptors) == 3
        names = set[tuple[str, int]]()
        for descriptor in descriptors:
            with socket.socket(fileno=os.dup(descriptor)) as sock:
                names.add(sock.getsockname())
        ((host, port),) = names
        with pytest.raises(ListenError, match="Address already in use"):
            open_listeners([ListenerSpec("b", TcpAddress(host, port))], 5, share_ports=True)
        own.set_backlog(7)
    finally:
        own.close()


def test_sibling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel refuses a further socket, the first one is closed, too."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOBUFS, "No buffer space available")

    monkeypatch.setattr(sockets, "open_sibling", refuse)
    with pytest.raises(ListenError, match=r"cannot listen on 127\.0\.0\.1:0: No buffer space available"):
        listener(2)


def test_many_descriptors() -> None:
    """More descriptors than fit into one message arrive in their order. A worker without a parent ends."""
    one, other = socket.socketpair()
    source = [os.memfd_create(str(number)) for number in range(300)]
    with other:
        with one:
            channel.send_descriptors(one, source)
            received = channel.receive_descriptors(other)
        assert [os.fstat(number).st_ino for number in received] == [os.fstat(number).st_ino for number in source]
        for number in source + received:
            os.close(number)
        with pytest.raises(EOFError):
            channel.receive_descriptors(other)
        with pytest.raises(EOFError):
            channel.receive_first(other)


def test_inherited_backlog() -> None:
    """The backlog of an inherited socket is its owner's."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        listening = ListeningSocket(sock, inherited=True)
        shared = ListenerSockets("a", [[listening]] * 2)
        shared.set_backlog(7)
        assert shared.part(1, None).is_inherited


def test_answers(loop_name: str) -> None:
    """Figures that come late count for the next request. A message without a question is ignored, and so is one after the end."""

    async def scene() -> None:
        one, other = socket.socketpair()
        process, worker = WorkerProcess(1, await Channel.open(one)), await Channel.open(other)
        listening = asyncio.create_task(process.listen())
        assert not await process.count(0.001)
        assert isinstance(await worker.receive(), messages.TakeFigures)
        worker.send(messages.StopBegun(1))
        worker.send(messages.Figures((), (), 5))
        assert await process.count(PATIENCE)
        assert process.figures == messages.Figures((), (), 5)
        given_up = process.ask(messages.BeginStop(), messages.StopBegun)
        given_up.cancel()
        assert isinstance(await worker.receive(), messages.BeginStop)
        worker.send(messages.StopBegun(1))
        lost = process.answer(messages.Prepared)
        lost.cancel()
        await worker.close()
        await listening
        assert process.ready.result() is None
        process.send(messages.Drain())

    run_in_loop(loop_name, scene)


def test_last_message(loop_name: str) -> None:
    """The last message of a worker arrives, although the parent has sent one that the worker did not read before it ended."""

    async def scene() -> None:
        ours, theirs = socket.socketpair()
        parent, worker = await Channel.open(ours), await Channel.open(theirs)
        parent.send(messages.Abort())
        worker.send(messages.Ready())
        worker.end()
        assert isinstance(await parent.receive(), messages.Ready)
        assert await parent.receive() is None
        await parent.close()
        assert isinstance(await worker.receive(), messages.Abort)
        assert await worker.receive() is None
        await worker.close()

    run_in_loop(loop_name, scene)


def test_udp_needs_a_single_process() -> None:
    """Inherited UDP sockets that become listeners without settings are an error with several workers."""
    resources = acquire(loaded("--workers", "2"))
    with pytest.raises(SettingsError, match="workers: a UDP listener needs a single process"):
        Plan.derive(resources, [InheritedAddress("echo", datagram=True)])


def test_spawner_that_has_ended() -> None:
    """A spawner that has ended with an order unread is reported as such."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        parent = spawner.Spawner(1, ours)
        parent.kill(0)
        theirs.close()
        assert parent.report() is None
        parent.kill(0)


def test_worker_without_a_parent() -> None:
    """A worker ends if its parent has ended before the first message."""
    one, other = socket.socketpair()
    with other:
        one.close()
        assert worker.run(other) == 0


def test_worker_that_cannot_start(tmp_path: Path) -> None:
    """A worker that cannot load its settings logs that, and ends with 1."""
    file = tmp_path / "log"
    tls = ("--listeners.a.address", ":0", "--listeners.a.tls.certificate", "a", "--listeners.a.tls.private-key", "b")
    config = loaded("--log.file", str(file), "--log.format", "json", *tls)
    start = messages.Start(0, 2, messages.Loaded(config, {}), (), ())
    one, other = socket.socketpair()
    with one, other, (tmp_path / "slots").open("wb") as slots:
        channel.send_descriptors(one, [slots.fileno()])
        one.sendall(messages.encode(start))
        assert worker.run(other) == 1
    assert '"crashed"' in file.read_text()


# The log


@pytest.mark.parametrize("is_shared", [True, False])
def test_sizes_of_writes(is_shared: bool) -> None:
    """A write that other processes could cut ends with a line, and is longer than PIPE_BUF only for a single line."""
    reader, pipe = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps the borders of writes
    lines = [b"x" * 299 + b"\n"] * 100 + [b"y" * 5000 + b"\n"] + [b"z\n"]
    with reader, pipe:
        writer = LogWriter(pipe.fileno(), lambda _: b"", is_shared=is_shared)
        for line in lines:
            writer.write(line)
        writer.close(PATIENCE)
        pipe.shutdown(socket.SHUT_WR)
        writes = list(iter(lambda: reader.recv(100_000), b""))
    assert b"".join(writes) == b"".join(lines)
    if is_shared:
        assert all(len(write) <= select.PIPE_BUF or write == lines[100] for write in writes)
        assert all(write.endswith(b"\n") for write in writes)
        assert len(writes) < 20
    else:
        assert max(map(len, writes)) > 5001
