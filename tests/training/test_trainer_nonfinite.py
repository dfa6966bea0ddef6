"""NaN and infinity, without roll-backs: one bad batch is passed over, and what does not get better ends the block."""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from contextlib import closing
from pathlib import Path

import pytest
import torch
from small_runs import start_run, train_block
from torch import Tensor

from dbtrain.config import RunConfig
from dbtrain.run_directory import RunDirectory
from dbtrain.training.checkpoint import checkpoint_steps, read_weights
from dbtrain.training.optimisation import optimizer_tensors
from dbtrain.training.rollback import MAX_CONSECUTIVE_SKIPS, NonFiniteError
from dbtrain.training.trainer import BlockTrainer

SmallConfig = Callable[..., RunConfig]
LASTING = {"steps": 60, "max_rollbacks": 0}


class _Poisoned(BlockTrainer):
    """Sees a NaN in the batches of `bad` steps."""

    bad: Container[int] = ()

    def _train_step(self) -> Tensor:
        loader, step = self._loader, self.step
        if step in self.bad:
            batch = loader.batch(step)
            batch["image"][3] = float("nan")
            self._loader = type("Bad", (), {"batch": lambda _, number: batch})()
        try:
            return super()._train_step()
        finally:
            self._loader = loader


def _train(run: RunDirectory, bad: Container[int], attempt: int = 1) -> None:
    with closing(_Poisoned(run, 0, attempt)) as trainer:
        trainer.bad = bad
        for _ in trainer.train():
            pass


def _saved_is_finite(run: RunDirectory) -> bool:
    return all(
        bool(value.isfinite().all())
        for which in ("raw", "ema")
        for value in read_weights(run.block(0), which)[1].values()  # type: ignore[arg-type]
    )


def test_a_bad_batch_changes_nothing(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(small_config(training={"steps": 8}, logging={"every": 1}), tmp_path)
    with closing(_Poisoned(run, 0, attempt=1)) as trainer:
        trainer.bad = {0, 4, 5}
        reports = trainer.train()
        next(reports)
        states = []
        for _ in reports:
            tensors = {
                **dict(trainer.module.named_parameters()),
                **optimizer_tensors(trainer.module, trainer.optimizer),
            }
            states.append({name: value.detach().clone() for name, value in tensors.items()})
    for index, same in enumerate([False, False, False, True, True, False, False], start=1):
        before, after = states[index - 1], states[index]
        assert all(torch.equal(before[name], after[name]) for name in after) == same, index
    assert all(bool(value.isfinite().all()) for value in states[-1].values())
    steps = [value for name, value in states[-1].items() if name.endswith("/step")]
    assert {float(value) for value in steps} == {5.0}
    lines = run.block(0).metrics()
    assert [line["skipped"] for line in lines] == [1, 0, 0, 0, 1, 2, 0, 0]
    assert [line["loss"] is None for line in lines] == [True, False, False, False, True, True, False, False]


def test_metrics_stay_json(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(small_config(training={"steps": 4}, logging={"every": 2}), tmp_path)
    _train(run, {1})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for line in run.block(0).storage.read_text("metrics.jsonl").splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("logging", [1, 7, 1000])
def test_too_many_in_a_row(small_config: SmallConfig, tmp_path: Path, logging: int) -> None:
    config = small_config(training=LASTING, checkpoints={"every": 10}, logging={"every": logging})
    run = start_run(config, tmp_path)
    # The last steps are good again: whether a block gives up must not depend on when somebody looks.
    with pytest.raises(NonFiniteError, match=r"block 0: .*optimiser\.lr"):
        _train(run, range(15, 15 + MAX_CONSECUTIVE_SKIPS))
    assert checkpoint_steps(run.block(0))[-1] < 15 + MAX_CONSECUTIVE_SKIPS
    assert _saved_is_finite(run)
    # Once what was wrong is mended, the block goes on.
    assert train_block(run, attempt=2)[-1].done
    assert _saved_is_finite(run)


def test_one_fewer_is_passed_over(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(small_config(training={"steps": 60}, logging={"every": 1}), tmp_path)
    _train(run, [*range(5, 4 + MAX_CONSECUTIVE_SKIPS), *range(30, 29 + MAX_CONSECUTIVE_SKIPS)])
    assert checkpoint_steps(run.block(0))[-1] == 60


def test_counting_goes_on_after_a_restart(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(small_config(training=LASTING, checkpoints={"every": 10}), tmp_path)
    bad = range(15, 200)
    with closing(_Poisoned(run, 0, attempt=1)) as trainer:
        trainer.bad = bad
        for report in trainer.train():
            if report.step == 30:
                trainer.request_stop()
    assert checkpoint_steps(run.block(0))[-1] == 30
    with pytest.raises(NonFiniteError):
        _train(run, bad, attempt=2)
    assert run.block(0).metrics()[-1]["step"] == 40
    assert checkpoint_steps(run.block(0))[-1] == 30


def test_a_run_that_ends_badly_is_not_finished(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(small_config(training=LASTING | {"steps": 30}, checkpoints={"every": 100}), tmp_path)
    with pytest.raises(NonFiniteError):
        _train(run, range(5, 30))
    assert checkpoint_steps(run.block(0)) == []


def test_a_damaged_weight_is_not_saved(small_config: SmallConfig, tmp_path: Path) -> None:
    training = LASTING | {"steps": 30}
    run = start_run(small_config(training=training, checkpoints={"every": 10}, logging={"every": 3}), tmp_path)
    with closing(BlockTrainer(run, 0, attempt=1)) as trainer:
        reports = trainer.train()
        while next(reports).step < 12:
            pass
        with torch.no_grad():
            trainer.module.get_parameter("head.weight")[0, 0] = float("inf")
        with pytest.raises(NonFiniteError, match=r"head\.weight"):
            list(reports)
    assert checkpoint_steps(run.block(0)) == [10]
    assert train_block(run, attempt=2)[-1].done
