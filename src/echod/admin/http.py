"""Answer HTTP requests for probes, metrics, status and the page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import logging
import re
from importlib import resources
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import GC_COLLECTOR, PROCESS_COLLECTOR
from prometheus_client.core import CounterMetricFamily

from echod import threads
from echod.admin.connections import Connections
from echod.admin.histograms import Histograms
from echod.admin.history import History
from echod.admin.hosts import HostCheck
from echod.admin.limits import DEFAULT_LIMITS
from echod.admin.metrics import Families, render
from echod.admin.sharing import Shared
from echod.admin.status import Reporter
from echod.net import addresses
from echod.server.listener_task import ListenerTask

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from prometheus_client.metrics_core import Metric
    from structlog.typing import FilteringBoundLogger

    from echod.admin.limits import AdminLimits
    from echod.admin.snapshot import DaemonView, Source
    from echod.net.addresses import Address
    from echod.net.listeners import Listener
    from echod.server.ledger import Entry

_ERRORS = {400: "this is not an HTTP request: use http://, without TLS\n"}

_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"

_JSON = {"Content-Type": "application/json"}

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Content-Type": "text/plain; charset=utf-8",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "echod",
    "X-Content-Type-Options": "nosniff",
}


class Admin:
    """The listener of `admin.address`. Create it before the loop runs, then `start` and `close` it inside the loop.

    Args:
        listener: the bound sockets, which this object owns.
        address: the address in the settings.
        limits: bounds on the cost to the echo.

    """

    def __init__(self, listener: Listener, address: Address, limits: AdminLimits = DEFAULT_LIMITS) -> None:
        self.listener = listener
        self.max_connections = limits.max_connections
        self._limits = limits
        bound = [addresses.from_sockaddr(listening.sock.getsockname()) for listening in listener.sockets]
        self._host_check = HostCheck(bound, address)
        self._histograms: dict[str, Histograms] = {}
        self._accept_pauses = 0
        self._page, self._page_headers = _read_page()
        self._routes = {
            "/": self._get_page,
            "/livez": self._get_livez,
            "/readyz": self._get_readyz,
            "/metrics": self._get_metrics,
            "/status": self._get_status,
            "/history": self._get_history,
        }

    def observer(self, name: str) -> Callable[[Entry], None]:
        """Return a function that the ledger of this listener calls with each closed connection."""
        self._histograms[name] = Histograms.empty()
        return self._histograms[name].observe

    def start(self, view: DaemonView, source: Source, log: Callable[[], FilteringBoundLogger]) -> None:
        """Start answering.

        Args:
            view: the state to report.
            source: the source of counts.
            log: returns the current logger.

        """
        self._loop = asyncio.get_running_loop()
        self._view = view
        self._log = log
        self._snapshot = source
        self._history = History(self._snapshot)
        self._reporter = Reporter(view, self._snapshot, self._history)
        self._metrics = Shared(self._render_metrics, self._limits)
        self._status = Shared(self._render_status, self._limits)
        self._series = Shared(self._render_series, self._limits)
        server = _Server(
            self._answer,
            access_log=None,
            keepalive_timeout=self._limits.patience,
            lingering_time=0,  # request bodies are ignored
            logger=_logger(),
            max_field_size=self._limits.max_head,
            max_line_size=self._limits.max_head,
            tcp_keepalive=False,
        )
        self._connections = Connections(server, self._limits)
        self._listener_task = ListenerTask(
            self.listener.sockets,
            self._connections.add,
            self._log_pause,
            self._log_end_of_pause,
            batch=1,
            interval=self._limits.accept_interval,
        )
        self._listener_task.set_backlog(self._limits.backlog)
        self._failed: asyncio.Future[BaseException] = self._loop.create_future()
        self._tasks = [self._loop.create_task(run()) for run in (self._listener_task.run, self._history.run)]
        for task in self._tasks:
            task.add_done_callback(self._note_failure)

    async def wait_failed(self) -> BaseException:
        """Wait until a task of the admin listener fails, which is a defect, and return its exception.

        New connections may wait in the backlog after that: close the admin listener.
        """
        return await asyncio.shield(self._failed)

    async def close(self) -> None:
        """Let unfinished answers finish for half a second, then close everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self._listener_task.close()
        await self._connections.close()

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not (task.cancelled() or self._failed.done()) and (error := task.exception()) is not None:
            self._failed.set_result(error)

    def _log_pause(self, cause: str) -> None:
        self._accept_pauses += 1
        self._log().warning("accept_paused", listener="admin", cause=cause, clients=len(self._connections))

    def _log_end_of_pause(self, seconds: float) -> None:
        self._log().info("accept_resumed", listener="admin", seconds=seconds, clients=len(self._connections))

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request. Write the whole answer before the connection handles the next request."""
        response = await self._respond(request)
        if request.body_exists or request.method not in {"GET", "HEAD"}:
            response.force_close()
        with contextlib.suppress(ConnectionError):
            await response.prepare(request)
            await response.write_eof()
        self._connections.answered(request.protocol)
        return response

    async def _respond(self, request: web.BaseRequest) -> web.Response:
        if request.method not in {"GET", "HEAD"}:
            return _response(405, "only GET and HEAD are answered here\n", {"Allow": "GET, HEAD"})
        if not self._host_check.allows_request(request.raw_path, request.headers.getall("Host", ())):
            return _response(421, "the host is not a name of this address: use an IP address, or localhost\n")
        route = self._routes.get(request.path)
        return await route() if route is not None else _response(404, f"not found: use {' '.join(self._routes)}\n")

    async def _get_livez(self) -> web.Response:
        return _response(200, "alive\n")

    async def _get_readyz(self) -> web.Response:
        return _response(503, "draining\n") if self._view.draining() else _response(200, "ready\n")

    async def _get_metrics(self) -> web.Response:
        return _response(200, await self._metrics.get(), {"Content-Type": _EXPOSITION})

    async def _get_status(self) -> web.Response:
        return _response(200, await self._status.get(), _JSON)

    async def _get_history(self) -> web.Response:
        return _response(200, await self._series.get(), _JSON)

    async def _get_page(self) -> web.Response:
        return _response(200, self._page, self._page_headers)

    async def _render_metrics(self) -> bytes:
        process: list[Metric] = []
        with contextlib.suppress(threads.ThreadError):  # the other metrics need no thread
            # This lists the descriptors of the process, which would block the loop if there are many.
            process = await threads.call(self._loop, lambda: list(PROCESS_COLLECTOR.collect()), "admin")
        loop_name = type(self._loop).__module__.partition(".")[0]
        counts = await self._snapshot.take()
        families = Families(self._view, counts, self._histograms, loop_name, self._snapshot.workers)
        parts: list[bytes] = []
        own = CounterMetricFamily(
            "echod_admin_accept_pauses",
            "Number of times that the admin listener paused accepting.",
            self._accept_pauses,
        )
        for family in itertools.chain(families, (own,), process, GC_COLLECTOR.collect()):
            parts.append(render(family))
            await asyncio.sleep(0)
        return b"".join(parts)

    async def _render_status(self) -> bytes:
        return json.dumps(await self._reporter.report(), indent=1).encode() + b"\n"

    async def _render_series(self) -> bytes:
        return json.dumps(self._history.series()).encode() + b"\n"


class _Server(web.Server):
    """aiohttp's server, with a `_Handler` for each connection."""

    def __call__(self) -> web.RequestHandler:
        """Create the protocol of a connection."""
        return _Handler(self, loop=self._loop, **self._kwargs)


class _Handler(web.RequestHandler):
    """aiohttp's protocol. Its error answers have the same headers as all others."""

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
        response = _response(status, _ERRORS.get(status, "unexpected failure: see the log\n"))
        response.force_close()
        return response


def _response(status: int, body: str | bytes, headers: Mapping[str, str] | None = None) -> web.Response:
    data = body.encode() if isinstance(body, str) else body
    return web.Response(status=status, body=data, headers={**_HEADERS, **(headers or {})})


def _read_page() -> tuple[bytes, dict[str, str]]:
    """Return the page, and headers that allow its own script and style only."""
    page = (resources.files("echod.admin") / "page.html").read_bytes()

    def digest(element: str) -> str:
        match = re.search(rf"<{element}>(.*?)</{element}>".encode(), page, re.DOTALL)
        assert match is not None
        return f"'sha256-{base64.b64encode(hashlib.sha256(match[1]).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}


def _logger() -> logging.Logger:
    """Return a logger without the errors of clients, which could fill the log."""
    logger = logging.getLogger("echod.admin")
    logger.addFilter(_is_own_error)
    return logger


def _is_own_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))
