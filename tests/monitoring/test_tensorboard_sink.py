from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import start_run, train_block

from dbtrain.config import RunConfig
from dbtrain.monitoring.forward import Memory, forward

pytest.importorskip("tensorboard")


def test_each_block_has_its_figures_at_their_steps_and_times(
    small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from dbtrain.monitoring.tensorboard_sink import TensorBoardSink

    run = start_run(small_config(training={"steps": 6}, logging={"every": 2}), tmp_path / "run")
    train_block(run, 0)
    run.block(2).log_metrics({"step": 2, "loss": None})
    over = threading.Event()
    over.set()
    forward(run, TensorBoardSink(run), Memory.load(run, "tensorboard"), over)
    for line in ({"step": 2, "loss": 9.0}, {"step": 4, "loss": 1.5}):  # the first once more, as after a restart
        run.block(2).log_metrics(line)
    forward(run, TensorBoardSink(run), Memory.load(run, "tensorboard"), over)

    assert sorted(path.name for path in (tmp_path / "run/tensorboard").iterdir()) == ["block-00", "block-02"]
    told = run.block(0).metrics()
    written = EventAccumulator(str(tmp_path / "run/tensorboard/block-00")).Reload()
    assert {"loss", "grad_norm", "lr", "samples_per_second", "peak_memory"} <= set(written.Tags()["scalars"])
    losses = written.Scalars("loss")
    assert [event.step for event in losses] == [line["step"] for line in told] == [2, 4, 6]
    assert [event.value for event in losses] == pytest.approx([line["loss"] for line in told], rel=1e-6)
    assert [event.wall_time for event in losses] == pytest.approx([line["time"] for line in told], abs=0.01)
    again = EventAccumulator(str(tmp_path / "run/tensorboard/block-02")).Reload().Scalars("loss")
    assert [event.step for event in again] == [2, 4]
    assert [math.isnan(event.value) for event in again] == [True, False]
