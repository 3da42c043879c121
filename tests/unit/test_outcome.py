"""Test that the table of reasons is complete and consistent."""

from __future__ import annotations

from typing import get_args

from echod.connection.outcome import MEANINGS, Reason


def test_each_reason_has_a_meaning() -> None:
    assert set(MEANINGS) == set(get_args(Reason))


def test_clean_reasons() -> None:
    """Replace a reason after a later error exactly if the connection went well until then."""
    assert {reason for reason, meaning in MEANINGS.items() if meaning.is_clean} == {
        "eof",
        "info",
        "idle",
        "quiet",
        "cut",
    }


def test_failures() -> None:
    """Log every end as a failure, except an end by the client, a description and a quiet client."""
    assert {reason for reason, meaning in MEANINGS.items() if not meaning.is_failure} == {"eof", "info", "quiet"}
