"""Blocks that average their stems, each in a process of its own, undisturbed and not."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import newest_files, start_run, train_block
from stem_processes import Workers, meetings

from dbtrain.config import RunConfig
from dbtrain.run_directory import RunDirectory
from dbtrain.training.checkpoint import checkpoint_steps, read_weights
from dbtrain.training.stem import stem_of
from dbtrain.training.trainer import BlockTrainer

SmallConfig = Callable[..., RunConfig]
Fleet = Callable[[RunDirectory], Workers]

pytestmark = pytest.mark.timeout(300)  # processes that load PyTorch, on few cores


@pytest.fixture
def workers() -> Iterator[Fleet]:
    """Makes the workers of a run, and ends them."""
    with ExitStack() as stack:
        yield lambda run: stack.enter_context(closing(Workers(run)))


def _averaged(small_config: SmallConfig, steps: int, every: int, count: int = 3, **blocks: Any) -> RunConfig:
    return small_config(
        blocks={"count": count, "stem": "averaged", "average_every": every, **blocks},
        training={"steps": steps},
        logging={"every": every},
    )


def _trained_together(config: RunConfig, where: Path, workers: Fleet) -> RunDirectory:
    run = start_run(config, where)
    fleet = workers(run)
    fleet.start(*range(config.blocks.count))
    fleet.run_to_end()
    return run


@pytest.mark.slow
def test_undisturbed_runs_have_one_schedule_and_one_digest(
    small_config: SmallConfig, tmp_path: Path, workers: Fleet
) -> None:
    config = _averaged(small_config, steps=60, every=10)
    first, second = (_trained_together(config, tmp_path / name, workers) for name in ("first", "second"))
    # No meeting follows the last step: layers are used with the stem they were trained with.
    schedule = [{"meeting": m, "step": 10 * (m + 1), "blocks": [0, 1, 2]} for m in range(5)]
    for block in range(3):
        assert meetings(first, block) == meetings(second, block) == schedule
        assert newest_files(first, block) == newest_files(second, block)


def test_the_stem_becomes_the_mean(small_config: SmallConfig, tmp_path: Path, workers: Fleet) -> None:
    # Of two numbers the mean does not depend on who adds: the same bytes as averaging by hand in one process.
    config = _averaged(small_config, steps=40, every=15, count=2)
    run = _trained_together(config, tmp_path / "processes", workers)
    private = config.model_copy(update={"blocks": config.blocks.model_copy(update={"stem": "private"})})
    by_hand = start_run(private, tmp_path / "hand")
    with ExitStack() as stack:
        trainers = [stack.enter_context(closing(BlockTrainer(by_hand, index, 1))) for index in (0, 1)]
        turns = [trainer.train() for trainer in trainers]  # which report every 15 steps, too
        while not all(progress.done for progress in [next(turn) for turn in turns]):
            if trainers[0].step > 0:
                _average(trainers)
    for block in (0, 1):
        for which in ("raw", "ema"):
            ours, theirs = (read_weights(each.block(block), which)[1] for each in (run, by_hand))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_killed_block_is_skipped_and_joins_again(small_config: SmallConfig, tmp_path: Path, workers: Fleet) -> None:
    run = start_run(_averaged(small_config, steps=140, every=10), tmp_path)
    fleet = workers(run)
    fleet.start(0, 1, 2)
    fleet.allow(35, 0, 1, 2)
    fleet.wait(35, 0, 1, 2)
    fleet.kill(1)
    fleet.allow(95, 0, 2)
    fleet.wait(95, 0, 2)
    assert checkpoint_steps(run.block(1))[-1] == 20
    fleet.start(1)
    fleet.allow(30, 1)
    fleet.wait_arrivals(1)
    fleet.run_to_end()

    def schedule(start: int, numbers: range, blocks: list[int]) -> list[dict[str, Any]]:
        return [{"meeting": m, "step": start + 10 * i, "blocks": blocks} for i, m in enumerate(numbers)]

    for block in (0, 2):
        told = meetings(run, block)
        assert told[:3] == schedule(10, range(3), [0, 1, 2])
        assert told[3:9] == schedule(40, range(3, 9), [0, 2])
        assert told[9:] == schedule(100, range(9, 13), [0, 1, 2])
    # The open meeting is number 9, whatever the step of who comes; after the others have left, it is alone.
    told = meetings(run, 1, attempt=2)
    assert told[:4] == schedule(30, range(9, 13), [0, 1, 2])
    assert told[4:] == schedule(70, range(13, 20), [1])


@pytest.mark.slow
def test_a_stopped_process_costs_the_patience_once(small_config: SmallConfig, tmp_path: Path, workers: Fleet) -> None:
    patience, late = 5.0, 60  # 60 times the patience is more than `wait` waits
    run = start_run(_averaged(small_config, steps=10 * late + 100, every=10, average_patience=patience), tmp_path)
    fleet = workers(run)
    fleet.start(0, 1, 2)
    for step in (5, 15):  # all are up before any of them waits for the others
        fleet.allow(step, 0, 1, 2)
        fleet.wait(step, 0, 1, 2)
    fleet.signal(1, signal.SIGSTOP)
    fleet.allow(10 * late + 5, 0, 2)
    fleet.wait(10 * late + 5, 0, 2)
    fleet.signal(1, signal.SIGCONT)
    fleet.allow(20, 1)
    fleet.wait_arrivals(1)
    fleet.run_to_end()
    for block in (0, 2):
        told = meetings(run, block)
        assert [line["blocks"] for line in told[:late]] == [[0, 1, 2]] + [[0, 2]] * (late - 1)
        assert [line["step"] for line in told] == [10 * (m + 1) for m in range(len(told))]
    assert meetings(run, 1)[1]["meeting"] == late
    assert meetings(run, 1)[1]["blocks"] == [0, 1, 2]


@pytest.mark.slow
def test_a_member_killed_while_stems_are_summed_leaves_the_others_their_own(
    small_config: SmallConfig, tmp_path: Path, workers: Fleet
) -> None:
    run = start_run(_averaged(small_config, steps=60, every=10, average_patience=10.0), tmp_path)
    fleet = workers(run)
    fleet.start(0, 1, 2)
    fleet.allow(5, 0, 1, 2)
    fleet.wait(5, 0, 1, 2)
    fleet.allow(10, 0, 1)
    # Two wait in meeting 0 for the third; one of them is stopped there, so that the sum cannot be had.
    fleet.wait_arrivals(0, 1)
    fleet.signal(1, signal.SIGSTOP)
    fleet.allow(60, 0, 2)
    fleet.wait(15, 0, 2)
    fleet.kill(1)
    fleet.run_to_end()
    for block in (0, 2):
        told = meetings(run, block)
        assert told[0]["meeting"] == 0
        assert "failed" in told[0]
        assert [line["blocks"] for line in told[1:]] == [[0, 2]] * 4


def test_private_stems_meet_nobody(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(small_config(training={"steps": 30}), tmp_path)
    with closing(BlockTrainer(run, 0, 1)) as trainer:
        assert trainer._stems is None
    train_block(run, attempt=2)
    assert not any("meetings" in line for line in run.block(0).metrics())


@torch.no_grad()
def _average(trainers: list[BlockTrainer]) -> None:
    stems = [stem_of(trainer.module) for trainer in trainers]
    for name in stems[0]:
        mean = (stems[0][name] + stems[1][name]) / 2
        for stem in stems:
            stem[name].copy_(mean)
