"""Parse and format sizes and durations."""

from __future__ import annotations

import pytest

from echod.units import bytes_text, parse_duration, parse_size, seconds_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("512B", 512),
        ("1.5 KiB", 1536),
        ("64kib", 65536),
        ("2kB", 2000),
        ("1MB", 10**6),
        ("3GiB", 3 * 2**30),
        ("64k", 64000),
        ("64.0", 64),
        ("1.001kB", 1001),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "KiB", "-1", "1e3", "1 KiBB", "0x10", "\u0661", "1.5", "0.5B"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size: write bytes, or for example 64KiB"):
        parse_size(text)


def test_figures_as_text() -> None:
    counts = [0, 999, 999.6, 1000, 123_456, 2.5e9, 3e15]
    assert [bytes_text(count) for count in counts] == [
        *("0 B", "999 B", "1 kB", "1 kB", "123 kB", "2.5 GB", "3e+03 TB"),
    ]
    times = [1e-7, 0.00099949, 0.0009996, 0.25, 0.9996, 12.34, 1234.5]
    assert [seconds_text(seconds) for seconds in times] == [
        *("0.1 µs", "999 µs", "1 ms", "250 ms", "1 s", "12.3 s", "1,234 s"),
    ]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("1.5", 1.5), ("250ms", 0.25), ("10s", 10), ("5m", 300), ("1h", 3600), ("1h30m", 5400), ("700us", 7e-4)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1", "1e3", "5 m", "1d", "5M", "1h 30m", "1m30", "\u0661s", "inf"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration: write seconds, or for example 250ms, 10s, 5m or 1h"):
        parse_duration(text)
