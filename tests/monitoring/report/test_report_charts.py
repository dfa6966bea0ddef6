from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import start_run

from dbtrain.config import RunConfig
from dbtrain.inference.evaluation import ACCURACY, SO_FAR, Evaluation
from dbtrain.monitoring.report import charts
from dbtrain.monitoring.report.axes import HEIGHT, WIDTH, Scale, number, scale_of
from dbtrain.monitoring.run_view import Mark, RunReader, RunView

SmallConfig = Callable[..., RunConfig]
NAN = math.nan


@pytest.fixture
def view(small_config: SmallConfig, tmp_path: Path) -> RunView:
    return RunReader(start_run(small_config(), tmp_path / "run")).read()


def _moves(svg: str) -> list[tuple[str, float, float]]:
    """Every point of the paths that draw curves."""
    data = "".join(re.findall(r'<path d="([^"]*)" fill="none"', svg))
    return [(kind, float(x), float(y)) for kind, x, y in re.findall(r"([ML])([\d.]+) ([\d.]+)", data)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 2000), (-3, 7), (1e-9, 2e-9), (97.1, 98.4), (5, 5)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = Scale(low, high, 0, 100).ticks()
    assert 1 <= len(ticks) <= 8
    assert all(low - 1e-9 * abs(low) <= tick <= high * (1 + 1e-9) for tick in ticks)
    assert all(len(number(tick)) <= 7 for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(0.002, 80), (0.02, 3), (1e-12, 1e12)])
def test_ticks_of_decades(low: float, high: float) -> None:
    ticks = Scale(low, high, 0, 100, log=True).ticks()
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
    assert low * 0.99 <= ticks[0] < ticks[-1] <= high * 1.01


def test_values_that_span_decades_get_a_logarithmic_axis() -> None:
    assert scale_of([0.01, 3.0, NAN], 0, 1).log
    assert not scale_of([1.0, 3.0], 0, 1).log
    assert not scale_of([0.0, 3.0], 0, 1).log  # no logarithm of nothing
    with pytest.raises(ValueError, match="empty"):
        scale_of([NAN], 0, 1)


def test_a_curve_breaks_where_there_is_no_value(view: RunView) -> None:
    block = view.blocks[1]
    for step, loss in [(10, 2.0), (20, 1.5), (30, NAN), (40, 1.0), (50, 0.8)]:
        block.losses.add(step, loss)
    svg = charts.block_loss(block, "#123456")
    assert svg is not None
    moves = _moves(svg)
    assert [kind for kind, _, _ in moves] == ["M", "L", "M", "L"]
    xs, ys = [x for _, x, _ in moves], [y for _, _, y in moves]
    assert xs == sorted(xs)
    assert ys == sorted(ys)  # a loss that falls goes down the page
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for _, x, y in moves)


def test_what_happened_to_a_block_is_marked_and_stays_text(view: RunView) -> None:
    block = view.blocks[0]
    block.losses.add(10, 1.0)
    block.marks += [Mark(0.0, 10, "restart", "</title><script>alert(1)</script>"), Mark(1.0, 99, "failure", "twice")]
    svg = charts.block_loss(block, "#123456")
    assert svg is not None
    assert "<script" not in svg
    assert "&lt;script&gt;" in svg
    assert svg.count('class="mark') == 2
    marks = [float(x) for x in re.findall(r'class="mark [^>]*translate\(([\d.]+)', svg)]
    assert marks[0] < marks[1] <= WIDTH


def test_nothing_told_draws_nothing(view: RunView) -> None:
    assert charts.all_losses(view) is None
    view.blocks[0].losses.add(10, NAN)
    assert charts.all_losses(view) is None
    assert charts.block_loss(view.blocks[0], "#123456") is None
    view.blocks[2].losses.add(10, 1.0)
    assert charts.all_losses(view) is not None


def test_the_chain_picture_needs_a_chain() -> None:
    points = tuple({"block": i, "sigma": 10.0 / 4**i, "accuracy": 0.5 + i / 10} for i in range(3))
    ours = Evaluation("blocks", "test", 10, ACCURACY, {"first": 0.5}, "first", points, points)
    theirs = Evaluation("end_to_end", "test", 10, ACCURACY, {"accuracy": 0.7}, "accuracy", (), ())
    svg = charts.chain(ours, theirs)
    assert svg is not None
    assert (svg.count('class="step"'), svg.count('class="alone"'), svg.count('class="baseline"')) == (3, 3, 1)
    alone = charts.chain(ours, None)
    assert alone is not None
    assert 'class="baseline"' not in alone
    assert charts.chain(theirs, None) is None
    assert 'class="sofar"' not in svg  # of what draws there is no product
    pooled = tuple({**point, SO_FAR: 0.6} for point in points)
    svg = charts.chain(replace(ours, chain=pooled), None)
    assert svg is not None
    assert re.findall(r'class="sofar"><title>([^<]*)', svg) == [f"product so far, block {i}: 60" for i in range(3)]


def test_neighbours_have_their_own_colours() -> None:
    for count in (1, 2, 12, 100):
        colours = [charts.colour(index, count) for index in range(count)]
        assert len(set(colours)) == count
        assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
