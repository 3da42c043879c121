"""Packages of the extras: which are missing, and the command that installs them here."""

from __future__ import annotations

import importlib.util
import shlex
import sys

_MODULES = {"hdrhistogram": "hdrh", "prometheus-client": "prometheus_client"}
"""The module of each package that is imported under another name."""


def missing(*packages: str) -> str:
    """Return the packages that are not installed and the command that installs them; empty if all are installed."""
    absent = [name for name in packages if importlib.util.find_spec(_MODULES.get(name, name)) is None]
    if not absent:
        return ""
    names = " and ".join(absent)
    command = shlex.join([sys.executable or "python3", "-m", "pip", "install", *absent])
    return f"needs {names}, which {'is' if len(absent) == 1 else 'are'} not installed: {command}"
