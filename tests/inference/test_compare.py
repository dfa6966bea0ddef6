from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import start_run

from dbtrain.config import RunConfig
from dbtrain.errors import UserError
from dbtrain.inference.compare import check_baseline, compare, driven_seconds, side
from dbtrain.inference.evaluation import ACCURACY, Evaluation
from dbtrain.run_directory import RunDirectory

OURS = Evaluation(
    "blocks", "test", 10, ACCURACY, {"first": 0.5, "first_mean": 0.6, "product": 0.8}, "first_mean", (), ()
)
THEIRS = Evaluation("end_to_end", "test", 10, ACCURACY, {"accuracy": 0.7}, "accuracy", (), ())


@pytest.fixture
def runs(small_config: Callable[..., RunConfig], tmp_path: Path) -> tuple[RunDirectory, RunDirectory]:
    config = small_config()
    return start_run(config, tmp_path / "a"), start_run(config, tmp_path / "b", "end_to_end")


def _journal(run: RunDirectory, *lines: tuple[float, str] | tuple[float, str, int]) -> None:
    for time, event, *block in lines:
        run.journal({"time": time, "event": event, **({"block": block[0]} if block else {})})


def test_side_by_side(runs: tuple[RunDirectory, RunDirectory]) -> None:
    ours, theirs = runs
    found = compare(ours, OURS, theirs, THEIRS)
    assert (found["run"]["value"], found["run"]["best"], found["run"]["best_readout"]) == (0.6, 0.8, "product")
    assert found["metric"]["better"] == "higher"
    assert found["baseline"]["value"] == found["baseline"]["best"] == 0.7
    assert found["run"]["layer_evaluations"] == found["baseline"]["layer_evaluations"] == 4 * 60 * 16
    assert found["run"]["largest_worker_bytes"] == ours.plan.blocks[0].bytes.total
    assert found["run"]["largest_worker_bytes"] < found["baseline"]["largest_worker_bytes"]
    assert found["run"]["parameters"] == sum(block.parameters for block in ours.plan.blocks)


def test_what_cannot_stand_beside_a_run(
    runs: tuple[RunDirectory, RunDirectory], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    ours, theirs = runs
    check_baseline(ours, theirs)
    with pytest.raises(UserError, match=r"BASELINE = .*no end-to-end run.*dbtrain baseline"):
        compare(ours, OURS, ours, OURS)
    assert theirs.plan.data is not None
    theirs.plan = theirs.plan.model_copy(update={"data": theirs.plan.data.model_copy(update={"sha256": "0" * 64})})
    with pytest.raises(UserError, match=r"BASELINE = .*other data"):
        compare(ours, OURS, theirs, THEIRS)


HEAD: tuple[Any, ...] = ((100.0, "run_started"), (101.0, "block_starting", 0), (102.0, "block_running", 0))


@pytest.mark.parametrize(
    ("lines", "wall", "work"),
    [
        ((), 0.0, 0.0),
        ((*HEAD, (110.0, "block_finished", 0), (111.0, "run_ended")), 11.0, 8.0),
        ((*HEAD, (103.0, "block_running", 1), (110.0, "block_finished", 0), (112.0, "run_interrupted")), 12.0, 17.0),
        # A worker that died and came back, with a pause between.
        (
            (
                *HEAD,
                (104.0, "block_restarting", 0),
                (106.0, "block_starting", 0),
                (107.0, "block_running", 0),
                (110.0, "block_finished", 0),
                (110.0, "run_ended"),
            ),
            10.0,
            5.0,
        ),
        # A driver that died without a word, and another an hour later.
        (
            (
                *HEAD,
                (110.0, "block_running", 1),
                (4000.0, "run_started"),
                (4001.0, "block_running", 1),
                (4003.0, "block_finished", 1),
                (4004.0, "run_ended"),
            ),
            14.0,
            10.0,
        ),
        # What is told of a worker that goes on training.
        (
            (
                *HEAD,
                (103.0, "block_rolled_back", 0),
                (104.0, "block_slow", 0),
                (105.0, "block_leaving", 0),
                (106.0, "block_paused", 0),
                (110.0, "run_ended"),
            ),
            10.0,
            4.0,
        ),
        # One that died, and nobody after it.
        ((*HEAD, (110.0, "block_finished", 0)), 10.0, 8.0),
        ((*HEAD, (103.0, "block_running", 1), (110.0, "block_finished", 0)), 10.0, 15.0),
    ],
)
def test_seconds(runs: tuple[RunDirectory, RunDirectory], lines: Any, wall: float, work: float) -> None:
    _journal(runs[0], *lines)
    found = side(runs[0], OURS)
    assert (found.wall_seconds, found.worker_seconds) == (pytest.approx(wall), pytest.approx(work))


def test_a_run_that_trains_counts_until_it_was_heard_of_last() -> None:
    events = [
        {"event": "run_started", "time": 100.0},
        {"event": "block_running", "time": 102.0, "block": 0},
    ]
    assert driven_seconds(events) == (2.0, 0.0)
    assert driven_seconds(events, 160.0) == (60.0, 58.0)
    assert driven_seconds([*events, {"event": "run_ended", "time": 110.0}], 160.0) == (10.0, 8.0)
