"""Missing packages, and the command that installs them."""

from __future__ import annotations

import sys

import pytest

from echod.extras import missing

pytestmark = pytest.mark.once


def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the missing packages are named, under the names that pip knows, with the interpreter that runs."""
    monkeypatch.setattr(sys, "executable", "/opt/my tools/python")
    assert missing("pydantic", "structlog") == ""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    command = "'/opt/my tools/python' -m pip install prometheus-client"
    assert missing("pydantic", "prometheus-client") == f"needs prometheus-client, which is not installed: {command}"
    monkeypatch.setitem(sys.modules, "hdrh", None)
    monkeypatch.setattr(sys, "executable", "")
    assert missing("hdrhistogram", "prometheus-client") == (
        "needs hdrhistogram and prometheus-client, which are not installed: "
        "python3 -m pip install hdrhistogram prometheus-client"
    )
