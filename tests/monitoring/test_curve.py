from __future__ import annotations

import math

from dbtrain.monitoring.curve import Curve


def _curve(*points: tuple[int, float]) -> Curve:
    curve = Curve()
    for step, value in points:
        curve.add(step, value)
    return curve


def test_a_restart_repeats_its_steps() -> None:
    curve = _curve((10, 3.0), (20, 2.0), (30, 1.0), (20, 2.5))
    assert (curve.steps, curve.values) == ([10, 20], [3.0, 2.5])


def test_thinning_keeps_the_last_step_and_the_mean() -> None:
    curve = _curve(*((step, float(step)) for step in range(1, 1001)))
    steps, values = curve.thinned(10)
    assert steps == [100 * (index + 1) for index in range(10)]
    assert values[0] == 50.5
    assert curve.thinned(1000) == (curve.steps, curve.values)


def test_infinite_values_do_not_spoil_a_mean() -> None:
    curve = _curve((1, 1.0), (2, math.nan), (3, math.nan), (4, math.inf))
    steps, values = curve.thinned(2)
    assert steps == [2, 4]
    assert values[0] == 1.0
    assert math.isnan(values[1])
