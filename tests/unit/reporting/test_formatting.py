"""Numbers as people read them."""

from __future__ import annotations

import pytest

from robench.reporting.formatting import count, duration, percent, size


def test_numbers() -> None:
    assert [percent(0.91234, 10_000), percent(0.91234, 500), percent(1.0, None)] == ["91.23", "91.2", "100.0"]
    assert [count(312_202), count(61), count(20.5), count(1234.5)] == ["312,202", "61", "20.5", "1,234"]
    assert [size(1_250_000), size(5_300)] == ["1.2 MB", "5.3 kB"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (45e-6, "45 µs"),
        (0.04, "40 ms"),
        (0.1, "0.1 s"),
        (8.44, "8.4 s"),
        (59.94, "59.9 s"),
        (59.97, "1 min 00 s"),
        (321, "5 min 21 s"),
        (3599.7, "1 h 00 min"),
        (11_100, "3 h 05 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
