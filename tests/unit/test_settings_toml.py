"""The settings as TOML, and the files and pages generated from the model."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin

import pytest

from echod.settings import toml
from echod.settings.model import Settings, leaves
from loading import loaded

if TYPE_CHECKING:
    from echod.settings.types import Key
    from loading import Write

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("no_settings_in_the_environment")]


@pytest.mark.parametrize("trigger", ["boom\r\n", 'quote " and \\', "tab\t\x7f\x00\x1f", "für 🎉", "#"])
def test_config_is_read_back(write: Write, trigger: str) -> None:
    """`echod config` prints TOML with the origin of each value, and reading it returns the same settings."""
    settings = Settings(
        listen=("h:1", "[::1]:2"),
        limits={"write_buffer": "3MiB", "idle_timeout": 0.25},
        faults={
            "a b.c": {"trigger": trigger, "action": "raise"},
            "far": {"probability": 0.5, "seed": 3, "delay": 2, "jitter": 0.5, "rate": "1MiB", "slice": 10},
            "late": {"after_bytes": 1000, "after_seconds": 0, "action": "half_close"},
        },
        listeners={"x": {"address": "h:3", "fault": "a b.c"}},
    )
    text = toml.document(settings, {("limits", "idle_timeout"): "ECHOD_X"})
    assert loaded(config=write(text)).settings == settings
    assert 'write_buffer = "3MiB"  # default' in text
    assert "idle_timeout = 0.25  # ECHOD_X" in text
    assert all(line.startswith("[") or "  # " in line for line in text.splitlines() if line)


def test_origins_cannot_break_the_document(tmp_path: Path, write: Write) -> None:
    """The document can be read back even if the file's name contains a line break."""
    path = tmp_path / "odd\nname = 1.toml"
    path.write_text("[limits]\nbacklog = 3\n")
    result = loaded(config=str(path))
    text = toml.document(result.settings, result.origins)
    assert loaded(config=write(text)).settings.limits.backlog == 3


@pytest.mark.parametrize(
    ("size", "text"), [(1, '"1B"'), (1000, '"1000B"'), (1024, '"1KiB"'), (1536, '"1536B"'), (1 << 30, '"1GiB"')]
)
def test_sizes(size: int, text: str) -> None:
    """A size is written in the largest unit that leaves a whole number."""
    settings = Settings(limits={"write_buffer": size})
    assert toml.value(settings.limits.write_buffer) == text
    assert Settings(limits={"write_buffer": tomllib.loads(f"x = {text}")["x"]}) == settings


def test_values_that_toml_lacks() -> None:
    """A value of another type is an error of the caller."""
    with pytest.raises(TypeError):
        toml.value(None)


ROOT = Path(__file__).parents[2]


def test_example_file(write: Write) -> None:
    """config.example.toml contains every key with its default, and its commented tables are valid."""
    path = ROOT / "config.example.toml"
    result = loaded(config=str(path))
    assert result.settings == Settings()
    assert {key for key, _ in leaves()} <= set(result.origins)
    uncommented = re.sub(r"^# (?=\[|[a-z_]+ = )", "", path.read_text(), flags=re.MULTILINE)
    settings = loaded(config=write(uncommented)).settings
    assert settings.all_listeners()["127.0.0.1:8000"].fault == ""
    assert settings.listeners["boom"].fault == "boom"
    assert settings.faults["boom"].trigger == "boom\r\n"


def test_example_file_explains() -> None:
    """In config.example.toml, each key follows a comment with its description and its choices."""
    comments: list[str] = []
    section: Key = ()
    found: dict[Key, str] = {}
    for line in (ROOT / "config.example.toml").read_text().splitlines():
        if line.startswith("# "):
            comments.append(line.removeprefix("# "))
            continue
        if line.startswith("["):
            section = (line.strip("[]"),)
        elif line:
            found[*section, line.partition(" = ")[0]] = " ".join(comments)
        comments.clear()
    expected = {}
    for key, field in leaves():
        choices = " | ".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else ""
        expected[key] = f"{field.description} {choices}".rstrip()
    assert found == expected


def test_reference_page() -> None:
    """docs/reference/configuration.md is up to date: it equals the output of `make docs`."""
    path = ROOT / "docs" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    assert spec is not None
    assert spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert (ROOT / "docs" / "reference" / "configuration.md").read_text() == "\n".join(reference.page())
