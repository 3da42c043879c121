"""The table of reasons is complete and consistent."""

from __future__ import annotations

from typing import get_args

from echod.connection.outcome import MEANINGS, Reason


def test_each_reason_has_a_meaning() -> None:
    assert set(MEANINGS) == set(get_args(Reason))


def test_clean_reasons() -> None:
    """A later error replaces exactly the reasons of connections that went well until then."""
    assert {reason for reason, meaning in MEANINGS.items() if meaning.is_clean} == {
        "eof",
        "info",
        "idle",
        "quiet",
        "cut",
    }


def test_failures() -> None:
    """Everything is a failure except an end by the client, an answer in mode info and a quiet drain."""
    assert {reason for reason, meaning in MEANINGS.items() if not meaning.is_failure} == {"eof", "info", "quiet"}
