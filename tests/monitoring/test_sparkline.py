from __future__ import annotations

import math

import pytest

from dbtrain.monitoring.sparkline import ASCII, UNICODE, bar, sparkline


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""),
        ([5.0], "▁"),
        ([2.0, 2.0, 2.0], "▁▁▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([8, 4, 1], "█▄▁"),
        ([-1000.0, 0.0, 1000.0], "▁▅█"),
        # Two decades and more: every tenth part is as far.
        ([1000, 100, 10, 1], "█▆▃▁"),
        ([99, 10, 1], "█▁▁"),
        ([1.0, math.nan, 0.0, math.inf], "█!▁!"),
        ([math.nan, math.nan], "!!"),
        ([1e-320, 1e308], "▁█"),
        ([-1e308, 1e308], "▁▁"),  # no float is so far
    ],
)
def test_a_curve(values: list[float], drawn: str) -> None:
    assert sparkline(values) == drawn


def test_without_unicode() -> None:
    assert sparkline([0, 3.5, 7, math.nan], ASCII) == "_=#!"
    assert bar(0.5, 4, ASCII) == "##.."


@pytest.mark.parametrize(
    ("fraction", "drawn"), [(0, "░░░░"), (0.24, "░░░░"), (0.5, "██░░"), (0.999, "███░"), (1, "████"), (7, "████")]
)
def test_a_bar_is_full_when_nothing_is_left(fraction: float, drawn: str) -> None:
    assert bar(fraction, 4, UNICODE) == drawn
