"""HTTP for whoever watches the daemon: probes, metrics, status, and a page. It can cost the echo only little.

aiohttp parses and answers; this module decides what reaches it. Whatever clients do, there are so many connections, each
holds so many bytes for so many seconds, so many requests a second are answered, and a look at all clients takes a tenth of
the time at most. Who goes beyond waits, or is closed; the echo does neither.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import functools
import hashlib
import ipaddress
import itertools
import json
import logging
import re
from importlib import resources
from typing import TYPE_CHECKING, Final, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import GC_COLLECTOR, PROCESS_COLLECTOR
from prometheus_client.core import CounterMetricFamily

from echod import threads
from echod.admin.metrics import Families, Histograms, render
from echod.admin.status import Reporter, Snapshot
from echod.net import addresses, kernel

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Mapping

    from prometheus_client.metrics_core import Metric
    from structlog.typing import FilteringBoundLogger

    from echod.admin.status import DaemonView
    from echod.net.addresses import Address
    from echod.net.listeners import Listener
    from echod.server.ledger import Entry

# Seconds that a connection may take for a request's head, and from there on for its answer and the next head.
_PATIENCE = 15.0

# A request's head, and what may wait behind it, bytes.
_LARGEST_HEAD = 16 * 1024

# The lines of a head: RFC 9112, 3 and 5. A line that is not complete can only become one of them if it begins so. HTTP/2
# has a request line in its preface, and its client waits for frames then.
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(_TOKEN + rb" [^\x00-\x20\x7f]+ HTTP/1\.\d")
_FIELD_LINE = re.compile(_TOKEN + rb":[^\x00-\x08\x0a-\x1f\x7f]*")
_BEGINNING = re.compile(rb"(?:" + _TOKEN + rb"(?:[ :][^\x00-\x08\x0a-\x1f\x7f]*)?)?\r?")

# Passed on in place of bytes that cannot become a head, so that aiohttp answers 400 and closes.
_MALFORMED = b"\x00\r\n\r\n"

# Seconds from one accepted connection, and from one request, to the next.
_ACCEPT_EVERY = 0.01
_ANSWER_EVERY = 0.005

# The pause after a failed accept or registration: doubling, seconds.
_FIRST_PAUSE = 0.005
_LAST_PAUSE = 1.0

# A look at all clients is followed by so many times its duration without one, but for no longer than this many seconds.
_REST = 9
_LONGEST_REST = 1.0

# Connections that the kernel may hold ready.
_BACKLOG = 64

# Seconds that answers under way get at the end.
_FAREWELL = 0.5

_ERRORS = {400: "this is not an HTTP request: use http://, without TLS\n"}

_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "echod",
    "X-Content-Type-Options": "nosniff",
}


class Admin:
    """The listener of `admin.address`.

    Made before the loop runs, `start`ed in it, and `close`d in it.

    Args:
        listener: with the bound sockets, which are this object's from now on.
        address: what was asked for.

    """

    max_connections: Final = 32
    """At this many, a new one takes the place of that which has asked for nothing for the longest time."""

    def __init__(self, listener: Listener, address: Address) -> None:
        self.listener = listener
        self._hosts = _Hosts(listener, address)
        self._histograms: dict[str, Histograms] = {}
        self._page, self._page_headers = _read_page()
        self._answers = {
            "/": self._get_page,
            "/livez": self._get_livez,
            "/readyz": self._get_readyz,
            "/metrics": self._get_metrics,
            "/status": self._get_status,
        }
        self._connections: dict[web.RequestHandler, _Connection] = {}
        self._joining: set[asyncio.Task[None]] = set()
        self._all_lost = asyncio.Event()
        self._next_answer = 0.0
        self._pause = _FIRST_PAUSE
        self._paused_since: float | None = None
        self._accept_pauses = 0

    def observer(self, name: str) -> Callable[[Entry], None]:
        """Return what a listener's ledger is to call for each connection."""
        self._histograms[name] = Histograms.empty()
        return self._histograms[name].observe

    def start(self, subject: DaemonView, log: Callable[[], FilteringBoundLogger]) -> None:
        """Begin to answer.

        Args:
            subject: what is reported on.
            log: returns the logger in force.

        """
        self._loop = asyncio.get_running_loop()
        self._loop_name = type(self._loop).__module__.partition(".")[0]
        self._subject = subject
        self._log = log
        self._snapshot = Snapshot(subject)
        self._reporter = Reporter(subject, self._snapshot)
        self._metrics = _Shared(self._render_metrics)
        self._status = _Shared(self._render_status)
        self._http = _Http(
            self._answer,
            access_log=None,
            keepalive_timeout=_PATIENCE,
            lingering_time=0,  # a body is of no use here
            logger=_logger(),
            max_field_size=_LARGEST_HEAD,
            max_line_size=_LARGEST_HEAD,
            tcp_keepalive=False,
        )
        for listening in self.listener.sockets:
            listening.sock.listen(_BACKLOG)
        self._next_accept = self._loop.call_later(0, self._listen)

    async def close(self) -> None:
        """Let answers under way finish, for half a second and a bit, and close everything."""
        self._unlisten()
        self._next_accept.cancel()
        for listening in self.listener.sockets:
            listening.close()
        await asyncio.gather(*self._joining)
        self._http.pre_shutdown()
        await self._http.shutdown(_FAREWELL)
        while self._connections:
            self._all_lost.clear()
            for connection in self._connections.values():
                connection.abort()
            await self._all_lost.wait()

    # Connections

    def _listen(self) -> None:
        try:
            for listening in self.listener.sockets:
                self._loop.add_reader(listening.sock, self._accept, listening.sock)
        except OSError as error:
            self._hold(error)
        else:
            self._unhold()

    def _hold(self, error: OSError) -> None:
        """Accept nothing for a while. Clients wait in the backlog."""
        self._unlisten()
        self._next_accept.cancel()
        self._next_accept = self._loop.call_later(self._pause, self._listen)
        self._pause = min(2 * self._pause, _LAST_PAUSE)
        if self._paused_since is None:
            self._paused_since = self._loop.time()
            self._accept_pauses += 1
            cause = errno.errorcode.get(error.errno or 0, str(error))
            self._log().warning("accept_paused", listener="admin", cause=cause, clients=len(self._connections))

    def _unhold(self) -> None:
        """Note that accepting goes on, once no client waits any more."""
        waiting = (kernel.waiting_connections(listening.sock) for listening in self.listener.sockets)
        if self._paused_since is not None and not any(waiting):
            seconds = round(self._loop.time() - self._paused_since, 3)
            self._paused_since = None
            self._pause = _FIRST_PAUSE
            self._log().info("accept_resumed", listener="admin", seconds=seconds, clients=len(self._connections))

    def _unlisten(self) -> None:
        for listening in self.listener.sockets:
            self._loop.remove_reader(listening.sock)

    def _accept(self, sock: socket.socket) -> None:
        self._unlisten()
        self._next_accept = self._loop.call_later(_ACCEPT_EVERY, self._listen)
        try:
            connection, _ = sock.accept()
        except (BlockingIOError, ConnectionAbortedError):  # gone again
            return
        except OSError as error:  # no descriptor for it, or no memory
            self._hold(error)
            return
        connection.setblocking(False)  # noqa: FBT003  (its only parameter)
        if len(self._connections) >= self.max_connections:
            next(iter(self._connections.values())).abort()
        task = self._loop.create_task(self._join(connection))
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)

    async def _join(self, sock: socket.socket) -> None:
        http = self._http()
        connection = _Connection(http, self._turn, functools.partial(self._lost, http))
        self._connections[http] = connection
        try:
            await self._loop.connect_accepted_socket(lambda: connection, sock)
        except OSError:  # reset already, where the kernel tells so here
            sock.close()
            self._lost(http)

    def _lost(self, http: web.RequestHandler) -> None:
        del self._connections[http]
        if not self._connections:
            self._all_lost.set()

    def _turn(self, http: web.RequestHandler) -> float:
        """Return how many seconds a request that has come has to wait for its turn, and note that it came."""
        self._connections[http] = self._connections.pop(http)
        now = self._loop.time()
        turn = max(now, self._next_answer)
        self._next_answer = turn + _ANSWER_EVERY
        return turn - now

    # Answers

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer, the answer written out before the connection may ask for more."""
        response = await self._respond(request)
        if request.body_exists or request.method not in {"GET", "HEAD"}:
            response.force_close()
        with contextlib.suppress(ConnectionError):
            await response.prepare(request)
            await response.write_eof()
        if connection := self._connections.get(request.protocol):
            connection.answered()
        return response

    async def _respond(self, request: web.BaseRequest) -> web.Response:
        if request.method not in {"GET", "HEAD"}:
            return _response(405, "only GET and HEAD are answered here\n", {"Allow": "GET, HEAD"})
        if not all(map(self._hosts.accept, request.headers.getall("Host", ()))):
            return _response(421, "this address is not known by that name: use an IP address, or localhost\n")
        answer = self._answers.get(request.path)
        return await answer() if answer is not None else _response(404, f"there are: {' '.join(self._answers)}\n")

    async def _get_livez(self) -> web.Response:
        return _response(200, "alive\n")

    async def _get_readyz(self) -> web.Response:
        return _response(503, "draining\n") if self._subject.draining() else _response(200, "ready\n")

    async def _get_metrics(self) -> web.Response:
        return _response(200, await self._metrics.get(), {"Content-Type": _EXPOSITION})

    async def _get_status(self) -> web.Response:
        return _response(200, await self._status.get(), {"Content-Type": "application/json"})

    async def _get_page(self) -> web.Response:
        return _response(200, self._page, self._page_headers)

    async def _render_metrics(self) -> bytes:
        process: list[Metric] = []
        with contextlib.suppress(threads.ThreadError):  # the other metrics need no thread
            # It lists the process's descriptors, which takes a while if there are many.
            process = await threads.call(self._loop, lambda: list(PROCESS_COLLECTOR.collect()), "admin")
        families = Families(self._subject, await self._snapshot.take(), self._histograms, self._loop_name)
        parts: list[bytes] = []
        own = CounterMetricFamily(
            "echod_admin_accept_pauses", "Times that the admin listener stopped accepting.", self._accept_pauses
        )
        for family in itertools.chain(families, (own,), process, GC_COLLECTOR.collect()):
            parts.append(render(family))
            await asyncio.sleep(0)
        return b"".join(parts)

    async def _render_status(self) -> bytes:
        return json.dumps(await self._reporter.report(), indent=1).encode() + b"\n"


class _Http(web.Server):
    """aiohttp's server, with a `_Handler` for each connection."""

    def __call__(self) -> web.RequestHandler:
        """Create the protocol of a connection."""
        return _Handler(self, loop=self._loop, **self._kwargs)


class _Handler(web.RequestHandler):
    """aiohttp's protocol, whose answers to errors have the headers of all others."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Log an error and answer it."""
        super().handle_error(request, status, exc, message)
        response = _response(status, _ERRORS.get(status, "an unexpected failure: the log has it\n"))
        response.force_close()
        return response


class _Connection(asyncio.Protocol):
    """A connection, between its transport and aiohttp's protocol: one request at a time, and each in time.

    Args:
        http: aiohttp's protocol.
        turn: tells how many seconds a request has to wait.
        lost: called at the end.

    """

    def __init__(
        self,
        http: web.RequestHandler,
        turn: Callable[[web.RequestHandler], float],
        lost: Callable[[], None],
    ) -> None:
        self._http = http
        self._turn = turn
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._input = bytearray()
        self._head: list[bytes] = []
        self._line = 0
        self._busy = False
        self._full = False
        self._eof = False
        self._gone = False
        self._expiry = self._loop.call_later(_PATIENCE, self.abort)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a request."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by inheritance
        self._http.connection_made(transport)
        # Asked for while there is a socket, and kept: uvloop fails for a request that was passed on just before a reset.
        _ = self._http.peername

    def data_received(self, data: bytes) -> None:
        """Take in what belongs to a head; who sends more than a large one, or more behind one, is no client of ours."""
        self._input += data
        if len(self._input) > _LARGEST_HEAD:
            self.abort()
        else:
            self._go_on()

    def eof_received(self) -> bool:
        """Answer who has asked and then closed its own direction."""
        self._eof = True
        return self._busy

    def pause_writing(self) -> None:
        """Take no more requests from who does not read the answers."""
        self._full = True
        self._http.pause_writing()

    def resume_writing(self) -> None:
        """Go on."""
        self._full = False
        self._http.resume_writing()
        self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass on the end."""
        self._expiry.cancel()
        self._gone = True
        # Not now: a request that was passed on just before makes aiohttp fail if it finds the connection gone already.
        self._loop.call_soon(self._end, exc)

    def answered(self) -> None:
        """Be told that the answer to the request was written."""
        self._busy = False
        self._go_on()

    def abort(self) -> None:
        """Close now. Idempotent."""
        if self._transport is not None:
            self._transport.abort()

    def _pass_on(self, head: bytes) -> None:
        if not self._gone:
            self._http.data_received(head)

    def _end(self, exc: Exception | None) -> None:
        self._http.connection_lost(exc)
        self._lost()

    def _go_on(self) -> None:
        if self._busy or self._full:
            return
        if (head := self._next_head()) is not None:
            self._busy = True
            self._expiry.cancel()
            self._expiry = self._loop.call_later(_PATIENCE, self.abort)
            if delay := self._turn(self._http):
                self._loop.call_later(delay, self._pass_on, head)
            else:
                self._pass_on(head)
        elif self._eof and self._transport is not None:
            self._transport.close()

    def _next_head(self) -> bytes | None:
        """Take the next head out of the input, or return None as long as more of it has to come.

        As RFC 9112, 2.2 has it, a line may end in LF alone, and empty lines in front of a request are skipped.
        """
        while (end := self._input.find(b"\n", self._line)) >= 0:
            line = bytes(self._input[self._line : end]).removesuffix(b"\r")
            self._line = end + 1
            if line:
                if not (_FIELD_LINE if self._head else _REQUEST_LINE).fullmatch(line):
                    return _MALFORMED
                self._head.append(line)
            elif self._head:
                head = b"\r\n".join((*self._head, b"", b""))
                del self._input[: self._line]
                self._line = 0
                self._head.clear()
                return head
        return None if _BEGINNING.fullmatch(self._input, self._line) else _MALFORMED


class _Shared:
    """Something that costs the loop time, made once for all who wait for it, and not too often.

    Args:
        make: makes it.

    """

    def __init__(self, make: Callable[[], Awaitable[bytes]]) -> None:
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._one_at_a_time = asyncio.Lock()
        self._next: asyncio.Task[bytes] | None = None
        self._rested = 0.0

    async def get(self) -> bytes:
        """Return one whose making has begun after this call."""
        if self._next is None:
            self._next = self._loop.create_task(self._work())
        return await asyncio.shield(self._next)

    async def _work(self) -> bytes:
        async with self._one_at_a_time:
            await asyncio.sleep(max(0.0, self._rested - self._loop.time()))
            self._next = None  # who comes from here on waits for the next one
            began = self._loop.time()
            try:
                return await self._make()
            finally:
                ended = self._loop.time()
                self._rested = ended + min(_REST * (ended - began), _LONGEST_REST)


class _Hosts:
    """The names under which an address may be asked for.

    A page from elsewhere whose name is made to lead to 127.0.0.1 (DNS rebinding) could read all of this in the browser of
    whoever works on this machine. That name then is in the header Host. On other addresses any name is right: which
    ones lead here is not known, and who is in that network can ask without a browser.
    """

    def __init__(self, listener: Listener, address: Address) -> None:
        names = [addresses.from_sockaddr(listening.sock.getsockname()) for listening in listener.sockets]
        hosts = [name.host for name in names if isinstance(name, addresses.TcpAddress)]
        self._checked = bool(hosts) and all(ipaddress.ip_address(host).is_loopback for host in hosts)
        self._configured = address.host if isinstance(address, addresses.TcpAddress) else ""

    def accept(self, host: str) -> bool:
        """Tell whether a header Host is one that a client of this address would send."""
        if not self._checked:
            return True
        found = re.fullmatch(r"\[([^\]]*)\](?::\d*)?|([^:]*)(?::\d*)?", host)
        if found is None:
            return False
        name = (found[1] or found[2] or "").lower().removesuffix(".")
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in {"localhost", self._configured} or name.endswith(".localhost")
        return True


def _response(status: int, body: str | bytes, headers: Mapping[str, str] | None = None) -> web.Response:
    content = {"Content-Type": "text/plain; charset=utf-8"}
    data = body.encode() if isinstance(body, str) else body
    return web.Response(status=status, body=data, headers={**_HEADERS, **content, **(headers or {})})


def _read_page() -> tuple[bytes, dict[str, str]]:
    """Return the page, and headers that let it run what it holds and nothing else."""
    page = (resources.files("echod.admin") / "page.html").read_bytes()

    def digest(element: str) -> str:
        found = re.search(rf"<{element}>(.*?)</{element}>".encode(), page, re.DOTALL)
        assert found is not None
        return f"'sha256-{base64.b64encode(hashlib.sha256(found[1]).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}


def _logger() -> logging.Logger:
    """Return a logger that passes over what clients do wrong: they could fill the log with it."""
    logger = logging.getLogger("echod.admin")
    logger.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError)))
    return logger
