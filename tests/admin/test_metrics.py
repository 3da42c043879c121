"""The metrics: their names and form, their list in docs/reference/metrics.md, and the dashboard."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from echod.admin.histograms import Distribution
from echod.connection.outcome import Reason
from harness import reset
from watching import WATCHED, get, scrape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Start

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
NAME = 'a "quoted" \\ name\nof two lines {x="y"}'

# Prometheus recommends base units: seconds and bytes.
WRONG_UNITS = re.compile(r"milli|micro|_ms|_us|kilo|mega|_kb|_mb|percent|minutes|hours|days", re.IGNORECASE)


@pytest.fixture
def exposition(start: Start, tmp_path: Path) -> str:
    """Return the metrics of a daemon that has served clients, with TLS and a listener name that needs escaping."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "100", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    ends = subprocess.run(["openssl", "x509", "-in", certificate, "-noout", "-enddate"], capture_output=True, text=True)
    (tmp_path / "ends").write_text(ends.stdout)
    config = tmp_path / "echo.toml"
    config.write_text(
        f'listen = ["127.0.0.1:0"]\n[listeners.{json.dumps(NAME)}]\naddress = "127.0.0.1:0"\n'
        f'tls = {{certificate = "{certificate}", private_key = "{key}"}}\n'
        '[listeners.datagrams]\naddress = "udp:127.0.0.1:0"\n'
    )
    daemon = start(*WATCHED, "--config", str(config), "--log.connections", "all", listen=None)
    for _ in range(3):
        daemon.echo(b"x" * 1000)
    with daemon.connect() as client:
        reset(client)
    daemon.wait_for("client_closed", count=4)
    text = get(daemon, "/metrics").body.decode()
    assert daemon.stop() == 0
    return text


def test_form(exposition: str) -> None:
    """Every metric has one HELP and one TYPE. Names and units follow the conventions of Prometheus."""
    helped = re.findall(r"^# HELP (\S+) (.*)$", exposition, re.MULTILINE)
    typed = re.findall(r"^# TYPE (\S+) (counter|gauge|histogram)$", exposition, re.MULTILINE)
    assert exposition.count("# TYPE ") == len(typed)
    assert [name for name, _ in helped] == [name for name, _ in typed]
    assert len(set(helped)) == len(helped)
    seen: set[tuple[str, frozenset[tuple[str, str]]]] = set()
    families = list(text_string_to_metric_families(exposition))
    assert len(families) == len(typed)
    for family in families:
        assert family.documentation.endswith(".") or not family.name.startswith("echod_")
        assert family.samples or family.name.startswith("echod_tls_certificate_")
        assert not WRONG_UNITS.search(family.name)
        for sample in family.samples:
            assert re.fullmatch(r"[a-z][a-z0-9_]*", sample.name)
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert all(re.fullmatch(r"[a-z][a-z0-9_]*", label) for label in sample.labels)
            series = sample.name, frozenset(sample.labels.items())
            assert series not in seen
            seen.add(series)
    assert {family.name.partition("_")[0] for family in families} == {"echod", "process", "python"}
    assert exposition.endswith("\n")


def test_values(exposition: str, tmp_path: Path) -> None:
    """Labels hold any name. The certificate's expiry, the reasons and the histograms are correct."""
    families = {family.name: family for family in text_string_to_metric_families(exposition)}
    (expiry,) = families["echod_tls_certificate_expiry_timestamp_seconds"].samples
    assert expiry.labels == {"listener": NAME, "certificate": "server"}
    import ssl  # noqa: PLC0415  (for its reading of dates)

    assert expiry.value == ssl.cert_time_to_seconds((tmp_path / "ends").read_text().strip().removeprefix("notAfter="))
    closed = families["echod_connections_closed"].samples
    assert {sample.labels["reason"] for sample in closed} == set(get_args(Reason))
    assert {sample.labels["listener"] for sample in closed} == {"127.0.0.1:0", NAME}
    counted = {sample.labels["reason"]: sample.value for sample in closed if sample.labels["listener"] != NAME}
    assert {reason: count for reason, count in counted.items() if count} == {"eof": 3, "reset": 1}
    for name in ("echod_connection_duration_seconds", "echod_connection_rtt_seconds"):
        samples = [sample for sample in families[name].samples if sample.labels["listener"] != NAME]
        buckets = [sample.value for sample in samples if sample.name.endswith("_bucket")]
        assert buckets == sorted(buckets)
        (count,) = (sample.value for sample in samples if sample.name.endswith("_count"))
        (total,) = (sample.value for sample in samples if sample.name.endswith("_sum"))
        assert buckets[-1] == count == 4
        assert 0 <= total < 40
    assert families["process_start_time_seconds"].samples
    assert families["process_open_fds"].samples[0].value > 3
    assert families["python_gc_collections"].samples


def test_round_trips_are_those_of_the_log(start: Start) -> None:
    """The sum and the buckets agree with the log lines."""
    daemon = start(*WATCHED)
    for _ in range(5):
        daemon.echo(b"x")
    daemon.wait_for("client_closed", count=5)
    trips = [line["rtt_ms"] / 1000 for line in daemon.all("client_closed")]
    samples = scrape(daemon)
    assert samples["echod_connection_rtt_seconds_sum", "127.0.0.1:0"] == pytest.approx(sum(trips))
    for bound in (0.0001, 0.001, 0.01):
        expected = sum(trip <= bound for trip in trips)
        assert samples["echod_connection_rtt_seconds_bucket", str(bound), "127.0.0.1:0"] == expected


def test_no_round_trips_of_unix_sockets(start: Start, tmp_path: Path) -> None:
    path = str(tmp_path / "echo.sock")
    daemon = start(*WATCHED, listen=f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    daemon.wait_for("client_closed")
    samples = scrape(daemon)
    assert samples["echod_connection_rtt_seconds_count", f"unix:{path}"] == 0
    assert samples["echod_connection_duration_seconds_count", f"unix:{path}"] == 1
    assert daemon.stop() == 0


def test_distribution() -> None:
    """Bounds are inclusive."""
    distribution = Distribution((0.1, 1.0))
    for value in (0.0, 0.1, 0.10001, 1.0, 7.0):
        distribution.add(value)
    assert distribution.buckets == [("0.1", 2), ("1.0", 4), ("+Inf", 5)]
    assert distribution.sum == pytest.approx(8.20001)


def test_promtool(exposition: str) -> None:
    """Promtool finds no problem in echod's metrics."""
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    result = subprocess.run([promtool, "check", "metrics"], input=exposition, capture_output=True, text=True)
    own = [line for line in (result.stdout + result.stderr).splitlines() if "echod_" in line]
    assert own == []
    assert result.returncode in {0, 3}  # 3: lint findings, such as those about metrics of the Python client


def test_docs_list_them_all(exposition: str) -> None:
    """docs/reference/metrics.md lists exactly echod's metrics, with their types and labels."""
    rows = re.findall(
        r"^\| `(echod_\w+)` \| (\w+) \| (.*?) \| .+ \|$",
        (ROOT / "docs" / "reference" / "metrics.md").read_text(),
        re.MULTILINE,
    )
    listed = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    found = {}
    for family in text_string_to_metric_families(exposition):
        if family.name.startswith("echod_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            found[name] = (family.type, labels)
    assert listed.pop("echod_worker_clients") == ("gauge", {"worker"})  # only with several workers
    assert listed == found
    assert len(rows) == len(listed) + 1


# The dashboard

DASHBOARD = ROOT / "packaging" / "grafana" / "echod.json"


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def test_dashboard_queries_exist(exposition: str) -> None:
    """Every metric and label in the queries of the dashboard exists."""
    dashboard = json.loads(DASHBOARD.read_text())
    samples: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    queries = [target["expr"] for panel in panels(dashboard) for target in panel.get("targets", [])]
    queries += [
        variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"
    ]
    assert len(queries) > 15
    for query in queries:
        names = set(re.findall(r"\b(?:echod|process|python)_\w+", query))
        assert names, query
        assert names <= set(samples), query
        labels = set().union(*(samples[name] for name in names)) | {"instance", "job"}
        for selector in re.findall(r"{(.*?)}", query):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= labels, query
        for group in re.findall(r"\bby \((.*?)\)", query):
            assert {label.strip() for label in group.split(",")} <= labels, query
        assert all(query.count(one) == query.count(other) for one, other in ("()", "{}", "[]"))


def test_dashboard_form() -> None:
    """The data source is a variable. Panels have titles and units, and do not overlap."""
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["id"] is None
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in panels(dashboard)]
    assert len(set(ids)) == len(ids)
    for panel in panels(dashboard):
        assert panel["title"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_dashboard_queries_parse(tmp_path: Path) -> None:
    """Prometheus parses every query, given as recording rules."""
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in panels(dashboard) for target in panel.get("targets", [])]
    rules = [
        {"record": f"x:{number}", "expr": query.replace("$__rate_interval", "1m").replace("$__range", "1h")}
        for number, query in enumerate(queries)
    ]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    result = subprocess.run([promtool, "check", "rules", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(rules)} rules found" in result.stdout
