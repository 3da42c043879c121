"""The metrics: what they are called, and how they come from the counters. Nothing here does any I/O of its own."""

from __future__ import annotations

import platform
from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

import echod
from echod.admin.snapshot import STATES
from echod.connection.echo import Reason
from echod.net.certificates import Role

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from prometheus_client.metrics_core import Metric

    from echod.admin.snapshot import Count, DaemonView
    from echod.server.ledger import Entry

# Upper bounds in seconds. The ledger's times are rounded to a millisecond.
_DURATIONS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 43200.0)
_ROUND_TRIPS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Distribution:
    """Values counted by the bounds that they lie within.

    Args:
        bounds: upper ones, inclusive, ascending; a last one at infinity is added.

    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def sum(self) -> float:
        """All values together."""
        return self._sum

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """How many values lie within each bound, those within lower ones included."""
        return list(zip((*map(repr, self._bounds), "+Inf"), accumulate(self._counts), strict=True))


class Histograms(NamedTuple):
    """One listener's closed connections: how long they lasted, and how far away their clients were."""

    durations: Distribution
    round_trips: Distribution

    @classmethod
    def empty(cls) -> Histograms:
        """Return those of a listener that has had no connection yet."""
        return cls(Distribution(_DURATIONS), Distribution(_ROUND_TRIPS))

    def observe(self, entry: Entry) -> None:
        """Take in a connection that was closed."""
        self.durations.add(entry.seconds)
        if entry.rtt_ms is not None:
            self.round_trips.add(entry.rtt_ms / 1000)


class Families:
    """All of echod's own metrics at one moment.

    Args:
        subject: the process.
        counts: of a census.
        histograms: by the listeners' names, as the counts are.
        loop: the event loop's name.

    """

    def __init__(
        self, subject: DaemonView, counts: Mapping[str, Count], histograms: Mapping[str, Histograms], loop: str
    ) -> None:
        self._subject = subject
        self._counts = counts
        self._histograms = histograms
        self._loop = loop

    def __iter__(self) -> Iterator[Metric]:
        yield from self._of_the_listeners()
        yield from self._of_the_connections()
        yield from self._of_the_process()

    def _of_the_listeners(self) -> Iterator[Metric]:
        counts, servers = self._counts, self._subject.servers
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
            "echod_connections_closed", "Connections closed, by why.", labels=("listener", "reason")
        )
        active = GaugeMetricFamily(
            "echod_connections_active", "Connected clients, by what they are at.", labels=("listener", "state")
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
            "echod_accept_paused", "1 while clients have to wait in the backlog, else 0.", labels=("listener",)
        )
        for name in counts:
            limit.add_metric((name,), servers[name].settings.limits.max_connections)
            paused.add_metric((name,), servers[name].accept_paused)
        yield limit
        yield paused
        yield self._counter(
            "accept_pauses",
            "Times that accepting stopped while clients waited, or got another cause for that.",
            lambda count: count.counters.accept_pauses,
        )
        yield self._counter(
            "accept_failures",
            "Connections accepted and closed at once by a failure.",
            lambda count: count.counters.accept_failures,
        )
        yield from self._of_the_certificates()

    def _of_the_certificates(self) -> Iterator[Metric]:
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
        certificates = self._subject.resources().tls
        for name in filter(certificates.__contains__, self._counts):
            for role in get_args(Role):
                alike = [used.certificate for used in certificates[name].certificates if used.role == role]
                if alike:
                    expiry.add_metric((name, role), min(each.not_after for each in alike).timestamp())
                    start.add_metric((name, role), max(each.not_before for each in alike).timestamp())
        yield expiry
        yield start

    def _of_the_connections(self) -> Iterator[Metric]:
        yield self._counter("received_bytes", "Bytes received to be echoed.", lambda count: count.received)
        yield self._counter("sent_bytes", "Bytes of echo taken by the kernel for sending.", lambda count: count.sent)
        yield self._counter(
            "acked_bytes",
            "Bytes of echo acknowledged by the clients' kernels, counted when a connection closes.",
            lambda count: count.counters.acked,
        )
        yield self._counter(
            "unsent_bytes",
            "Bytes received and never taken by the kernel for sending, counted when a connection closes.",
            lambda count: count.counters.unsent,
        )
        yield self._counter(
            "unacked_bytes",
            "Bytes of echo sent and not acknowledged when the connection closed.",
            lambda count: count.counters.unacked,
        )
        yield self._counter(
            "discarded_bytes",
            "Bytes received and not to be echoed, after our FIN for the most part, counted when a connection closes.",
            lambda count: count.counters.discarded,
        )
        durations = HistogramMetricFamily(
            "echod_connection_duration_seconds", "How long closed connections lasted.", labels=("listener",)
        )
        round_trips = HistogramMetricFamily(
            "echod_connection_rtt_seconds",
            "The kernel's smoothed round trip of each connection when it closed.",
            labels=("listener",),
        )
        for name in self._counts:
            histograms = self._histograms[name]
            durations.add_metric((name,), histograms.durations.buckets, histograms.durations.sum)
            round_trips.add_metric((name,), histograms.round_trips.buckets, histograms.round_trips.sum)
        yield durations
        yield round_trips

    def _of_the_process(self) -> Iterator[Metric]:
        subject = self._subject
        build = GaugeMetricFamily(
            "echod_build_info", "Always 1; the labels say what runs.", labels=("version", "python", "loop")
        )
        build.add_metric((echod.__version__, platform.python_version(), self._loop), 1)
        yield build
        yield GaugeMetricFamily("echod_draining", "1 from the first signal on, else 0.", value=subject.draining())
        reloads = CounterMetricFamily("echod_reloads", "Times that the settings were read again.", labels=("result",))
        for result in ("success", "failure"):
            reloads.add_metric((result,), subject.reloads[result])
        yield reloads
        yield CounterMetricFamily(
            "echod_log_lines_dropped",
            "Lines of the log that were dropped, because they could not be written, or not fast enough.",
            value=subject.log_lines_dropped(),
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
    """Return one metric in Prometheus' text format, version 0.0.4."""
    return generate_latest(_Single(family))
