"""Suggestions for unknown keys and variables."""

from __future__ import annotations

import pytest

from echod.settings import suggestions
from echod.settings.model import Settings
from loading import Write, loaded, problems

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("no_settings_in_the_environment")]

TOP = "is a top-level key: in a file, it must come before the first table"


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        # At the top level.
        ("port", "did you mean 'listen'?"),
        ("bind", "did you mean 'listen'?"),
        ("idle_timeout", "did you mean 'limits.idle_timeout'?"),
        ("timeout", "did you mean 'limits.idle_timeout'?"),
        ("maxconn", "did you mean 'limits.max_connections'?"),
        ("loglevel", "did you mean 'log.level'?"),
        ("ssl", "did you mean 'listeners.NAME.tls'?"),
        ("cert", "did you mean 'listeners.NAME.tls.certificate'?"),
        ("limit", "did you mean 'limits'?"),
        ("frontend", "did you mean 'listeners'?"),
        ("colour", "use one of: " + ", ".join(Settings.model_fields)),
        # In a table.
        ("limits.listen", f"'listen' {TOP}"),
        ("limits.loop", f"'loop' {TOP}"),
        ("faults.a.listen", f"'listen' {TOP}"),
        ("listeners.a.listen", f"'listen' {TOP}; or did you mean 'address'?"),
        ("limits.log", "'log' is a table of its own: write [log]"),
        ("listeners.a.faults", "'faults' is a table of its own: write [faults.NAME]"),
        ("limits.delay", "did you mean 'delay' below [shutdown]?"),
        ("limits.port", "did you mean 'listen' at the top level?"),
        ("log.frontend", "did you mean 'listeners' at the top level?"),
        ("limits.idle-timeout", "did you mean 'idle_timeout'?"),
        ("limits.Idle_Timeout", "did you mean 'idle_timeout'?"),
        ("limits.Max-Clients", "did you mean 'max_connections'?"),
        ("limits.timeout", "did you mean 'idle_timeout'?"),
        ("shutdown.timeout", "did you mean 'drain_timeout'?"),
        ("admin.port", "did you mean 'address'?"),
        ("listeners.a.cert", "did you mean 'tls.certificate'?"),
        ("listeners.a.max_connections", "did you mean 'max_connections' below [limits]?"),
        ("listeners.a.tls.cert", "did you mean 'certificate'?"),
        ("listeners.a.tls.key", "did you mean 'private_key'?"),
        ("listeners.a.tls.ssl_protocols", "did you mean 'minimum_version'?"),
        ("admin.colour", "use one of: address"),
    ],
)
def test_keys(key: str, advice: str) -> None:
    """Recognise keys of other tables, names of other servers, and misspelt names."""
    assert suggestions.for_key(tuple(key.split("."))) == advice


def test_aliases() -> None:
    """Each alias belongs to a key."""
    assert {path[-1] for path in suggestions.paths(Settings)} >= suggestions.ALIASES.keys()


@pytest.mark.parametrize("key", ["listeners.address", "faults.action"])
def test_tables_without_a_name(key: str, write: Write) -> None:
    """A key of a named table is recognised if the name is missing."""
    table, name = key.split(".")
    line = f"{key}: should be a table; "
    assert problems(f"--{key}=x") == [f"--{key}: {line}write --{table}.NAME.{name}"]
    in_file = problems(config=write(f"{key} = 'x'"))
    assert in_file == [f"FILE: {line}for the key {name!r}, write [{table}.NAME] above it"]


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("ECHOD_LIMITS_IDLE_TIMEOUT", "ECHOD_LIMITS__IDLE_TIMEOUT"),
        ("ECHOD_LOG_LEVEL", "ECHOD_LOG__LEVEL"),
        ("ECHOD_LOGLEVEL", "ECHOD_LOG__LEVEL"),
        ("ECHOD_IDLE_TIMEOUT", "ECHOD_LIMITS__IDLE_TIMEOUT"),
        ("ECHOD_LIMIT__IDLE_TIMEOUT", "ECHOD_LIMITS__IDLE_TIMEOUT"),
        ("ECHOD_LISTENERS_WEB_TLS_CERTIFICATE", "ECHOD_LISTENERS__WEB__TLS__CERTIFICATE"),
        ("ECHOD_FAULTS_BOOM_AFTER_BYTES", "ECHOD_FAULTS__BOOM__AFTER_BYTES"),
        ("ECHOD_LISTEN__0", "ECHOD_LISTEN"),
        # Kubernetes and Docker set these for a service called echod or echod-admin.
        ("ECHOD_PORT", ""),
        ("ECHOD_PORT_8000_TCP_ADDR", ""),
        ("ECHOD_SERVICE_HOST", ""),
        ("ECHOD_SERVICE_PORT_ECHO", ""),
        ("ECHOD_ADMIN_SERVICE_HOST", ""),
        ("ECHOD_ADMIN_PORT_9000_TCP_ADDR", ""),
        ("ECHOD_ADDRESS", ""),
        ("ECHOD_", ""),
        ("ECHOD___", ""),
    ],
)
def test_variables(monkeypatch: pytest.MonkeyPatch, variable: str, meant: str) -> None:
    """Recognise a variable with wrong underscores or without its section."""
    monkeypatch.setenv(variable, "1")
    assert loaded().unknown_variables == {variable: meant}
