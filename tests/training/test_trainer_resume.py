"""Interrupted and started again, a block has the same bytes: parameters, averages, optimiser."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import newest_files, start_run, train_block
from torch import Tensor

from dbtrain.config import RunConfig
from dbtrain.plan import Kind
from dbtrain.training.checkpoint import checkpoint_steps
from dbtrain.training.trainer import BlockTrainer

SmallConfig = Callable[..., RunConfig]
STEPS = 29

# Dropout, augmentation and averages are on in all of them.
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"training": {"accumulate": 4}},
    "cosine": {"schedule": {"warmup_steps": 7, "min_lr": 1e-5}},
    "constant": {"schedule": {"kind": "constant", "warmup_steps": 20}},
    "ramp-up": {"ema": {"half_life": 10_000, "ramp_up": 0.5}},
    "no averages": {"ema": {"half_life": 0}},
    "bfloat16": {"training": {"precision": "bfloat16"}},
    "no clipping": {"optimiser": {"clip_norm": None}},
    "adafactor": {"optimiser": {"kind": "adafactor", "lr": 1e-2}},
    "epochs": {"training": {"batch_size": 512}, "data": {"augment": {"crop_padding": 2, "flip": True}}},
}


class _Interrupted(Exception):
    pass


class _StopsAt(BlockTrainer):
    """Is asked to stop, or dies, in the middle of step `at`."""

    at = 0
    dies = False

    def _train_step(self) -> Tensor:
        norm = super()._train_step()
        if self.step == self.at:
            if self.dies:
                raise _Interrupted
            self.request_stop()
        return norm


def _config(small_config: SmallConfig, recipe: dict[str, Any], **sections: Any) -> RunConfig:
    training = {"steps": STEPS, "batch_size": 16, **recipe.get("training", {})}
    merged = {"checkpoints": {"every": 10}, "logging": {"every": 4}, **recipe, **sections, "training": training}
    return small_config(**merged)


@pytest.mark.parametrize(("name", "kind"), [*((name, "blocks") for name in RECIPES), ("plain", "end_to_end")])
def test_stopped_and_killed(
    small_config: SmallConfig, tmp_path: Path, name: str, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPES[name]
    config = _config(small_config, recipe)
    undisturbed = start_run(config, tmp_path / "a", kind)
    train_block(undisturbed)
    disturbed = start_run(config, tmp_path / "b", kind)
    for attempt, (at, dies, left) in enumerate([(7, False, 7), (19, True, 10), (23, False, 23), (25, True, 23)], 1):
        monkeypatch.setattr(_StopsAt, "at", at)
        monkeypatch.setattr(_StopsAt, "dies", dies)
        torch.manual_seed(attempt)
        with closing(_StopsAt(disturbed, 0, attempt)) as trainer, suppress(_Interrupted):
            last = list(trainer.train())[-1]
            assert (last.step, last.checkpoint_step, last.done) == (at, at, False)
        assert checkpoint_steps(disturbed.block(0))[-1] == left
    assert train_block(disturbed, attempt=9)[-1].done
    files = newest_files(undisturbed)
    assert set(files) >= {"state.json"}
    assert len(files) == (3 if config.ema.half_life == 0 else 4)
    assert newest_files(disturbed) == files


def test_cadences_do_not_matter(small_config: SmallConfig, tmp_path: Path) -> None:
    files = []
    for name, saving, logging in (("a", 5, 1), ("b", 1000, 1000)):
        config = _config(small_config, {}, checkpoints={"every": saving}, logging={"every": logging})
        run = start_run(config, tmp_path / name)
        train_block(run)
        files.append(newest_files(run))
    assert files[0] == files[1]


def test_stopped_before_the_first_step(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(_config(small_config, {}), tmp_path)
    with closing(BlockTrainer(run, 0, 1)) as trainer:
        trainer.request_stop()
        assert [(r.step, r.done) for r in trainer.train()] == [(0, False), (0, False)]
    assert checkpoint_steps(run.block(0)) == []


def test_a_damaged_checkpoint_costs_time_and_nothing_else(small_config: SmallConfig, tmp_path: Path) -> None:
    config = _config(small_config, {})
    undisturbed = start_run(config, tmp_path / "a")
    train_block(undisturbed)
    run = start_run(config, tmp_path / "b")
    train_block(run)
    storage = run.block(0).checkpoints
    newest = f"step-{STEPS:08d}"
    name = next(name for name in storage.list(newest) if name.startswith("optimizer"))
    storage.write_atomic(f"{newest}/{name}", b"x" + storage.read_bytes(f"{newest}/{name}")[1:])
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        reports = train_block(run, attempt=2)
    assert reports[0].step == 20
    assert newest_files(run) == newest_files(undisturbed)
