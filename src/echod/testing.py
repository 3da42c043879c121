"""A server in a thread of its own, with a loop of its own, for tests: what the fixture `echod` of pytest gives."""

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
from typing import TYPE_CHECKING, Any, Literal

from echod import embed
from echod.embed import Server
from echod.loops import loop_factory
from echod.net.addresses import TcpAddress

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Unpack

    from echod.server.ledger import Entry
    from echod.server.receipt import Receipt

# A test that leaves a connection open does not wait long for its end: seconds.
SHUTDOWN = {"quiet_period": 0.05, "drain_timeout": 1.0, "linger_timeout": 0.2}

_HOST = "127.0.0.1"
_NAMES = ("localhost", _HOST, "::1")


class ThreadOptions(embed.CommonOptions, total=False):
    """The options of a `ServerThread`, and of the marker `echod`."""

    tls: bool | dict[str, Any]
    """True: with a certificate made on the spot; a table of the settings' keys: so too where it names no certificate."""
    loop: Literal["auto", "uvloop", "asyncio"]


class ServerThread:
    """A server on a free port of 127.0.0.1 that listens from the first moment on.

    Of `shutdown`, what is not given is shorter than it is for the daemon: a quiet period of 0.05 s, a drain of 1 s and
    a linger of 0.2 s.

    In a process that is forked from this one there is no such thread. Clients there may use `address` and
    `ssl_context`; what tells of the server, or stops it, raises RuntimeError.

    Args:
        options: those of `ThreadOptions`; docs/testing.md explains them.

    Raises:
        SettingsError: options are wrong; it names all of them.
        ImportError: a certificate is to be made, and trustme is not installed.

    """

    def __init__(self, **options: Unpack[ThreadOptions]) -> None:
        embed.check_names(options, ThreadOptions.__optional_keys__)
        loop = options.get("loop", "auto")
        embed.check_loop(loop)
        self._process = os.getpid()
        self._news = threading.Condition()
        self._entries: list[Entry] = []
        self._authority: Path | None = None
        self._started: Future[None] = Future()
        self._ended: Future[Receipt] = Future()
        with contextlib.ExitStack() as resources:
            given: dict[str, Any] = {name: value for name, value in options.items() if name not in {"loop", "tls"}}
            if isinstance(shutdown := given.get("shutdown", {}), dict):
                given["shutdown"] = SHUTDOWN | shutdown
            tls = options.get("tls", False)
            if tls is True or (isinstance(tls, dict) and not tls.keys() & {"certificate", "private_key"}):
                folder = Path(tempfile.mkdtemp(prefix="echod-"))
                resources.callback(weakref.finalize(self, _remove, folder, self._process))
                self._authority = folder / "authority.pem"
                given["tls"] = _certify(folder, self._authority) | ({} if tls is True else tls)
            elif tls is not False:
                given["tls"] = tls
            self._thread = threading.Thread(
                target=self._work, args=(loop_factory(loop), given), name="echod", daemon=True
            )
            self._thread.start()
            self._started.result()
            self._resources = resources.pop_all()

    # What a test looks at

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens, as `socket.create_connection` takes it."""
        (address,) = self._server.addresses
        assert isinstance(address, TcpAddress)
        return address.host, address.port

    @property
    def clients(self) -> int:
        """The number of clients that are connected now."""
        self._check_process()
        return self._server.clients

    @property
    def connections(self) -> list[Entry]:
        """The ledger so far: an entry for each connection that has been closed, in the order of their ends."""
        self._check_process()
        with self._news:
            return self._entries.copy()

    def wait_for_connections(self, count: int, timeout: float = 10.0) -> list[Entry]:
        """Wait until so many connections have been closed, and return all entries there are then.

        Args:
            count: how many, from the start on.
            timeout: seconds.

        Raises:
            TimeoutError: there were not so many in time; it tells which there were.

        """
        self._check_process()
        with self._news:
            if self._news.wait_for(lambda: len(self._entries) >= count, timeout):
                return self._entries.copy()
            closed = ", ".join(f"{entry.peer} ({entry.reason})" for entry in self._entries) or "none"
            msg = f"not {count} connections closed in {timeout} s, but: {closed}; still connected: {self.clients}"
            raise TimeoutError(msg)

    @property
    def certificate_authority(self) -> Path:
        """The file, PEM, with the authority of the certificate that was made on the spot; there until `stop`.

        Raises:
            RuntimeError: none was made.

        """
        if self._authority is None:
            msg = "no certificate was made on the spot: that takes @pytest.mark.echod(tls=True)"
            raise RuntimeError(msg)
        return self._authority

    def ssl_context(self) -> ssl.SSLContext:
        """Return a context for clients that trusts the certificate made on the spot, for localhost and 127.0.0.1.

        Raises:
            RuntimeError: none was made.

        """
        return ssl.create_default_context(cafile=self.certificate_authority)

    def stop(self) -> Receipt:
        """Stop gracefully, wait for the end, and tell what became of the clients. Idempotent.

        Raises:
            RuntimeError: this is a forked process. The server runs on in the other one.

        """
        self._check_process()
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._resources.close()
        return self._ended.result()

    def _check_process(self) -> None:
        # A lock that the thread held at the fork is never released in the child, and the thread never ends there.
        if os.getpid() != self._process:
            msg = (
                f"the server runs in process {self._process}, from which this one was forked: ask or stop it there, and "
                "end a forked client with os._exit"
            )
            raise RuntimeError(msg)

    # The thread

    def _work(self, factory: Callable[[], asyncio.AbstractEventLoop], options: dict[str, Any]) -> None:
        try:
            with asyncio.Runner(loop_factory=factory) as runner:
                receipt = runner.run(self._serve(options))
        except BaseException as error:  # noqa: BLE001  (raised to whoever waits for the start or the end)
            (self._ended if self._started.done() else self._started).set_exception(error)
        else:
            self._ended.set_result(receipt)

    async def _serve(self, options: dict[str, Any]) -> Receipt:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with Server.listen(f"{_HOST}:0", observe=self._enter, **options) as server:
            self._server = server
            self._started.set_result(None)
            await self._stop.wait()
        return await server.shutdown()

    def _enter(self, entry: Entry) -> None:
        with self._news:
            self._entries.append(entry)
            self._news.notify_all()


def _remove(folder: Path, process: int) -> None:
    """Remove a folder at the latest when the process ends, but not when one that was forked from it does."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _certify(folder: Path, authority: Path) -> dict[str, Any]:
    """Make an authority and a certificate of it, and return the settings that name the files."""
    try:
        import trustme  # noqa: PLC0415  (an optional dependency)
    except ImportError as error:
        msg = "a certificate made on the spot takes trustme, which is not installed: pip install 'echod[pytest]'"
        raise ImportError(msg) from error

    ca = trustme.CA()
    issued = ca.issue_cert(*_NAMES)
    ca.cert_pem.write_to_path(authority)
    certificate, private_key = folder / "certificate.pem", folder / "private_key.pem"
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(certificate, append=number > 0)
    issued.private_key_pem.write_to_path(private_key)
    return {"certificate": certificate, "private_key": private_key}
