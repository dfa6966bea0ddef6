from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import start_run

from dbtrain.config import RunConfig
from dbtrain.monitoring.run_view import BlockView, Mark, Notice, RunView
from dbtrain.monitoring.web.state import encode_state
from dbtrain.orchestration.state import BlockState

FamilyConfig = Callable[..., RunConfig]


def _view(config: RunConfig, where: Path, count: int) -> RunView:
    """A run of `count` blocks, of which none has begun."""
    layout = start_run(config, where).plan.blocks[0]
    blocks = [BlockView(layout.model_copy(update={"index": index}), 10_000) for index in range(count)]
    return RunView("uri", "name", "blocks", 16, blocks)


def test_a_hundred_long_blocks_stay_small(family_config: FamilyConfig, tmp_path: Path) -> None:
    config = family_config("vit")
    view = _view(config, tmp_path / "run", 100)
    for block in view.blocks:
        for step in range(1, 601):
            block.losses.add(step, math.sin(step * (block.index + 1)) / 3 + 2)
            block.rates.add(step, 1000 / 7 + step % 13 / 3)
        block.marks = [Mark(1e9, step, "restart", "its process is gone" * 100) for step in range(1, 301)]
    view.notices = [Notice(1e9, "block_restarting", 1, "x" * 10_000) for _ in range(1000)]
    data = encode_state(view, config, 1e9)
    state = json.loads(data)
    assert len(data) < 8e6
    assert len(gzip.compress(data, 5)) < 1e6
    assert sum(len(block["losses"]["steps"]) for block in state["blocks"]) > 10_000
    assert all(block["losses"]["steps"][-1] == 600 for block in state["blocks"])
    assert max(len(notice["text"]) for notice in state["notices"]) <= 500


@pytest.mark.parametrize(("family", "unit", "high"), [("dit", "sigma", 80.0), ("masked_lm", "mask", 1.0)])
def test_the_noise_axis_has_its_unit(
    family_config: FamilyConfig, tmp_path: Path, family: str, unit: str, high: float
) -> None:
    config = family_config(family)
    run = start_run(config, tmp_path / "run")
    blocks = [BlockView(layout, run.plan.steps) for layout in run.plan.blocks]
    state = json.loads(encode_state(RunView(run.uri, "name", "blocks", 16, blocks), config, 0.0))
    ranges = [block["noise"] for block in state["blocks"]]
    assert state["run"]["noise"] == unit
    assert ranges[0][1] == high
    assert [low for low, _ in ranges[:-1]] == [high for _, high in ranges[1:]]


def test_blocks_that_wait_count_for_what_is_left(family_config: FamilyConfig, tmp_path: Path) -> None:
    config = family_config("vit")
    view = _view(config, tmp_path / "run", 3)
    assert view.all_seconds_left == math.inf
    first, second, third = view.blocks
    first.state, first.step, first.samples_per_second = BlockState.RUNNING, 5_000, 160.0
    assert view.seconds_left(first) == 500
    assert view.all_seconds_left == 2_500  # the other two take as long as two wholes of it
    for block in (second, third):
        block.state, block.samples_per_second = BlockState.RUNNING, 80.0
    assert view.all_seconds_left == 2_000  # the slowest
    for block in view.blocks:
        block.state, block.step = BlockState.FINISHED, block.total
    assert view.all_seconds_left == 0


def test_a_new_worker_after_a_lost_one_is_restarting(family_config: FamilyConfig, tmp_path: Path) -> None:
    config = family_config("vit")
    view = _view(config, tmp_path / "run", 2)
    for block, reason in zip(view.blocks, (None, "its process is gone"), strict=True):
        block.state, block.reason = BlockState.STARTING, reason
    state = json.loads(encode_state(view, config, 0.0))
    assert [block["state"] for block in state["blocks"]] == ["starting", "restarting"]


def test_keys_in_addresses_are_not_told(family_config: FamilyConfig, tmp_path: Path) -> None:
    config = family_config("vit")
    view = _view(config, tmp_path / "run", 1)
    view.uri = "s3://KEY:SECRET@bucket/run"
    view.blocks[0].reason = f"cannot write {view.uri}: away"
    assert b"SECRET" not in encode_state(view, config, 0.0)
