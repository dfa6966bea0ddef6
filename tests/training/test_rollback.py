"""Going back to a checkpoint because of NaN and infinity, and on with other samples; always in the same way."""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import Opener, assert_same, save_all, snapshot
from small_runs import newest_files, start_run
from torch import Tensor

from dbtrain.config import RunConfig
from dbtrain.data.loader import BatchLoader
from dbtrain.run_directory import BlockDirectory, RunDirectory, StaleAttempt
from dbtrain.training.checkpoint import CheckpointStore, checkpoint_steps, read_state, read_weights
from dbtrain.training.progress import Progress
from dbtrain.training.rollback import MAX_CONSECUTIVE_SKIPS, NonFiniteError
from dbtrain.training.trainer import BlockTrainer

SmallConfig = Callable[..., RunConfig]


class _Killed(Exception):
    pass


class _BadLoader:
    """Has a NaN in the batches at some places of the order of samples."""

    def __init__(self, loader: BatchLoader, bad: Container[int]):
        self._loader, self._bad = loader, bad
        self.asked: list[int] = []

    def batch(self, cursor: int) -> dict[str, Tensor]:
        self.asked.append(cursor)
        batch = self._loader.batch(cursor)
        if cursor in self._bad:
            batch["image"][3] = float("nan")
        return batch


class _Disturbed(BlockTrainer):
    """Trains on bad batches; is asked to stop or dies at some steps, or has a weight damaged."""

    def disturb(self, bad: Container[int] = (), stop: int = -1, death: int = -1, damage: int = -1) -> _BadLoader:
        self._stop_at, self._death_at, self._damage_at = stop, death, damage
        loader = _BadLoader(self._loader, bad)
        self._loader = loader  # type: ignore[assignment]
        return loader

    def _train_step(self) -> Tensor:
        norm = super()._train_step()
        if self.step == self._death_at:
            raise _Killed
        if self.step == self._stop_at:
            self.request_stop()
        if self.step == self._damage_at:
            self._damage_at = -1
            with torch.no_grad():
                self.module.get_parameter("head.weight")[0, 0] = float("inf")
        return norm


def _train(run: RunDirectory, attempt: int = 1, **disturbances: Any) -> tuple[list[Progress], list[int]]:
    """Its reports, and which batches it asked for."""
    reports: list[Progress] = []
    with closing(_Disturbed(run, 0, attempt)) as trainer, suppress(_Killed):
        loader = trainer.disturb(**disturbances)
        reports.extend(trainer.train())
    return reports, loader.asked


def _config(small_config: SmallConfig, every: int = 10, logging: int = 10, **training: Any) -> RunConfig:
    return small_config(training={"steps": 60, **training}, checkpoints={"every": every}, logging={"every": logging})


def _events(run: RunDirectory) -> list[tuple[int, int]]:
    return [(line["from_step"], line["step"]) for line in run.block(0).metrics() if "event" in line]


def test_other_samples_follow(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(_config(small_config, logging=1), tmp_path)
    bad = range(15, 15 + MAX_CONSECUTIVE_SKIPS)
    reports, asked = _train(run, bad=bad)
    # In the steps from 15 to 20 nothing changed: the checkpoint of step 20 is as good as one of step 15.
    assert asked == [*range(35), *range(35, 75)]
    steps = [report.step for report in reports]
    assert steps[steps.index(34) :] == [34, 20, *range(21, 60), 60]
    assert [report.rollbacks for report in reports] == [0] * 35 + [1] * 41
    assert reports[-1].done
    assert read_state(run.block(0))["rollbacks"] == [{"from": 35, "to": 20}]
    assert _events(run) == [(35, 20)]
    assert all(bool(value.isfinite().all()) for value in read_weights(run.block(0), "raw")[1].values())


def test_looking_less_often_changes_nothing(small_config: SmallConfig, tmp_path: Path) -> None:
    files = []
    for logging in (1, 7, 1000):
        run = start_run(_config(small_config, logging=logging), tmp_path / str(logging))
        _train(run, bad=range(15, 35))
        files.append(newest_files(run))
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize(
    ("every", "keep", "bad", "rolled_back"),
    [
        (10, 2, range(15, 35), [{"from": 35, "to": 20}]),
        (10, 1, range(15, 35), [{"from": 35, "to": 30}]),
        (20, 2, range(25, 45), [{"from": 45, "to": 20}]),
        (100, 2, range(25, 45), [{"from": 45, "to": 0}]),
        (10, 2, [*range(15, 35), *range(45, 65)], [{"from": 35, "to": 20}, {"from": 50, "to": 30}]),
    ],
)
def test_stopped_and_killed(
    small_config: SmallConfig, tmp_path: Path, every: int, keep: int, bad: Container[int], rolled_back: list[object]
) -> None:
    config = _config(small_config, every)
    config = config.model_copy(update={"checkpoints": config.checkpoints.model_copy(update={"keep": keep})})
    undisturbed = start_run(config, tmp_path / "a")
    assert _train(undisturbed, bad=bad)[0][-1].done
    assert read_state(undisturbed.block(0))["rollbacks"] == rolled_back
    run = start_run(config, tmp_path / "b")
    # Stops before, in the middle of, and after the bad part leave checkpoints of their own there.
    blows = [{"stop": 17}, {"stop": 29}, {"stop": 33}, {"stop": 34}, {"death": 22}, {"death": 26}, {"stop": 27}]
    for attempt, blow in enumerate([*blows, {"death": 44}, {"stop": 43}, {"death": 51}, {}], start=1):
        last = _train(run, attempt, bad=bad, **blow)[0][-1]
    assert last.done
    assert newest_files(run) == newest_files(undisturbed)


def test_back_to_the_beginning(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(_config(small_config, every=100), tmp_path / "a")
    with closing(BlockTrainer(start_run(_config(small_config), tmp_path / "b"), 0, 1)) as fresh:
        initial = {name: value.detach().clone() for name, value in fresh.module.named_parameters()}
    with closing(_Disturbed(run, 0, 1)) as trainer:
        loader = trainer.disturb(bad=range(8, 28))
        for report in trainer.train():
            if report.rollbacks:
                break
        assert report.step == trainer.step == 0
        assert not trainer.optimizer.state
        assert trainer.ema is not None
        for name, value in trainer.module.named_parameters():
            assert torch.equal(value, initial[name])
            assert torch.equal(trainer.ema.tensors()[name], initial[name])
    assert loader.asked == list(range(30))
    assert _train(run, attempt=2, bad=range(8, 28))[1] == [*range(30), *range(28, 88)]


def test_a_limited_number_of_times(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(_config(small_config, max_rollbacks=2), tmp_path)
    for attempt in (1, 2):  # a new attempt does not begin to count anew
        with pytest.raises(NonFiniteError, match=r"block 0: .*optimiser\.lr"):
            _train(run, attempt, bad=range(15, 1000))
        assert _events(run) == [(35, 20), (40, 20)]
    assert checkpoint_steps(run.block(0))[-1] == 30
    assert len(read_state(run.block(0))["rollbacks"]) == 2


def test_a_damaged_weight(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(_config(small_config), tmp_path)
    reports, asked = _train(run, damage=12)
    assert asked == [*range(20), *range(20, 70)]
    assert reports[-1].done
    assert _events(run) == [(20, 10)]


def test_a_stop_saves_no_damaged_weight(
    small_config: SmallConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = start_run(_config(small_config), tmp_path)
    last = _train(run, damage=12, stop=14)[0][-1]
    assert (last.step, last.checkpoint_step, last.done, last.rollbacks) == (10, 10, False, 0)
    assert checkpoint_steps(run.block(0)) == [10]
    assert "stops at step 10, not 14" in caplog.text
    assert _train(run, attempt=2)[0][-1].done


@pytest.mark.parametrize(("damaged", "gone_back_to"), [([30], 40), ([30, 40], 0)])
def test_a_damaged_checkpoint_is_not_gone_back_to(
    small_config: SmallConfig, tmp_path: Path, damaged: list[int], gone_back_to: int
) -> None:
    run = start_run(_config(small_config), tmp_path)
    with closing(_Disturbed(run, 0, 1)) as trainer:
        trainer.disturb(bad=range(29, 49))
        reports = trainer.train()
        while next(reports).step < 40:
            pass
        trainer._store.wait()
        for step in damaged:
            run.block(0).checkpoints.write_atomic(f"step-{step:08d}/MANIFEST", b"torn")
        with pytest.warns(UserWarning, match="damaged checkpoint"):
            assert list(reports)[-1].done
    assert _events(run) == [(49, gone_back_to)]


def _cadenced(block: BlockDirectory, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(block, 1, keep, regular=lambda step: step % 10 == 0)


def test_checkpoints_of_stops_do_not_count_as_kept(block: BlockDirectory) -> None:
    with closing(_cadenced(block)) as store:
        save_all(store, 10, 20, 23, 24)
        assert store.steps() == [10, 20, 24]
        save_all(store, 30)
        assert store.steps() == [20, 30]


@pytest.mark.parametrize(("well_until", "expected"), [(35, 30), (30, 30), (29, 20), (20, 20), (19, 20), (3, 20)])
def test_where_to_go_back_to(block: BlockDirectory, open_store: Opener, well_until: int, expected: int) -> None:
    save_all(open_store(block, keep=5), 10, 20, 30, 34)  # 10: left by a death between saving and removing
    with closing(_cadenced(block)) as store:
        assert_same(store.go_back(well_until), snapshot(expected))
        assert store.durable_step == expected
        assert store.steps() == [step for step in (10, 20, 30) if step <= expected]


def test_an_older_attempt_removes_nothing(block: BlockDirectory) -> None:
    with closing(_cadenced(block)) as store:
        save_all(store, 10, 20)
        block.claim(2)
        with pytest.raises(StaleAttempt):
            store.go_back(10)
    assert checkpoint_steps(block) == [10, 20]
