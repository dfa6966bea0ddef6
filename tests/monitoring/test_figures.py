from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import start_run, train_block

from dbtrain.config import RunConfig
from dbtrain.inference.evaluation import ACCURACY, SO_FAR, Evaluation
from dbtrain.monitoring.figures import draw_figures, loss_curve
from dbtrain.run_directory import RunDirectory

SmallConfig = Callable[..., RunConfig]
POINTS = tuple({"block": i, "sigma": 10.0 / 4**i, "accuracy": 0.5, "cross_entropy": 1.0} for i in range(3))
OURS = Evaluation("blocks", "test", 10, ACCURACY, {"first": 0.5, "product": 0.8}, "first", POINTS, POINTS)
THEIRS = Evaluation("end_to_end", "test", 10, ACCURACY, {"accuracy": 0.7}, "accuracy", (), ())


@pytest.fixture
def run(small_config: SmallConfig, tmp_path: Path) -> RunDirectory:
    run = start_run(small_config(training={"steps": 6}, logging={"every": 2}), tmp_path / "run")
    train_block(run, 1)  # the others have not begun
    return run


def _picture(run: RunDirectory, name: str) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(Image.open(io.BytesIO(run.storage.read_bytes(f"figures/{name}"))).convert("L"))


def test_pictures_of_a_run(run: RunDirectory) -> None:
    drawn = draw_figures(run, OURS, THEIRS)
    assert drawn == {name: f"{run.uri}/figures/{name}" for name in ("loss.png", "chain.png")}
    for name in drawn:
        picture = _picture(run, name)
        assert min(picture.shape) > 300
        assert picture.min() < 100 < picture.max()
    without = draw_figures(run, OURS)
    assert without == drawn
    assert (_picture(run, "chain.png") != picture).any()  # the baseline's line is gone
    picture = _picture(run, "chain.png")
    pooled = tuple({**point, SO_FAR: 0.6} for point in POINTS)
    draw_figures(run, replace(OURS, chain=pooled))
    assert (_picture(run, "chain.png") != picture).any()  # what the steps say together is there


def test_what_there_is_nothing_to_say_of(run: RunDirectory, small_config: SmallConfig, tmp_path: Path) -> None:
    assert list(draw_figures(run, None)) == ["loss.png"]
    baseline = start_run(small_config(training={"steps": 6}), f"file://{tmp_path}/baseline", "end_to_end")
    assert list(draw_figures(baseline, THEIRS)) == ["loss.png"]
    assert (tmp_path / "baseline/figures/loss.png").is_file()


def test_more_steps_than_blocks(run: RunDirectory) -> None:
    longer = Evaluation("blocks", "test", 10, ACCURACY, {"first": 0.5}, "first", (*POINTS, *POINTS), POINTS)
    assert "chain.png" in draw_figures(run, longer)


def test_a_repeated_step_counts_once() -> None:
    lines = [
        {"step": 10, "loss": 3.0},
        {"step": 20, "loss": 2.0},
        {"step": 20, "loss": 1.5},
        {"step": 30, "loss": None},
    ]
    steps, losses = loss_curve(lines)
    assert steps == [10, 20, 30]
    assert losses[:2] == [3.0, 1.5]
    assert math.isnan(losses[2])
    assert loss_curve([]) == ([], [])


def test_a_roll_back_is_no_point_of_the_curve() -> None:
    lines = [
        {"step": 10, "loss": 2.0},
        {"step": 20, "loss": None},
        {"event": "rolled_back", "step": 10, "from_step": 20, "reason": "", "attempt": 1},
        {"step": 20, "loss": 1.0},
    ]
    assert loss_curve(lines) == ([10, 20], [2.0, 1.0])
