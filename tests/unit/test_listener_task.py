"""The listener task by itself: pauses, batches, and the end of its sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from typing import Any

import pytest

from echod.net.listeners import ListeningSocket
from echod.server.listener_task import ListenerTask
from harness import PATIENCE
from serving import run_in_loop, until


class Flaky(ListeningSocket):
    """A listening socket that raises each of some errors once."""

    def __init__(self) -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        sock.setblocking(False)
        super().__init__(sock)
        self.errors: list[int] = []
        self.calls = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.calls += 1
        if self.errors:
            raise OSError(self.errors.pop(0), "failed on purpose")
        return super().accept()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.sock.getsockname(), PATIENCE)


class Owner:
    """An owner of a listener task that records each call."""

    def __init__(self, *sockets: ListeningSocket, room: int = 100, **options: Any) -> None:
        self.admitted: list[socket.socket] = []
        self.causes: list[str] = []
        self.pauses: list[float] = []
        self.room = room
        self.listener = ListenerTask(
            sockets, self._admit, self.causes.append, self.pauses.append, has_room=lambda: self.room > 0, **options
        )
        self.task = asyncio.create_task(self.listener.run())

    def _admit(self, sock: socket.socket, _: Any) -> None:
        self.room -= 1
        self.admitted.append(sock)

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
        self.listener.close()
        for sock in self.admitted:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()


def test_pauses_double(loop_name: str) -> None:
    """Each pause after a failure is twice as long as the one before, up to a second. After a success it is short again."""
    pauses: list[float | None] = []

    class Hasty(ListenerTask):
        def pause(self, cause: str, retry_after: float | None) -> None:
            pauses.append(retry_after)
            super().pause(cause, 0)

    async def scene() -> None:
        listening = Flaky()
        listening.errors = [errno.EMFILE] * 10
        resumed: list[float] = []
        admitted: list[socket.socket] = []
        listener = Hasty([listening], lambda sock, _: admitted.append(sock), lambda _: None, resumed.append)
        task = asyncio.create_task(listener.run())
        with listening.connect(), listening.connect():
            await until(lambda: resumed)
            assert pauses == [0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0]
            listening.errors = [errno.EMFILE]
            with listening.connect():
                await until(lambda: len(admitted) == 3)
        assert pauses[10:] == [0.005]
        task.cancel()
        await asyncio.wait([task])
        listener.close()
        for sock in admitted:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()

    run_in_loop(loop_name, scene)


def test_resume_before_the_wait(loop_name: str) -> None:
    """`resume` is not missed between the moment of a pause and the moment in which the task waits."""

    async def scene() -> None:
        listening = Flaky()
        owner = Owner(listening)
        await asyncio.sleep(0)
        owner.listener.pause("a test", None)
        owner.listener.pause("of another socket in the same iteration", None)
        owner.listener.resume()
        with listening.connect():
            await until(lambda: owner.admitted)
        await owner.close()
        assert (owner.causes, len(owner.pauses)) == (["a test"], 1)

    run_in_loop(loop_name, scene)


def test_no_room(loop_name: str) -> None:
    """Without room, clients wait until `resume`. The pause ends when no client waits any more."""

    async def scene() -> None:
        listening, other = Flaky(), Flaky()
        owner = Owner(listening, other, room=1)
        with listening.connect(), listening.connect(), other.connect():
            await until(lambda: owner.listener.is_paused)
            assert (len(owner.admitted), owner.listener.waiting, owner.causes) == (1, 2, ["max_connections"])
            owner.room = 1
            owner.listener.resume()
            await until(lambda: len(owner.admitted) == 2)
            assert (owner.listener.is_paused, owner.pauses) == (True, [])
            owner.room = 2
            owner.listener.resume()
            await until(lambda: len(owner.admitted) == 3)
            await until(lambda: owner.pauses)
            assert not owner.listener.is_paused
        await owner.close()

    run_in_loop(loop_name, scene)


def test_interval_between_batches(loop_name: str) -> None:
    """With an interval, each batch is followed by a wait that is not a pause."""

    async def scene() -> None:
        listening = Flaky()
        owner = Owner(listening, batch=1, interval=PATIENCE)
        with listening.connect(), listening.connect():
            await until(lambda: owner.admitted)
            for _ in range(10):
                await asyncio.sleep(0)
            assert (len(owner.admitted), owner.causes) == (1, [])
            owner.listener.resume()
            await until(lambda: len(owner.admitted) == 2)
        await owner.close()

    run_in_loop(loop_name, scene)


@pytest.mark.parametrize("gone", [1, 100])
def test_connections_that_are_gone(loop_name: str, gone: int) -> None:
    """accept(2) may fail because the connection is gone. The next one is accepted; at the end, tries are limited."""

    async def scene() -> None:
        listening = Flaky()
        listening.errors = [errno.ECONNABORTED] * gone
        owner = Owner(listening)
        owner.task.cancel()
        with listening.connect():
            await until(lambda: owner.listener.waiting)
            assert owner.listener.accept_rest() == (gone == 1)
            assert len(owner.admitted) == (gone == 1)
        await owner.close()
        assert listening.sock.fileno() == -1

    run_in_loop(loop_name, scene)


def test_inherited_socket_at_the_end(loop_name: str) -> None:
    """The backlog of an inherited socket is left to its other owner, and its size does not change."""

    async def scene() -> None:
        backlogs: list[int] = []

        class Listening(socket.socket):
            def listen(self, backlog: int = 0, /) -> None:
                backlogs.append(backlog)
                super().listen(backlog)

        def bound() -> Listening:
            sock = Listening()
            sock.bind(("127.0.0.1", 0))
            sock.listen(5)
            sock.setblocking(False)
            return sock

        inherited, own = ListeningSocket(bound(), inherited=True), ListeningSocket(bound())
        owner = Owner(inherited, own)
        owner.task.cancel()
        owner.listener.set_backlog(7)
        assert backlogs == [5, 5, 7]
        with contextlib.ExitStack() as clients:
            for listening in (inherited, own):
                clients.enter_context(socket.create_connection(listening.sock.getsockname(), PATIENCE))
            await until(lambda: owner.listener.waiting == 2)
            assert owner.listener.accept_rest()
            assert (len(owner.admitted), inherited.sock.fileno()) == (1, -1)
        await owner.close()

    run_in_loop(loop_name, scene)


def test_no_descriptors_at_the_end(loop_name: str) -> None:
    """If accept(2) fails for lack of descriptors, the sockets are closed only once no client waits."""

    async def scene() -> None:
        listening = Flaky()
        listening.errors = [errno.EMFILE, errno.EMFILE]
        owner = Owner(listening)
        owner.task.cancel()
        with listening.connect():
            await until(lambda: owner.listener.waiting)
            assert not owner.listener.accept_rest()
            taken, _ = listening.sock.accept()
            taken.close()
            assert owner.listener.accept_rest()
        await owner.close()

    run_in_loop(loop_name, scene)


def test_yielding(loop_name: str) -> None:
    """A process with many clients leaves each connection to others once, then accepts it."""
    asked = [0]

    def is_ahead() -> bool:
        asked[0] += 1
        return True

    async def scene() -> None:
        listening = Flaky()
        owner = Owner(listening, is_ahead=is_ahead)
        clients = [listening.connect() for _ in range(3)]
        await until(lambda: len(owner.admitted) == 3)
        assert asked[0] >= 6
        for client in clients:
            client.close()
        await owner.close()

    run_in_loop(loop_name, scene)


def test_room_is_given_back(loop_name: str) -> None:
    """Room that was reserved is given back if there is no connection, or if accept(2) fails."""
    given = list[int]()

    async def scene() -> None:
        listening = Flaky()
        listening.errors = [errno.EMFILE]
        owner = Owner(listening, give_back=lambda: given.append(1))
        with listening.connect():
            await until(lambda: owner.admitted)
            await until(lambda: len(given) == 2)
        await owner.close()

    run_in_loop(loop_name, scene)
