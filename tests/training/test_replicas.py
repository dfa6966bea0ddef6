"""Several workers of one block, as real processes that talk over gloo: the same training as by one."""

from __future__ import annotations

import os
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from replica_groups import FamilyConfig, Start, finish, losses, replicated
from small_runs import newest_files, start_run, train_block
from torch import Tensor

from dbtrain.plan import Kind
from dbtrain.run_directory import RunDirectory
from dbtrain.training.checkpoint import checkpoint_steps, read_weights
from dbtrain.training.seat import Seat
from dbtrain.training.trainer import BlockTrainer

pytestmark = pytest.mark.timeout(300)
WHICH: tuple[Literal["raw", "ema"], ...] = ("raw", "ema")


def _tensors(run: RunDirectory) -> dict[str, Tensor]:
    weights = {which: read_weights(run.block(0), which)[1] for which in WHICH}
    return {f"{which}/{name}": value for which in WHICH for name, value in weights[which].items()}


def _assert_same_training(one: RunDirectory, several: RunDirectory) -> None:
    assert losses(several) == pytest.approx(losses(one), rel=1e-4)
    expected, found = _tensors(one), _tensors(several)
    assert {name: value.shape for name, value in found.items()} == {n: value.shape for n, value in expected.items()}
    for name, value in found.items():
        if name.endswith("reader.kv.bias"):
            # What all keys have in common changes no attention: its gradient is rounding alone, which Adam makes large.
            value, expected[name] = value.chunk(2)[1], expected[name].chunk(2)[1]
        # Adam divides by the gradient's own size: where that is rounding, so is the update.
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize(
    ("family", "shard", "sections", "kind"),
    [
        ("vit", False, {"training": {"accumulate": 2}, "data": {"augment": {"crop_padding": 1}}}, "blocks"),
        ("vit", True, {"training": {"accumulate": 2}, "data": {"augment": {"crop_padding": 1}}}, "blocks"),
        ("causal_lm", False, {}, "blocks"),
        ("causal_lm", True, {"training": {"recompute": True}}, "blocks"),
        pytest.param("masked_lm", False, {}, "blocks", marks=pytest.mark.slow),
        pytest.param("masked_lm", True, {}, "blocks", marks=pytest.mark.slow),
        pytest.param("dit", True, {"training": {"recompute": True}}, "blocks", marks=pytest.mark.slow),
        pytest.param("recurrent_lm", True, {}, "blocks", marks=pytest.mark.slow),
        pytest.param("recurrent_lm", False, {}, "end_to_end", marks=pytest.mark.slow),
        pytest.param("recurrent_lm", True, {}, "end_to_end", marks=pytest.mark.slow),
    ],
)
def test_the_same_loss_curve(
    family_config: FamilyConfig,
    tmp_path: Path,
    start_replicas: Start,
    family: str,
    shard: bool,
    sections: dict[str, Any],
    kind: Kind,
) -> None:
    sections = {**sections, "resources": {"shard": shard}}
    one, two = (start_run(replicated(family_config, family, **sections), tmp_path / n, kind) for n in ("one", "two"))
    train_block(one)
    finish(start_replicas(two))
    _assert_same_training(one, two)


@pytest.mark.parametrize("shard", [False, True])
def test_one_then_two_then_one(family_config: FamilyConfig, tmp_path: Path, start_replicas: Start, shard: bool) -> None:
    """Checkpoints do not tell how many workers wrote them."""
    config = replicated(family_config, "vit", resources={"shard": shard})
    one, changing = (start_run(config, tmp_path / name) for name in ("one", "changing"))
    train_block(one)
    with closing(BlockTrainer(changing, 0, 1, Seat(until=4))) as trainer:
        assert [report.step for report in trainer.train()][-1] == 4
    group = start_replicas(changing, attempt=2, until=8)
    assert [replica.outcome() for replica in group] == [("stopped", 8, "")] * 2
    assert checkpoint_steps(changing.block(0))[-1] == 8
    train_block(changing, attempt=3)
    _assert_same_training(one, changing)
    assert newest_files(changing).keys() == newest_files(one).keys()


@pytest.mark.parametrize("shard", [False, True])
def test_a_bad_sample_of_one_replica_is_passed_over_by_all(
    family_config: FamilyConfig, tmp_path: Path, start_replicas: Start, shard: bool
) -> None:
    run = start_run(replicated(family_config, "vit", resources={"shard": shard}), tmp_path / "run")
    finish(start_replicas(run, poisoned=(2, 5, 6)))
    lines = run.block(0).metrics()
    assert [line["skipped"] for line in lines] == [0, 0, 1, 0, 0, 1, 2, 0, 0, 0, 0, 0]
    assert [line["loss"] is None for line in lines] == [line["skipped"] > 0 for line in lines]
    assert [line["grad_norm"] is None for line in lines] == [line["skipped"] > 0 for line in lines]
    assert all(bool(value.isfinite().all()) for value in _tensors(run).values())


def test_a_stop_that_one_hears_of_stops_all(family_config: FamilyConfig, tmp_path: Path, start_replicas: Start) -> None:
    run = start_run(replicated(family_config, "vit", training={"steps": 2000}), tmp_path / "run")
    ends = [replica.outcome() for replica in start_replicas(run, stop_at=6)]
    assert ends == [("stopped", ends[0][1], "")] * 2
    assert 6 <= ends[0][1] <= 8
    assert checkpoint_steps(run.block(0))[-1] == ends[0][1]


def test_a_full_disk_holds_up_all_and_lets_all_go(
    family_config: FamilyConfig, small_disk: Path, start_replicas: Start
) -> None:
    """Replica 0 alone finds no room, and it alone is asked to stop."""
    config = replicated(
        family_config,
        "vit",
        blocks={"count": 4},
        training={"steps": 24},
        ema={"half_life": 0},
        checkpoints={"every": 6, "keep": 1},
    )
    run = start_run(config, small_disk / "run")
    assert [replica.outcome() for replica in start_replicas(run, until=6)] == [("stopped", 6, "")] * 2
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    # Enough for a claim and for metrics, and not for a checkpoint.
    os.truncate(filler, filler.stat().st_size - 16384)
    assert [replica.outcome() for replica in start_replicas(run, attempt=2)] == [("stopped", 6, "")] * 2
    assert checkpoint_steps(run.block(0)) == [6]
    filler.unlink()
    finish(start_replicas(run, attempt=3))
