"""Test that the manifests rendered by helm are valid and secure, and that echod accepts their settings."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import kubernetes_validate
import pytest
import yaml

import echod
import policy
from echod.settings.model import LimitsSettings, ListenerSettings, LogSettings, Settings, ShutdownSettings
from harness import PATIENCE, Daemon, clean_environment, run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic import BaseModel

    from certificates import Certificates

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
CHART = ROOT / "packaging" / "helm" / "echod"
VALUES = sorted((CHART / "ci").iterdir())
KUBERNETES = "1.35"

Manifest = dict[str, Any]

# Failed checks of checkov that are accepted, each with its reason.
ACCEPTED = {
    ("CKV_K8S_11", "Deployment"): "a CPU limit causes throttling, which adds latency",
    ("CKV_K8S_15", "Deployment"): "release tags are immutable, and pods can start without the registry",
    ("CKV_K8S_43", "Deployment"): "the user sets image.digest, which differs between registries",
    ("CKV_K8S_11", "Pod"): "the pod of helm test runs for a second",
    ("CKV_K8S_15", "Pod"): "as for the deployment",
    ("CKV_K8S_43", "Pod"): "as for the deployment",
    ("CKV_K8S_8", "Pod"): "the pod of helm test is not a service and ends by itself",
    ("CKV_K8S_9", "Pod"): "the pod of helm test is not a service and needs no readiness probe",
    (
        "CKV2_K8S_6",
        "Pod",
    ): "the pod of helm test accepts no connections, and egress is for the network's owner to restrict",
}


class Tool(NamedTuple):
    """A command-line tool for Kubernetes."""

    name: str
    variable: str
    """The environment variable with its path, if it is not in PATH."""

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = shutil.which(os.environ.get(self.variable, self.name))
        if command is None:
            pytest.skip(f"not installed: {self.name} (add it to PATH, or set {self.variable} to its path)")
        return subprocess.run([command, *arguments], capture_output=True, text=True)


HELM = Tool("helm", "HELM")
KUBECTL = Tool("kubectl", "KUBECTL")


@functools.cache
def render(*arguments: str) -> str:
    """Return all manifests of a release."""
    done = HELM.run("template", "rel", str(CHART), "--namespace=net", f"--kube-version={KUBERNETES}", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def manifests(*arguments: str) -> list[Manifest]:
    return [manifest for manifest in yaml.safe_load_all(render(*arguments)) if manifest]


def one(found: list[Manifest], kind: str) -> Manifest:
    """Return the first manifest of a kind."""
    return next(manifest for manifest in found if manifest["kind"] == kind)


def pod(found: list[Manifest]) -> Manifest:
    """Return the pod specification of the deployment."""
    template: Manifest = one(found, "Deployment")["spec"]["template"]["spec"]
    return template


def variables(found: list[Manifest]) -> Mapping[str, str]:
    return {entry["name"]: entry["value"] for entry in pod(found)["containers"][0]["env"]}


def settings(found: list[Manifest]) -> Manifest:
    return tomllib.loads(one(found, "ConfigMap")["data"]["echod.toml"])


@pytest.fixture(params=VALUES, ids=lambda path: path.name.removesuffix("-values.yaml"))
def values(request: pytest.FixtureRequest) -> str:
    return f"--values={request.param}"


def test_lint(values: str) -> None:
    done = HELM.run("lint", "--strict", f"--kube-version={KUBERNETES}", str(CHART), values)
    assert done.returncode == 0, done.stdout + done.stderr


def test_manifests_are_valid(values: str) -> None:
    """Check every manifest against the Kubernetes schema, with unknown keys as errors."""
    for manifest in manifests(values):
        assert manifest["metadata"]["namespace"] == "net"
        assert len(manifest["metadata"]["name"]) <= 63
        if manifest["kind"] != "ServiceMonitor":  # not part of Kubernetes
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_manifests_are_resources(values: str, tmp_path: Path) -> None:
    """Check that kubectl reads all manifests and finds no duplicates."""
    text = render(values)
    (tmp_path / "all.yaml").write_text(text)
    (tmp_path / "kustomization.yaml").write_text("resources: [all.yaml]\n")
    done = KUBECTL.run("kustomize", str(tmp_path))
    assert done.returncode == 0, done.stderr

    def names(text: str) -> list[tuple[str, str]]:
        return sorted((found["kind"], found["metadata"]["name"]) for found in yaml.safe_load_all(text) if found)

    assert names(done.stdout) == names(text)


def test_plain_manifests() -> None:
    """packaging/kubernetes has the chart's manifests, and kubectl sets the image in them."""
    folder = ROOT / "packaging" / "kubernetes"
    done = HELM.run("template", "echod", str(CHART), "--skip-tests", f"--kube-version={KUBERNETES}")
    title, _, text = (folder / "echod.yaml").read_text().partition("\n")
    assert title == "# Written by `make manifests` from packaging/helm/echod: change that."
    assert text == done.stdout, "run `make manifests`"
    assert f"\nKUBERNETES = {KUBERNETES}\n" in (ROOT / "Makefile").read_text()
    built = KUBECTL.run("kustomize", str(folder))
    assert built.returncode == 0, built.stderr
    found = list(yaml.safe_load_all(built.stdout))
    assert pod(found)["containers"][0]["image"] == f"registry.example.org/echod:{echod.__version__}"


def leaves(value: Any, *path: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the default of each value."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, *path, key)
    else:
        yield ".".join(path), value


@pytest.mark.parametrize(
    "page", [CHART / "README.md", ROOT / "docs" / "how-to" / "kubernetes.md"], ids=lambda path: path.stem
)
def test_table_of_values(page: Path) -> None:
    """The table has each value with its default and a description."""
    table = page.read_text().partition("| value | default | meaning |\n| --- | --- | --- |\n")[2].partition("\n\n")[0]
    found = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| \w.+\. \|$", table, re.MULTILINE)
    expected = dict(leaves(yaml.safe_load((CHART / "values.yaml").read_text())))
    assert expected.pop("topologySpread")
    assert {key: yaml.safe_load(default) for key, default in found if default != "[…]"} == expected
    assert ("topologySpread", "[…]") in found
    assert len(found) == len(table.splitlines())


def test_echod_accepts_its_settings(values: str, tmp_path: Path, certificates: Certificates) -> None:
    """Check the settings with the pod's variables, and with certificates in place of the secrets."""
    found = manifests(values)
    text = one(found, "ConfigMap")["data"]["echod.toml"]
    for name, path in (
        ("tls.crt", certificates.certificate),
        ("tls.key", certificates.key),
        ("ca.crt", certificates.ca),
    ):
        text = re.sub(f"/etc/echod/tls/[a-z]+/{name}", str(path), text)
    file = tmp_path / "echod.toml"
    file.write_text(text)
    done = run("check", env={**variables(found), "ECHOD_CONFIG": str(file)})
    assert (done.returncode, done.stdout) == (0, f"configuration OK: {file}, ECHOD_ADMIN__ADDRESS\n"), done.stderr


def test_everything_reaches_the_settings() -> None:
    values = yaml.safe_load((CHART / "ci" / "everything-values.yaml").read_text())
    found = settings(manifests(f"--values={CHART}/ci/everything-values.yaml"))
    for section in ("limits", "log"):
        assert found[section] == values["config"][section]
    assert found["faults"] == values["config"]["faults"]
    assert found["loop"] == "asyncio"
    assert found["listeners"] == {
        "echo": {"address": ":8000", "allow": ["10.0.0.0/8"]},
        "echo-udp": {"address": "udp::8000", "allow": ["10.0.0.0/8"], "refuse_ports": ["0-1023"]},
        "lines": {"address": ":8001", "mode": "line"},
        "info": {"address": ":8002", "mode": "info"},
        "boom": {"address": ":8003", "fault": "boom"},
        "secure": {
            "address": ":8443",
            "tls": {
                "certificate": "/etc/echod/tls/secure/tls.crt",
                "private_key": "/etc/echod/tls/secure/tls.key",
                "minimum_version": "1.3",
            },
        },
        "mutual": {
            "address": ":8444",
            "tls": {
                "certificate": "/etc/echod/tls/mutual/tls.crt",
                "private_key": "/etc/echod/tls/mutual/tls.key",
                "client_ca": "/etc/echod/tls/mutual/ca.crt",
            },
        },
    }


@pytest.mark.parametrize(("name", "seconds"), [("default", 31), ("everything", 36), ("proxy", 6), ("bare", 3632)])
def test_grace_period(name: str, seconds: int) -> None:
    """Check that the grace period is the longest possible stop plus the margin."""
    found = manifests(f"--values={CHART}/ci/{name}-values.yaml")
    shutdown = settings(found)["shutdown"]
    longest = shutdown["delay"] + shutdown["drain_timeout"] + shutdown["linger_timeout"]
    period = pod(found)["terminationGracePeriodSeconds"]
    margin = {"everything": 10, "bare": 0}.get(name, 5)
    assert period == seconds == math.ceil(longest) + margin


def test_readiness_is_noticed_in_time() -> None:
    """Check that the cluster notices a draining pod before it stops accepting."""
    found = manifests()
    probe = pod(found)["containers"][0]["readinessProbe"]
    assert probe["httpGet"] == {"path": "/readyz", "port": "admin"}
    assert probe["periodSeconds"] * probe["failureThreshold"] < settings(found)["shutdown"]["delay"]


def test_ports_are_consistent(values: str) -> None:
    """Check that settings, pod, service, policy and autoscaler agree on ports and labels."""
    found = manifests(values)
    listeners = {name: int(table["address"].rpartition(":")[2]) for name, table in settings(found)["listeners"].items()}
    ports = {port["name"]: port["containerPort"] for port in pod(found)["containers"][0]["ports"]}
    admin = int(variables(found)["ECHOD_ADMIN__ADDRESS"].removeprefix(":"))
    assert ports == {**listeners, "admin": admin}
    protocols = {port["name"]: port["protocol"] for port in pod(found)["containers"][0]["ports"]}
    assert protocols == {name: "UDP" if name.endswith("-udp") else "TCP" for name in ports}
    service = one(found, "Service")
    assert {port["targetPort"] for port in service["spec"]["ports"]} == set(listeners)
    assert all(port["protocol"] == protocols[port["targetPort"]] for port in service["spec"]["ports"])
    labels = one(found, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    for manifest in found:
        if manifest["kind"] == "Service":
            assert labels >= manifest["spec"]["selector"].items()
        elif manifest["kind"] in {"Deployment", "PodDisruptionBudget"}:
            assert labels >= manifest["spec"]["selector"]["matchLabels"].items()
        elif manifest["kind"] == "NetworkPolicy":
            assert labels >= manifest["spec"]["podSelector"]["matchLabels"].items()
            echo, *others = manifest["spec"]["ingress"]
            assert {port["port"]: port["protocol"] for port in echo["ports"]} == {
                name: protocols[name] for name in listeners
            }
            assert all([port["port"] for port in rule["ports"]] == ["admin"] for rule in others)
            assert manifest["spec"]["egress"] == []
        elif manifest["kind"] == "HorizontalPodAutoscaler":
            assert manifest["spec"]["scaleTargetRef"]["name"] == one(found, "Deployment")["metadata"]["name"]


def test_monitor_finds_its_service() -> None:
    found = manifests("--set=serviceMonitor.enabled=true", "--set=serviceMonitor.labels.release=prometheus")
    monitor = one(found, "ServiceMonitor")
    selector = monitor["spec"]["selector"]["matchLabels"].items()
    services = [manifest for manifest in found if manifest["kind"] == "Service"]
    selected = [service for service in services if service["metadata"]["labels"].items() >= selector]
    assert [service["metadata"]["name"] for service in selected] == ["rel-echod-metrics"]
    endpoint = monitor["spec"]["endpoints"][0]
    assert [port["name"] for port in selected[0]["spec"]["ports"]] == [endpoint["port"]]
    assert endpoint["path"] == "/metrics"
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_optional_manifests() -> None:
    kinds = {manifest["kind"] for manifest in manifests()}
    assert kinds == {"ConfigMap", "Deployment", "NetworkPolicy", "Pod", "PodDisruptionBudget", "Service"}
    bare = manifests(f"--values={CHART}/ci/bare-values.yaml")
    assert {manifest["kind"] for manifest in bare} == {"ConfigMap", "Deployment", "Pod", "Service"}
    assert "topologySpreadConstraints" not in pod(bare)
    assert one(bare, "Deployment")["spec"]["replicas"] == 1
    everything = manifests(f"--values={CHART}/ci/everything-values.yaml")
    assert {manifest["kind"] for manifest in everything} == kinds | {"HorizontalPodAutoscaler", "ServiceMonitor"}
    assert "replicas" not in one(everything, "Deployment")["spec"]
    # The client of `helm test` cannot send PROXY headers.
    assert "Pod" not in {manifest["kind"] for manifest in manifests(f"--values={CHART}/ci/proxy-values.yaml")}
    (probe,) = one(everything, "Pod")["spec"]["containers"]  # `helm test --logs` fails with several
    assert re.findall(r"^echod probe \S+\.svc:(\d+)( .*)? --timeout 10 ", probe["args"][0], re.MULTILINE) == [
        ("7", ""),
        ("8001", ""),
        ("443", " --tls --insecure"),
    ]


@pytest.mark.parametrize("fails", [True, False])
def test_helm_test_probes_every_listener(fails: bool, tmp_path: Path) -> None:
    """Run the command of `helm test` against a daemon: it probes all listeners, and fails if any of them does."""
    (probe,) = one(manifests(f"--values={CHART}/ci/everything-values.yaml"), "Pod")["spec"]["containers"]
    targets = iter(["unix:/absent" if fails else "unix:lines", "unix:echo", "unix:lines"])
    script = re.sub(r"\S+\.svc:\d+( --tls --insecure)?", lambda _: next(targets), probe["args"][0])
    (tmp_path / "echod").write_text(f'#!/bin/sh\nexec {sys.executable} -m echod "$@"\n')
    (tmp_path / "echod").chmod(0o755)
    environment = clean_environment({"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    with Daemon(listen=f"unix:{tmp_path}/echo,unix:{tmp_path}/lines"):
        done = subprocess.run(
            [*probe["command"], script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    assert done.returncode == (69 if fails else 0), done.stderr
    assert re.findall("^(unix:.*?): 64 bytes came back right", done.stdout, re.MULTILINE) == [
        *([] if fails else ["unix:lines"]),
        "unix:echo",
        "unix:lines",
    ]


def test_startup_probe_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The startup probe does not fail while nothing listens, and ends at the first connect after that."""
    with socket.socket() as admin:
        admin.bind(("127.0.0.1", 0))
        port = admin.getsockname()[1]
        probe = pod(manifests(f"--set=admin.port={port}"))["containers"][0]["startupProbe"]
        python, option, script = probe["exec"]["command"]
        assert (python, option) == ("/opt/echod/bin/python", "-c")
        waits = []

        def listen_at_the_second_wait(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                admin.listen()

        monkeypatch.setattr(time, "sleep", listen_at_the_second_wait)
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # it closes no socket, as it is short
            exec(script, {})
    assert waits == [0.1, 0.1]
    assert probe["failureThreshold"] == 1


def test_changed_settings_replace_the_pods() -> None:
    def checksum(*arguments: str) -> str:
        annotations = one(manifests(*arguments), "Deployment")["spec"]["template"]["metadata"]["annotations"]
        return str(annotations["checksum/config"])

    assert checksum() == checksum("--set=replicaCount=5")
    assert checksum() != checksum("--set=config.limits.idle_timeout=60")


def test_security(values: str) -> None:
    """Check the same restrictions as in Docker, without service variables and service account token."""
    for manifest in manifests(values):
        if manifest["kind"] not in {"Deployment", "Pod"}:
            continue
        spec = manifest["spec"]["template"]["spec"] if manifest["kind"] == "Deployment" else manifest["spec"]
        assert spec["enableServiceLinks"] is spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["securityContext"]["runAsUser"] == 65534
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_policy(tmp_path: Path) -> None:
    file = tmp_path / "rendered.yaml"
    file.write_text(render("--set=serviceMonitor.enabled=true", "--set=autoscaling.enabled=true"))
    assert policy.failures(file, "kubernetes") == set(ACCEPTED)


@pytest.mark.parametrize(("delay", "warned"), [("5", False), ("3", True)])
def test_notes(delay: str, warned: bool) -> None:
    """Check that the notes list the listeners, and warn if the cluster notices a draining pod too late."""
    done = HELM.run("install", "rel", str(CHART), "--dry-run=client", f"--set=config.shutdown.delay={delay}")
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("\nNOTES:\n")[2]
    assert "rel-echod.default.svc:8000  (echo)" in notes
    assert ("WARNING" in notes) is warned


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("replicas=3", "replicas"),
        ("replicaCount=-1", "replicaCount"),
        ("replicaCount=many", "replicaCount"),
        ("image.digest=latest", "digest"),
        ("listeners.echo.port=80", "/listeners/echo/port"),
        ("listeners.echo.porto=8000", "porto"),
        ("listeners.admin.port=8001,listeners.admin.servicePort=8001", "admin"),
        ("listeners.With-Capitals.port=8001,listeners.With-Capitals.servicePort=8001", "With-Capitals"),
        ("listeners=null", "listeners"),
        ("listeners.echo.tls.minimum_version=1", "minimum_version"),
        ("listeners.echo.tls.clientCertificates=true", "secretName"),
        ("config.shutdown.delay=-1", "delay"),
        ("config.shutdown.delay=null", "delay"),
        ("config.shutdown.delay=5s", "delay"),
        ("config.limits.max_connection=1", "max_connection"),
        ("config.limits.write_timeout=0", "write_timeout"),
        ("config.log.level=loud", "level"),
        ("config.admin.address=:9000", "admin"),
        ("service.type=ExternalName", "type"),
        ("podDisruptionBudget.maxUnavailable=half", "maxUnavailable"),
        ("serviceMonitor.interval=often", "interval"),
        ("topologySpread[0].topologyKey=zone", "maxSkew"),
        (
            "listeners.more.port=8000,listeners.more.servicePort=1",
            "listeners.more.port: 8000 is already the port of echo",
        ),
        ("listeners.more.port=8001,listeners.more.servicePort=8000", "servicePort: 8000 is already the port of echo"),
        ("admin.port=8000", "listeners.echo.port: 8000 is already the port of admin"),
        (
            "autoscaling.enabled=true,autoscaling.minReplicas=11",
            "minReplicas (11) must not be above autoscaling.maxReplicas",
        ),
    ],
)
def test_invalid_values(setting: str, message: str) -> None:
    done = HELM.run("template", "rel", str(CHART), f"--set={setting}")
    assert done.returncode != 0
    assert message in done.stderr


def test_schema_follows_the_settings() -> None:
    """Check that the schema has every setting except those that the chart sets itself."""
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    sections: dict[str, tuple[type[BaseModel], set[str]]] = {
        "limits": (LimitsSettings, set()),
        "shutdown": (ShutdownSettings, set()),
        "log": (LogSettings, {"file"}),
    }
    config = schema["config"]["properties"]
    for name, (model, left_out) in sections.items():
        assert set(config[name]["properties"]) == set(model.model_fields) - left_out
    assert set(config) == set(Settings.model_fields) - {"listen", "listeners", "admin"}
    listener = set(schema["listeners"]["additionalProperties"]["properties"])
    assert listener - {"port", "servicePort", "udp"} == set(ListenerSettings.model_fields) - {"address", "socket_mode"}


def test_schema_knows_every_value() -> None:
    """Check that the chart's values and the schema have the same keys."""
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    assert set(schema) - {"global"} == set(yaml.safe_load((CHART / "values.yaml").read_text()))


def test_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == echod.__version__
