"""Build the metrics from the counters, without I/O."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

import echod
from echod.admin.snapshot import STATES
from echod.connection.outcome import Reason
from echod.datagram.flows import Reason as FlowReason
from echod.datagram.guards import Cause
from echod.datagram.ledger import DropCause
from echod.net.certificates import Role

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from prometheus_client.metrics_core import Metric

    from echod.admin.histograms import Histograms
    from echod.admin.snapshot import Count, DaemonView, WorkerState
    from echod.datagram.ledger import Counters as FlowCounters


class Families:
    """Yield all metrics of echod.

    Args:
        view: the state of the daemon.
        counts: of a snapshot, by listener name.
        histograms: by listener name, if the counts have none.
        loop: the name of the event loop.
        workers: the workers, if there are several.

    """

    def __init__(
        self,
        view: DaemonView,
        counts: Mapping[str, Count],
        histograms: Mapping[str, Histograms],
        loop: str,
        workers: Sequence[WorkerState],
    ) -> None:
        self._workers = workers
        self._view = view
        self._counts = counts
        self._histograms = histograms
        self._loop = loop

    def __iter__(self) -> Iterator[Metric]:
        yield from self._listeners()
        yield from self._connections()
        yield from self._datagrams()
        yield from self._process()
        if self._workers:
            clients = GaugeMetricFamily("echod_worker_clients", "Connected clients, by worker.", labels=("worker",))
            for worker in self._workers:
                clients.add_metric((str(worker.worker),), worker.clients)
            yield clients

    def _listeners(self) -> Iterator[Metric]:
        counts, servers = self._counts, self._view.servers
        yield self._counter(
            "connections",
            "Connections accepted and served, or refused with a reason.",
            lambda count: count.counters.accepted,
        )
        yield self._counter(
            "connections_empty",
            "Connections closed without a byte from the client.",
            lambda count: count.counters.empty,
        )
        closed = CounterMetricFamily(
            "echod_connections_closed", "Connections closed, by reason.", labels=("listener", "reason")
        )
        active = GaugeMetricFamily(
            "echod_connections_active", "Connected clients, by state.", labels=("listener", "state")
        )
        for name, count in counts.items():
            for reason in get_args(Reason):
                closed.add_metric((name, reason), count.counters.reasons[reason])
            for state in STATES:
                active.add_metric((name, state), count.states[state])
        yield closed
        yield active
        limit = GaugeMetricFamily("echod_connections_limit", "Clients at which accepting stops.", labels=("listener",))
        paused = GaugeMetricFamily(
            "echod_accept_paused", "1 while clients have to wait in the backlog, otherwise 0.", labels=("listener",)
        )
        for name in counts:
            limit.add_metric((name,), servers[name].settings.limits.max_connections)
            paused.add_metric((name,), servers[name].accept_paused)
        yield limit
        yield paused
        yield self._counter(
            "accept_pauses",
            "Number of times that accepting paused, or that the cause of a pause changed.",
            lambda count: count.counters.accept_pauses,
        )
        yield self._counter(
            "accept_failures",
            "Connections accepted and closed at once, because of a failure.",
            lambda count: count.counters.accept_failures,
        )
        yield from self._certificates()

    def _certificates(self) -> Iterator[Metric]:
        labels = ("listener", "certificate")
        expiry = GaugeMetricFamily(
            "echod_tls_certificate_expiry_timestamp_seconds",
            "When the first certificate of its kind expires, in seconds since the epoch.",
            labels=labels,
        )
        start = GaugeMetricFamily(
            "echod_tls_certificate_not_before_timestamp_seconds",
            "When the last certificate of its kind becomes valid, in seconds since the epoch.",
            labels=labels,
        )
        certificates = self._view.resources().tls
        for name in filter(certificates.__contains__, self._counts):
            for role in get_args(Role):
                alike = [used.certificate for used in certificates[name].certificates if used.role == role]
                if alike:
                    expiry.add_metric((name, role), min(each.not_after for each in alike).timestamp())
                    start.add_metric((name, role), max(each.not_before for each in alike).timestamp())
        yield expiry
        yield start

    def _connections(self) -> Iterator[Metric]:
        yield self._counter("received_bytes", "Bytes received that are to be echoed.", lambda count: count.received)
        yield self._counter(
            "sent_bytes", "Bytes of echo that the kernel has taken for sending.", lambda count: count.sent
        )
        yield self._counter(
            "acked_bytes",
            "Bytes of echo that the clients' kernels have acknowledged, counted when a connection closes.",
            lambda count: count.counters.acked,
        )
        yield self._counter(
            "unsent_bytes",
            "Bytes received that the kernel never took for sending, counted when a connection closes.",
            lambda count: count.counters.unsent,
        )
        yield self._counter(
            "unacked_bytes",
            "Bytes of echo sent but not acknowledged when the connection closed.",
            lambda count: count.counters.unacked,
        )
        yield self._counter(
            "discarded_bytes",
            "Bytes received that are not echoed, mostly after our FIN, counted when a connection closes.",
            lambda count: count.counters.discarded,
        )
        durations = HistogramMetricFamily(
            "echod_connection_duration_seconds", "Durations of closed connections.", labels=("listener",)
        )
        round_trips = HistogramMetricFamily(
            "echod_connection_rtt_seconds",
            "Smoothed round trips of closed connections, as the kernel measured them.",
            labels=("listener",),
        )
        for name in self._counts:
            histograms = self._counts[name].histograms or self._histograms[name]
            durations.add_metric((name,), histograms.durations.buckets, histograms.durations.sum)
            round_trips.add_metric((name,), histograms.round_trips.buckets, histograms.round_trips.sum)
        yield durations
        yield round_trips

    def _datagrams(self) -> Iterator[Metric]:
        servers = self._view.udp_servers
        counters = {name: server.counters() for name, server in servers.items()}

        def total(name: str, text: str, value: Callable[[FlowCounters], int]) -> Metric:
            family = CounterMetricFamily(f"echod_{name}", text, labels=("listener",))
            for listener, one in counters.items():
                family.add_metric((listener,), value(one))
            return family

        yield total("flows", "Flows that have begun.", lambda one: one.flows)
        yield total(
            "datagrams_received", "Datagrams received that are to be echoed.", lambda one: one.received_datagrams
        )
        yield total("datagrams_sent", "Received datagrams that were answered.", lambda one: one.sent_datagrams)
        yield total("datagram_received_bytes", "Payload of the received datagrams.", lambda one: one.received)
        yield total("datagram_sent_bytes", "Payload of the answers.", lambda one: one.sent)
        yield total(
            "datagram_receive_errors", "Failures of the system call that receives.", lambda one: one.receive_errors
        )
        refused = CounterMetricFamily(
            "echod_datagrams_refused", "Datagrams refused by a guard, by cause.", labels=("listener", "cause")
        )
        dropped = CounterMetricFamily(
            "echod_datagrams_dropped", "Received datagrams without an answer, by cause.", labels=("listener", "cause")
        )
        ended = CounterMetricFamily("echod_flows_closed", "Flows ended, by reason.", labels=("listener", "reason"))
        kernel = CounterMetricFamily(
            "echod_datagrams_kernel_dropped",
            "Datagrams that the kernel dropped before echod read them, mostly because the receive buffer was full.",
            labels=("listener",),
        )
        active = GaugeMetricFamily("echod_flows_active", "Flows that have not ended.", labels=("listener",))
        for name, one in counters.items():
            for family, literal, counts in (
                (refused, Cause, one.refused),
                (dropped, DropCause, one.dropped),
                (ended, FlowReason, one.reasons),
            ):
                for value in get_args(literal):
                    family.add_metric((name, value), counts[value])
            kernel.add_metric((name,), servers[name].kernel_drops())
            active.add_metric((name,), servers[name].flows)
        yield from (refused, dropped, ended, kernel, active)

    def _process(self) -> Iterator[Metric]:
        view = self._view
        build = GaugeMetricFamily(
            "echod_build_info", "Always 1. The labels describe the process.", labels=("version", "python", "loop")
        )
        build.add_metric((echod.__version__, platform.python_version(), self._loop), 1)
        yield build
        yield GaugeMetricFamily(
            "echod_draining", "1 from the first stop signal on, otherwise 0.", value=view.draining()
        )
        reloads = CounterMetricFamily("echod_reloads", "Reloads of the settings, by result.", labels=("result",))
        for result in ("success", "failure"):
            reloads.add_metric((result,), view.reloads[result])
        yield reloads
        yield CounterMetricFamily(
            "echod_log_lines_dropped",
            "Log lines dropped because they could not be written, or not fast enough.",
            value=view.log_lines_dropped(),
        )

    def _counter(self, name: str, text: str, value: Callable[[Count], int]) -> Metric:
        family = CounterMetricFamily(f"echod_{name}", text, labels=("listener",))
        for listener, count in self._counts.items():
            family.add_metric((listener,), value(count))
        return family


class _Single(Collector):
    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


def render(family: Metric) -> bytes:
    """Return one metric in the text format of Prometheus, version 0.0.4."""
    return generate_latest(_Single(family))
