"""The imports of the package: they point down, and no two modules import each other."""

from __future__ import annotations

from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[2]


def test_contracts() -> None:
    """The contracts in pyproject.toml are kept, imports for type checkers included."""
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0
