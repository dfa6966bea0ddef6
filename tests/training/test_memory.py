from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import start_run

from dbtrain.config import RunConfig
from dbtrain.training.memory import is_out_of_memory, oom_advice

SmallConfig = Callable[..., RunConfig]


@pytest.mark.parametrize(
    "allocate", [lambda: torch.empty(1 << 52), lambda: np.empty(1 << 52), lambda: bytearray(1 << 58)]
)
def test_allocations_that_fail(allocate: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    assert is_out_of_memory(caught.value)


def test_other_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError(2, "No such file or directory"))


def test_advice_names_what_can_still_be_done(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(small_config(training={"batch_size": 15, "accumulate": 3}), tmp_path / "a")
    advice = oom_advice(run.config, run.plan, 2)
    assert advice.startswith("block 2 ran out of memory")
    assert "training.accumulate=5" in advice  # 4 does not divide 15
    assert "blocks.count above 3: `dbtrain plan CONFIG --memory SIZE`" in advice
    config = small_config(training={"batch_size": 4, "accumulate": 4, "recompute": True})
    advice = oom_advice(config, start_run(config, tmp_path / "b", "end_to_end").plan, 0)
    assert advice.endswith("(go on with this one on a larger device)")
