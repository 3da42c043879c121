"""Connect clients at a fixed rate."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

from harness import PATIENCE, receive

if TYPE_CHECKING:
    from types import TracebackType


class Connects:
    """Connect clients at a fixed rate, each from a thread of a pool, and check their echo."""

    def __init__(self, address: tuple[str, int], rate: float) -> None:
        self._address = address
        self._pause = 1 / rate
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(2000)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run)
        self.begun = 0
        self.served = 0
        self.failures: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def finish(self) -> None:
        """Start no more clients, and wait for the others."""
        self._stop.set()
        self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due += self._pause
            self.begun += 1
            self._pool.submit(self._echo, self.begun)

    def _echo(self, number: int) -> None:
        message = b"%d" % number * 100
        try:
            with socket.create_connection(self._address, PATIENCE) as client:
                client.sendall(message)
                client.shutdown(socket.SHUT_WR)
                right = receive(client, len(message) + 1) == message
        except OSError as error:
            self.failures.append(repr(error))
            return
        with self._lock:
            self.served += right
        if not right:
            self.failures.append("wrong echo")
