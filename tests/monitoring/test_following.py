from __future__ import annotations

import select
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import start_run

from dbtrain.config import RunConfig
from dbtrain.monitoring.following import POINTS, Follower, Frame
from dbtrain.run_directory import RunDirectory

SmallConfig = Callable[..., RunConfig]
PATIENCE = 60.0  # seconds


@pytest.fixture
def run(small_config: SmallConfig, tmp_path: Path) -> RunDirectory:
    return start_run(small_config(training={"steps": 1000}), tmp_path / "run")


def tell(run: RunDirectory, step: int) -> None:
    line = {"step": step, "loss": 1.0, "grad_norm": 0.5, "lr": 1e-3, "samples_per_second": 50.0, "checkpoint_step": 0}
    run.block(0).log_metrics(line)


def frame_where(follower: Follower, met: Callable[[Frame], bool]) -> Frame:
    deadline = time.monotonic() + PATIENCE
    while not met(frame := follower.newest()):
        assert time.monotonic() < deadline
        select.select([follower.descriptor], [], [], PATIENCE)
    return frame


def test_frames_follow_the_run_and_stay_as_they_are(run: RunDirectory) -> None:
    for step in range(1, 101):
        tell(run, step)
    with Follower(run, 0.01) as follower:
        first = follower.newest()
        assert first.view.blocks[0].step == 100
        assert len(first.view.blocks[0].losses.values) == POINTS
        tell(run, 200)
        later = frame_where(follower, lambda frame: frame.view.blocks[0].step == 200)
    assert first.view.blocks[0].step == 100
    assert len(first.view.blocks[0].recent) == len(later.view.blocks[0].recent) == 50
    assert first.view.blocks[0].recent[-1]["step"] == 100
    assert later.at >= first.at


def test_a_directory_that_vanishes_and_comes_back_as_another_run(
    run: RunDirectory, small_config: SmallConfig, tmp_path: Path
) -> None:
    for step in (10, 20, 30):
        tell(run, step)
    path = tmp_path / "run"
    with Follower(run, 0.01) as follower:
        path.rename(tmp_path / "away")
        frame = frame_where(follower, lambda frame: frame.problem is not None)
        assert "is not there any more" in str(frame.problem)
        assert frame.view.blocks[0].step == 30  # what is known is still shown
        (tmp_path / "away").rename(path)
        assert frame_where(follower, lambda frame: frame.problem is None).view.blocks[0].losses.steps == [10, 20, 30]

        shutil.rmtree(path)
        frame_where(follower, lambda frame: frame.problem is not None)
        path.mkdir()
        frame_where(follower, lambda frame: "is not a run directory" in str(frame.problem))
        another = start_run(small_config(blocks={"count": 2}), path)
        tell(another, 5)
        frame = frame_where(follower, lambda frame: frame.problem is None and frame.view.blocks[0].step == 5)
        assert len(frame.view.blocks) == 2


def test_a_bug_is_not_swallowed(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    with Follower(run, 0.01) as follower:

        def broken() -> Frame:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(follower, "_look", broken)
        with pytest.raises(ZeroDivisionError):
            frame_where(follower, lambda frame: False)
