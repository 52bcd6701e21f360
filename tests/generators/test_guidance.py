from __future__ import annotations

import pytest

from tessella.generators.guidance import parse_guidance


def test_what_one_writes() -> None:
    assert parse_guidance("2.5") == 2.5
    values = [parse_guidance(text) for text in ("interval:2,0.25,0.75", "linear:1,3", "cosine:1,3")]
    assert all(callable(value) for value in values)
    at = [[value(progress) for progress in (0.0, 0.25, 0.5, 0.75)] for value in values if callable(value)]
    assert at[0] == [1, 2, 2, 1]
    assert at[1] == [1, 1.5, 2, 2.5]
    assert at[2] == pytest.approx([1, 1.2928932, 2, 2.7071068])


@pytest.mark.parametrize("text", ["", "x", "1,2", "linear:1", "interval:1,2", "interval", "sudden:1,2"])
def test_what_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="guidance must be a number, interval:SCALE,START,STOP"):
        parse_guidance(text)
    with pytest.raises(ValueError, match="guidance must be >= 0"):
        parse_guidance("-1")
