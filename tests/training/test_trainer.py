from __future__ import annotations

import gc
import random
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import newest_files, start_run, train_block

from dbtrain.config import RunConfig
from dbtrain.errors import CorruptData, UserError
from dbtrain.models.vit import ViTFamily
from dbtrain.run_directory import StaleAttempt
from dbtrain.training.checkpoint import CheckpointStore, Snapshot, checkpoint_steps, read_weights
from dbtrain.training.trainer import BlockTrainer

SmallConfig = Callable[..., RunConfig]


def test_reports_and_metrics(small_config: SmallConfig, tmp_path: Path) -> None:
    config = small_config(training={"steps": 25}, logging={"every": 10}, checkpoints={"every": 9})
    run = start_run(config, tmp_path)
    reports = train_block(run, 1, attempt=3)
    assert [(r.step, r.done) for r in reports] == [(0, False), (10, False), (20, False), (25, True)]
    assert {(r.block, r.attempt, r.total) for r in reports} == {(1, 3, 25)}
    assert reports[-1].checkpoint_step == 25
    assert checkpoint_steps(run.block(1)) == [18, 25]
    metrics = run.block(1).metrics()
    assert [line["step"] for line in metrics] == [10, 20, 25]
    for line, report in zip(metrics, reports[1:], strict=True):
        assert line["loss"] == report.loss
        assert line["samples"] == 16 * line["step"]
        assert line["attempt"] == 3
        assert line["skipped"] == 0
        assert line["grad_norm"] > 0
        assert line["samples_per_second"] > 0
        assert 0 < line["lr"] <= config.optimiser.lr
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    # Only the block in hand leaves anything behind.
    assert run.storage.list("blocks") == ["01"]


def test_a_finished_block_stays_as_it_is(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(small_config(training={"steps": 12}), tmp_path)
    train_block(run)
    before = newest_files(run)
    reports = train_block(run, attempt=2)
    assert [(r.step, r.done) for r in reports] == [(12, False), (12, True)]
    assert newest_files(run) == before
    assert len(run.block(0).metrics()) == 2


def test_durable_means_on_the_disk(small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(training={"steps": 20}, logging={"every": 5}, checkpoints={"every": 5})
    run = start_run(config, tmp_path)
    go_on = threading.Event()
    with closing(BlockTrainer(run, 0, attempt=1)) as trainer:
        write = trainer._store._write

        def slow(snapshot: object) -> None:
            assert go_on.wait(60)
            write(snapshot)  # type: ignore[arg-type]

        monkeypatch.setattr(trainer._store, "_write", slow)
        reports = trainer.train()
        assert [next(reports).checkpoint_step, next(reports).checkpoint_step] == [0, 0]
        assert checkpoint_steps(run.block(0)) == []
        go_on.set()
        assert [report.checkpoint_step for report in reports][-1] == 20
    assert next(BlockTrainer(run, 0, attempt=2).train()).checkpoint_step == 20


@pytest.mark.parametrize("kind", ["blocks", "end_to_end"])
def test_accumulation_equals_the_whole_batch(small_config: SmallConfig, tmp_path: Path, kind: str) -> None:
    found = []
    for parts in (1, 4):
        config = small_config(
            model={"dropout": 0.0}, training={"steps": 3, "accumulate": parts}, noise={"weight": "edm"}
        )
        run = start_run(config, tmp_path / str(parts), kind)  # type: ignore[arg-type]
        with closing(BlockTrainer(run, 0, attempt=1)) as trainer:
            loss = list(trainer.train())[-1].loss
            found.append((loss, [p.grad.clone() for p in trainer.module.parameters() if p.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for whole, parted in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(whole, parted, rtol=1e-3, atol=1e-5)


def test_gradients_are_clipped(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(small_config(training={"steps": 3}, optimiser={"clip_norm": 1e-3}), tmp_path)
    with closing(BlockTrainer(run, 0, attempt=1)) as trainer:
        list(trainer.train())
        grads = [p.grad for p in trainer.module.parameters() if p.grad is not None]
        assert float(torch.nn.utils.get_total_norm(grads)) == pytest.approx(1e-3, rel=1e-2)
    assert run.block(0).metrics()[-1]["grad_norm"] > 1e-2  # told as it was before


def test_bfloat16(small_config: SmallConfig, tmp_path: Path) -> None:
    weights = []
    for precision in ("float32", "bfloat16"):
        run = start_run(small_config(training={"steps": 12, "precision": precision}), tmp_path / precision)
        assert np.isfinite(train_block(run)[-1].loss)
        weights.append(read_weights(run.block(0), "raw")[1])
    assert {value.dtype for value in weights[1].values()} == {torch.float32}
    assert weights[0].keys() == weights[1].keys()
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_have_ordinary_checkpoints(small_config: SmallConfig, tmp_path: Path) -> None:
    weights = []
    for compiled in (False, True):
        config = small_config(model={"dropout": 0.0}, training={"steps": 5, "compile": compiled})
        run = start_run(config, tmp_path / str(compiled))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        train_block(run)
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiled
        weights.append(read_weights(run.block(0), "raw")[1])
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-2, atol=1e-3)
    # One that is resumed has compiled its block twice, and has the same bytes.
    resumed = start_run(config, tmp_path / "resumed")
    with closing(BlockTrainer(resumed, 0, attempt=1)) as trainer:
        reports = trainer.train()
        next(reports)
        trainer._train_step()
        trainer.request_stop()
        list(reports)
    torch._dynamo.reset()
    train_block(resumed, attempt=2)
    assert newest_files(resumed) == newest_files(run)


def test_other_random_numbers_are_left_alone(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(small_config(training={"steps": 4}), tmp_path)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    train_block(run)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # type: ignore[index]


def test_what_others_do_to_random_numbers_changes_nothing(small_config: SmallConfig, tmp_path: Path) -> None:
    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        run = start_run(small_config(training={"steps": 12}), tmp_path / str(seed))
        with closing(BlockTrainer(run, 0, attempt=1)) as trainer:
            for _ in trainer.train():
                torch.randn(seed)
        files.append(newest_files(run))
    assert files[0] == files[1]


def test_blocks_see_different_chance(small_config: SmallConfig, tmp_path: Path) -> None:
    """Equal layers and equal noise ranges would not make two blocks the same."""
    run = start_run(small_config(blocks={"count": 2}, training={"steps": 2}), tmp_path)
    labels, noises, weights, masks = [], [], [], []
    for index in range(2):
        with closing(BlockTrainer(run, index, attempt=1)) as trainer:
            weights.append(trainer.module.get_parameter("head.weight").detach().clone())
            labels.append(trainer._loader.batch(0)["label"])
            draw, drawn = trainer.module.draw, noises
            trainer.module.draw = lambda n, g, d=draw, k=drawn: k.append(d(n, g)) or k[-1]  # type: ignore[method-assign]
            trainer.module.get_submodule("dropout").register_forward_hook(
                lambda module, args, out: masks.append(out == 0)
            )
            list(trainer.train())
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(labels[0], labels[1])
    eps = [draw["eps"] for draw in noises]  # two steps of each block
    assert all(not torch.equal(eps[a], eps[b]) for a in range(4) for b in range(a))
    assert all(not torch.equal(masks[a], masks[b]) for a in range(4) for b in range(a))


def test_an_older_attempt_is_refused(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(small_config(training={"steps": 30}, checkpoints={"every": 10}), tmp_path)
    with closing(BlockTrainer(run, 0, attempt=1)) as old:
        reports = old.train()
        while next(reports).step < 20:
            pass
        with closing(BlockTrainer(run, 0, attempt=2)):
            with pytest.raises(StaleAttempt):
                BlockTrainer(run, 0, attempt=1)
            with pytest.raises(StaleAttempt):
                list(reports)
    assert checkpoint_steps(run.block(0))[-1] < 30


def test_other_shards_than_planned(small_config: SmallConfig, tmp_path: Path) -> None:
    config = small_config()
    run = start_run(config, tmp_path)
    facts = run.plan.data
    assert facts is not None
    run.plan = run.plan.model_copy(update={"data": facts.model_copy(update={"sha256": "0" * 64})})
    with pytest.raises(UserError, match=r"data\.path .* not those the run was planned with"):
        BlockTrainer(run, 0, attempt=1)


def test_another_codebook_than_planned(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(small_config(), tmp_path)
    made = ViTFamily().codebook(run.config)
    monkeypatch.setattr(ViTFamily, "codebook", lambda self, config: made + 2.0**-20)
    with pytest.raises(CorruptData, match="codebook"):
        BlockTrainer(run, 0, attempt=1)


def test_another_blocks_checkpoints(small_config: SmallConfig, tmp_path: Path) -> None:
    run = start_run(small_config(blocks={"count": 2}, training={"steps": 4}), tmp_path)
    train_block(run, 0)
    shutil.copytree(tmp_path / "blocks/00/checkpoints", tmp_path / "blocks/01/checkpoints")
    with pytest.raises(CorruptData, match="another block"):
        BlockTrainer(run, 1, attempt=1)


def test_a_block_leaves_memory_with_its_trainer(small_config: SmallConfig, tmp_path: Path) -> None:
    """At once, not when cycles of references are next looked for: in one process the next block comes right after."""
    run = start_run(small_config(training={"steps": 2}), tmp_path)
    with gc_off():
        trainer = BlockTrainer(run, 0, 1)
        weights = weakref.ref(trainer.module)
        for _ in trainer.train():
            pass
        trainer.close()
        del trainer
        assert weights() is None


@contextmanager
def gc_off() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_a_snapshot_leaves_the_one_in_flight_alone(
    small_config: SmallConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is made in the memory of the one before, which is being written meanwhile."""
    run = start_run(small_config(training={"steps": 6}, logging={"every": 1}), tmp_path)
    written, write = threading.Event(), CheckpointStore._write
    held: list[Snapshot] = []

    def write_late(store: CheckpointStore, snapshot: Snapshot) -> None:
        held.append(snapshot)
        assert written.wait(60)
        write(store, snapshot)

    monkeypatch.setattr(CheckpointStore, "_write", write_late)
    with closing(BlockTrainer(run, 0, attempt=1)) as trainer:
        reports = trainer.train()
        while next(reports).step < 2:
            pass
        trainer._save()
        before = {name: value.clone() for name, value in trainer.module.named_parameters()}
        next(reports)
        again = threading.Thread(target=trainer._save)
        again.start()
        again.join(1.0)
        assert again.is_alive()  # it waits
        assert all(torch.equal(held[0].model[name], before[name]) for name in before)
        written.set()
        again.join()
        first, second = held[0].model, trainer._copies["model"]
        assert all(first[name].data_ptr() == second[name].data_ptr() for name in before)
        assert not any(torch.equal(second[name], before[name]) for name in before if before[name].any())
