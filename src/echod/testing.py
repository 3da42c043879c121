"""Run a server in a thread with its own event loop, for tests. The pytest fixture `echod` provides it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import ssl
import tempfile
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from echod import embed
from echod.embed import Server
from echod.loops import loop_factory
from echod.options import ThreadOptions

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Unpack

    from echod.server.ledger import Entry
    from echod.server.receipt import Receipt
    from echod.settings.resources import Resources

# In seconds. They are short, so that a test which leaves a connection open ends soon.
SHUTDOWN = {"quiet_period": 0.05, "drain_timeout": 1.0, "linger_timeout": 0.2}

_HOST = "127.0.0.1"
_NAMES = ("localhost", _HOST, "::1")


class ServerFactory(Protocol):
    """The fixture `echod_factory`."""

    def __call__(self, **options: Unpack[ThreadOptions]) -> ServerThread:
        """Start a server, which is stopped at the end of the test."""


class ServerThread:
    """Run a server on a free port of 127.0.0.1. It listens once the constructor returns, and `with` stops it at the end.

        with ServerThread(mode="line") as server:
            client = socket.create_connection(server.address)

    The defaults of `shutdown` are shorter than those of the daemon: a quiet period of 0.05 s, a drain timeout of 1 s and
    a linger timeout of 0.2 s.

    A forked process does not have the thread. Clients there may use `address` and `ssl_context`. All methods that ask or
    stop the server raise RuntimeError there.

    Args:
        options: the keys of `echod.options.ThreadOptions`. docs/how-to/testing.md explains them.

    Raises:
        SettingsError: options are wrong; it has all problems.
        ImportError: the options require a certificate, and trustme is not installed.

    """

    def __init__(self, **options: Unpack[ThreadOptions]) -> None:
        self._process = os.getpid()
        self._news = threading.Condition()
        self._entries: list[Entry] = []
        self._authority: Path | None = None
        self._started: Future[None] = Future()
        self._ended: Future[Receipt] = Future()
        with contextlib.ExitStack() as resources:
            given: dict[str, Any] = dict(options)
            if isinstance(shutdown := given.get("shutdown", {}), dict):
                given["shutdown"] = SHUTDOWN | shutdown
            tls = given.pop("tls", False)
            if tls is True or (isinstance(tls, dict) and not tls.keys() & {"certificate", "private_key"}):
                folder = Path(tempfile.mkdtemp(prefix="echod-"))
                resources.callback(weakref.finalize(self, _remove, folder, self._process))
                self._authority = folder / "authority.pem"
                given["tls"] = _certify(folder, self._authority) | ({} if tls is True else tls)
            elif tls is not False:
                given["tls"] = tls
            acquired = embed.acquire(f"{_HOST}:0", given, ThreadOptions.__optional_keys__)
            self._thread = threading.Thread(target=self._work, args=(acquired,), name="echod", daemon=True)
            self._thread.start()
            self._started.result()
            self._resources = resources.pop_all()

    def __repr__(self) -> str:
        """Return the address, the state and the number of clients."""
        return f"<ServerThread {getattr(self, '_server', 'not started')}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop gracefully."""
        self.stop()

    # Called by the test

    @property
    def address(self) -> tuple[str, int]:
        """The address as `socket.create_connection` takes it."""
        return _HOST, self.port

    @property
    def port(self) -> int:
        """The TCP port."""
        return self._server.port

    @property
    def clients(self) -> int:
        """The number of connected clients."""
        self._check_process()
        return self._server.clients

    @property
    def connections(self) -> list[Entry]:
        """The entries of all connections that have been closed, in that order."""
        self._check_process()
        with self._news:
            return self._entries.copy()

    def wait_for_connections(self, count: int, timeout: float = 10.0) -> list[Entry]:
        """Wait until a number of connections have been closed, and return all entries.

        Args:
            count: number of connections since the start.
            timeout: in seconds.

        Raises:
            TimeoutError: fewer connections have been closed in time. The message lists them.

        """
        self._check_process()
        with self._news:
            if self._news.wait_for(lambda: len(self._entries) >= count, timeout):
                return self._entries.copy()
            closed = ", ".join(f"{entry.peer} ({entry.reason})" for entry in self._entries) or "none"
            msg = f"fewer than {count} connections closed in {timeout} s: {closed}; still connected: {self.clients}"
            raise TimeoutError(msg)

    @property
    def certificate_authority(self) -> Path:
        """The PEM file with the authority of the issued certificate. `stop` removes it.

        Raises:
            RuntimeError: no certificate was issued.

        """
        if self._authority is None:
            msg = "no certificate was issued: use @pytest.mark.echod(tls=True)"
            raise RuntimeError(msg)
        return self._authority

    def ssl_context(self) -> ssl.SSLContext:
        """Return a client context that trusts the issued certificate, which names localhost, 127.0.0.1 and ::1.

        Raises:
            RuntimeError: no certificate was issued.

        """
        return ssl.create_default_context(cafile=self.certificate_authority)

    def stop(self) -> Receipt:
        """Stop gracefully, wait for the end, and return the receipt. Idempotent.

        Raises:
            RuntimeError: this is a forked process. The server continues in the other process.

        """
        self._check_process()
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._resources.close()
        return self._ended.result()

    def _check_process(self) -> None:
        # After a fork, a lock that the thread held is never released in the child, and the thread never ends there.
        if os.getpid() != self._process:
            msg = (
                f"the server runs in process {self._process}, the parent of this one: ask or stop it there, and end this "
                "process with os._exit"
            )
            raise RuntimeError(msg)

    # Called in the thread

    def _work(self, acquired: Resources) -> None:
        try:
            with asyncio.Runner(loop_factory=loop_factory(acquired.config.settings.loop)) as runner:
                receipt = runner.run(self._serve(acquired))
        except BaseException as error:  # noqa: BLE001  (the future raises it in the test)
            (self._ended if self._started.done() else self._started).set_exception(error)
        else:
            self._ended.set_result(receipt)

    async def _serve(self, acquired: Resources) -> Receipt:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with Server.open(acquired, None, self._enter) as server:
            self._server = server
            self._started.set_result(None)
            await self._stop.wait()
        return await server.shutdown()

    def _enter(self, entry: Entry) -> None:
        with self._news:
            self._entries.append(entry)
            self._news.notify_all()


def _remove(folder: Path, process: int) -> None:
    """Remove a folder, unless a forked process calls this at its exit."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _certify(folder: Path, authority: Path) -> dict[str, Any]:
    """Create an authority, issue a certificate, and return the settings with the names of the files."""
    try:
        import trustme  # noqa: PLC0415  (an optional dependency)
    except ImportError as error:
        msg = "trustme is needed to issue a certificate: pip install 'echod[pytest]'"
        raise ImportError(msg) from error

    ca = trustme.CA()
    issued = ca.issue_cert(*_NAMES)
    ca.cert_pem.write_to_path(authority)
    certificate, private_key = folder / "certificate.pem", folder / "private_key.pem"
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(certificate, append=number > 0)
    issued.private_key_pem.write_to_path(private_key)
    return {"certificate": certificate, "private_key": private_key}
