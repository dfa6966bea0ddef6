"""What the plan says, against a real worker's memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from replica_groups import PROCESSES
from replica_process import measure
from small_runs import start_run, train_block

from dbtrain.config import RunConfig
from dbtrain.errors import CorruptData, UserError
from dbtrain.plan import Kind, Plan
from dbtrain.training.meeting import MeetingPlace
from dbtrain.training.planner import check_plan, make_plan
from dbtrain.training.seat import Seat
from dbtrain.training.trainer import BlockTrainer

SmallConfig = Callable[..., RunConfig]
KINDS: tuple[Kind, ...] = ("blocks", "end_to_end")


@pytest.mark.parametrize(("depth", "count"), [(1, 1), (4, 3), (5, 2), (7, 4), (3, 3)])
def test_any_depth_any_number_of_blocks(small_config: SmallConfig, depth: int, count: int) -> None:
    plan = make_plan(small_config(model={"depth": depth}, blocks={"count": count}))
    assert [block.index for block in plan.blocks] == list(range(count))
    sizes = [block.num_layers for block in plan.blocks]
    assert sum(sizes) == depth
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert plan.blocks[0].layers[0] == 0
    for block, following in zip(plan.blocks, plan.blocks[1:], strict=False):
        assert block.layers[1] == following.layers[0]
        assert block.noise is not None
        assert following.noise is not None
        assert block.noise.low == following.noise.high
        assert (block.parameters > following.parameters) == (block.num_layers > following.num_layers)
    assert plan.layer_evaluations == depth * plan.steps * plan.batch_size


def test_explicit_split(small_config: SmallConfig) -> None:
    plan = make_plan(small_config(blocks={"count": 3, "split": [1, 2, 1]}))
    assert [block.layers for block in plan.blocks] == [(0, 1), (1, 3), (3, 4)]


def test_baseline_is_one_block_of_equal_work(small_config: SmallConfig) -> None:
    config = small_config()
    ours, theirs = make_plan(config), make_plan(config, "end_to_end")
    assert [(block.layers, block.noise, block.trained) for block in theirs.blocks] == [((0, 4), None, None)]
    assert theirs.codebook_sha256 is None
    assert ours.codebook_sha256 is not None
    assert ours.layer_evaluations == theirs.layer_evaluations


def test_planning_touches_no_random_numbers(small_config: SmallConfig) -> None:
    before = torch.random.get_rng_state()
    make_plan(small_config())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("kind", "half_life", "optimiser"),
    [
        ("blocks", 0, "adamw"),
        ("blocks", 200, "adamw"),
        ("blocks", 200, "adafactor"),
        ("end_to_end", 0, "adamw"),
        ("end_to_end", 200, "adafactor"),
    ],
)
def test_planned_bytes_are_a_workers_bytes(
    small_config: SmallConfig, tmp_path: Path, kind: Kind, half_life: int, optimiser: str
) -> None:
    config = small_config(training={"steps": 3}, ema={"half_life": half_life}, optimiser={"kind": optimiser})
    run = start_run(config, tmp_path, kind)
    for block in run.plan.blocks:
        trainer = BlockTrainer(run, block.index, attempt=1)
        for _ in trainer.train():
            pass
        parameters = list(trainer.module.parameters())
        state = [value for fields in trainer.optimizer.state.values() for value in fields.values()]
        assert {id(p) for p in trainer.optimizer.state} == {id(p) for p in parameters}
        assert block.parameters == sum(p.numel() for p in parameters)
        assert block.bytes.parameters == _bytes(parameters)
        assert block.bytes.buffers == _bytes(list(trainer.module.buffers()))
        assert block.bytes.gradients < _bytes([p.grad for p in parameters if p.grad is not None])  # see test_peak.py
        assert block.bytes.optimiser == _bytes(state)
        assert block.bytes.ema == (0 if trainer.ema is None else _bytes(list(trainer.ema.tensors().values())))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dropout", "precision", "accumulate"),
    [(0.0, "float32", 1), (0.1, "float32", 1), (0.0, "bfloat16", 1), (0.1, "bfloat16", 2)],
)
def test_planned_activations_are_what_a_forward_pass_keeps(
    small_config: SmallConfig, tmp_path: Path, kind: Kind, dropout: float, precision: str, accumulate: int
) -> None:
    config = small_config(
        model={"dropout": dropout}, training={"precision": precision, "accumulate": accumulate, "steps": 2}
    )
    run = start_run(config, tmp_path, kind)
    trainer = BlockTrainer(run, 0, attempt=1)
    size = config.training.batch_size // accumulate
    batch = {name: value[:size].clone() for name, value in trainer._loader.batch(0).items()}
    draw = trainer.module.draw(size, torch.Generator().manual_seed(0))
    own = {t.data_ptr() for t in [*trainer.module.parameters(), *trainer.module.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        trainer.module.training_loss(batch, draw)
    trainer.close()
    assert run.plan.blocks[0].bytes.activations == sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_blocks_parameter_is_ever_allocated(
    small_config: SmallConfig, tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(small_config(training={"steps": 6}, checkpoints={"every": 2}), tmp_path, kind)
    made: list[torch.nn.Parameter] = []
    original = torch.nn.Parameter.__new__

    def counting(cls: type, *args: object, **kwargs: object) -> torch.nn.Parameter:
        made.append(original(cls, *args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(torch.nn.Parameter, "__new__", staticmethod(counting))
    trainer = BlockTrainer(run, len(run.plan.blocks) - 1, attempt=1)
    for _ in trainer.train():
        pass
    again = len(made)
    train_block(run, len(run.plan.blocks) - 1, attempt=2)  # resuming allocates no more than starting
    assert {id(p) for p in made[:again]} == {id(p) for p in trainer.module.parameters()}
    assert all(p.device == trainer.device for p in made)
    assert sum(p.numel() for p in made[:again]) == run.plan.blocks[-1].parameters
    assert len(made) == 2 * again


def test_a_plan_is_checked_against_its_configuration(small_config: SmallConfig) -> None:
    config = small_config()
    for kind in KINDS:
        check_plan(config, make_plan(config, kind), None)
    plan = make_plan(config)
    edits: list[dict[str, object]] = [
        {"steps": 30},
        {"seed": 1},
        {"batch_size": 8},
        {"threads": 2},
        {"kind": "end_to_end"},
        {"blocks": plan.blocks[:2]},
        {"blocks": (plan.blocks[1], plan.blocks[0], plan.blocks[2])},
        {"blocks": (*plan.blocks[:2], plan.blocks[2].model_copy(update={"layers": (2, 4)}))},
        {"blocks": (*plan.blocks[:2], plan.blocks[2].model_copy(update={"noise": plan.blocks[0].noise}))},
        {"blocks": (*plan.blocks[:2], plan.blocks[2].model_copy(update={"trained": None}))},
        {"config_sha256": "0" * 64},
    ]
    for edit in edits:
        with pytest.raises(CorruptData, match=r"plan\.json"):
            check_plan(config, plan.model_copy(update=edit), None)
    with pytest.raises(CorruptData, match="codebook"):
        check_plan(config, plan, torch.zeros(10, 16))


def test_a_plan_survives_json(small_config: SmallConfig) -> None:
    plan = make_plan(small_config())
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_a_gpu_that_is_not_there(small_config: SmallConfig, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = start_run(small_config(resources={"device": "cuda"}), tmp_path)
    with pytest.raises(UserError, match=r"resources\.device"):
        BlockTrainer(run, 0, attempt=1)


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("shard", [False, True])
def test_planned_bytes_of_a_replica(small_config: SmallConfig, tmp_path: Path, shard: bool) -> None:
    """Replica 0 has the largest parts: its memory is what is planned."""
    one = small_config(training={"steps": 3})
    config = small_config(training={"steps": 3}, resources={"replicas": 2, "shard": shard})
    run = start_run(config, tmp_path)
    planned, alone = run.plan.blocks[0].bytes, make_plan(one).blocks[0].bytes
    meeting = MeetingPlace("127.0.0.1")
    pipes = [PROCESSES.Pipe(duplex=False) for _ in range(2)]
    processes = [
        PROCESSES.Process(target=measure, args=(run.uri, Seat(number, 2, meeting.address), told))
        for number, (_, told) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        held = [ours.recv() for ours, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert held[0] == {name: getattr(planned, name) for name in held[0]}
    assert planned.activations == make_plan(small_config(training={"batch_size": 8})).blocks[0].bytes.activations
    if not shard:
        assert held[1] == held[0]
        of_the_batch = {"activations": planned.activations, "temporary": planned.temporary}
        # Replicas keep gradients from step to step, in buckets.
        assert planned == alone.model_copy(update={**of_the_batch, "gradients": alone.parameters})
        return
    # The parts together are the whole; step counters and buffers are on both.
    for name in ("parameters", "gradients", "ema"):
        assert held[0][name] + held[1][name] == alone.parameters
        assert held[1][name] <= held[0][name] < alone.parameters
    assert alone.gathered == 0 < planned.gathered <= 3 * alone.parameters
