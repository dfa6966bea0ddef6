"""Relay: blocks that go on from each other's features, through the run's folder and by nobody's leave."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dbtrain.assembly.assemble import assemble
from dbtrain.assembly.loading import load_model
from dbtrain.config import RunConfig
from dbtrain.errors import NoRoom, UserError
from dbtrain.inference.classify import Classifier
from dbtrain.models import family_of
from dbtrain.models.family import BELIEF, CODE, FEATURES, walk_to
from dbtrain.orchestration.driver import Snapshot
from dbtrain.orchestration.run import train_run
from dbtrain.orchestration.state import BlockState
from dbtrain.orchestration.stopping import StopToken
from dbtrain.run_directory import RunDirectory
from dbtrain.storage import LocalStorage
from dbtrain.training.initial import initial_module
from dbtrain.training.planner import build_module, make_plan
from dbtrain.training.relay import Relay
from dbtrain.training.rollback import NonFiniteError

SmallConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def config(small_config: SmallConfig) -> RunConfig:
    return small_config(blocks={"relay_every": 10}, training={"steps": 60}, checkpoints={"every": 25})


@pytest.fixture(scope="module")
def plain(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain case, finished and assembled: one process, block after block."""
    run = tmp_path_factory.mktemp("plain") / "run"
    _digest(config, run)
    return run


def _digest(config: RunConfig, run: Path, **options: object) -> str:
    result = train_run(config, run, backend="inline", **options)  # type: ignore[arg-type]
    assert all(block.state is BlockState.FINISHED for block in result.blocks), result
    return assemble(RunDirectory.open(run)).sha256


def _seen(run: Path, block: int) -> dict[int, dict[str, int]]:
    return {line["step"]: line["seen"] for line in RunDirectory.open(run).block(block).relay_schedule()}


def test_a_block_takes_what_was_published_one_interval_before(plain: Path) -> None:
    assert _seen(plain, 0) == {}
    assert _seen(plain, 2) == {step: {"0": max(0, step - 10), "1": max(0, step - 10)} for step in range(0, 60, 10)}


def test_a_predecessor_that_is_behind_or_damaged_is_not_waited_for(config: RunConfig, tmp_path: Path) -> None:
    """Block 1 trains before block 0, and so from its first weights; block 2 finds all of both, but one damaged file."""
    run = tmp_path / "run"
    _digest(config, run, order=[1, 0, 2])
    assert _seen(run, 1) == {step: {"0": 0} for step in range(0, 60, 10)}
    again = tmp_path / "again"
    token = StopToken()

    class Damage:
        def update(self, snapshot: Snapshot) -> None:
            if snapshot.blocks[0].state is BlockState.FINISHED and not token.requested:
                path = again / "blocks/00/relay/step-00000030.safetensors"
                path.write_bytes(path.read_bytes()[:-1] + b"?")
                token.request()

    train_run(config, again, backend="inline", watch=Damage(), stop=token)
    _digest(config, again)
    assert [seen["0"] for seen in _seen(again, 2).values()] == [0, 0, 10, 20, 20, 40]


def test_stopped_and_started_again_to_the_byte(config: RunConfig, plain: Path, tmp_path: Path) -> None:
    expected = assemble(RunDirectory.open(plain)).sha256
    run, token = tmp_path / "stopped", StopToken()

    class Stop:
        def update(self, snapshot: Snapshot) -> None:
            if snapshot.blocks[1].step >= 30:
                token.request()

    assert train_run(config, run, backend="inline", watch=Stop(), stop=token).stopped
    assert _digest(config, run) == expected


def test_the_same_schedule_gives_the_same_bytes(config: RunConfig, plain: Path, tmp_path: Path) -> None:
    """Whatever was there when a block looked: who follows its relay.jsonl gets its bytes."""
    expected = assemble(RunDirectory.open(plain)).sha256
    odd, followed = tmp_path / "odd", tmp_path / "followed"
    other = _digest(config, odd, order=[1, 0, 2])
    assert other != expected
    train_run(config, followed, backend="inline", stop=_at_once())
    (followed / "blocks/01").mkdir(parents=True, exist_ok=True)
    (followed / "blocks/01/relay.jsonl").write_bytes((odd / "blocks/01/relay.jsonl").read_bytes())
    assert _digest(config, followed) == other


def _at_once() -> StopToken:
    token = StopToken()
    token.request()
    return token


def test_the_assembled_chain_walks_as_training_did(plain: Path) -> None:
    model = load_model(str(plain))
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    classifier, positions = Classifier(model), np.arange(5)
    handed = walk_to(model.modules, {"image": images}, {"eps": classifier.start(positions, 0)})
    torch.testing.assert_close(classifier.features(images)[2], handed[FEATURES])
    torch.testing.assert_close(classifier.trace(images, positions, 0).log_probs[-1], handed[BELIEF])
    assert model.config.chain.readout == "last"


def test_no_label_is_handed_on(config: RunConfig) -> None:
    family = family_of(config)
    codebook = family.codebook(config)
    modules = [
        build_module(family, config, piece.layers, piece.noise, codebook).eval() for piece in family.cut(config)[:2]
    ]
    image = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    draw = modules[0].draw(4, torch.Generator().manual_seed(1))
    one, other = (
        walk_to(modules, {"image": image, "label": torch.tensor(labels)}, draw) for labels in ([0] * 4, [1] * 4)
    )
    assert all(torch.equal(one[name], other[name]) for name in (FEATURES, BELIEF, CODE))


def test_logits_of_a_relayed_block_complete_the_belief(config: RunConfig) -> None:
    """The loss is that of the sum: where the belief is sure and right, nothing is left to learn."""
    family = family_of(config)
    piece = family.cut(config)[1]
    block = build_module(family, config, piece.layers, piece.noise, family.codebook(config)).eval()
    batch = {"image": torch.zeros(2, 1, 8, 8), "label": torch.tensor([3, 4])}
    draw = block.draw(2, torch.Generator().manual_seed(0))
    believed = {FEATURES: torch.zeros(2, 4, 16), CODE: torch.zeros(2, 16)}
    for sure, low, high in ((50.0, 0.0, 1e-6), (-50.0, 40.0, 60.0)):
        belief = torch.zeros(2, 10)
        belief[torch.arange(2), batch["label"]] = sure
        loss = block.training_loss({**batch, **believed, BELIEF: belief.log_softmax(-1)}, draw)
        assert low <= loss.item() <= high


def test_planned_bytes_hold_the_blocks_before(config: RunConfig, small_config: SmallConfig, tmp_path: Path) -> None:
    plan, alone = make_plan(config), make_plan(small_config())
    first, second, third = plan.blocks
    assert first.bytes == alone.blocks[0].bytes
    held = first.bytes.parameters + second.bytes.parameters + 2 * first.bytes.buffers
    assert third.bytes.buffers == alone.blocks[2].bytes.buffers + held
    assert [block.evaluations for block in plan.blocks] == [first.layers[1], second.layers[1], third.layers[1]]
    assert third.flops_per_sample > second.flops_per_sample > alone.blocks[1].flops_per_sample
    assert make_plan(config, "end_to_end").steps > config.training.steps  # forward passes count as evaluations


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("dit", {"blocks": {"relay_every": 5}}, "is not for family 'dit'"),
        ("vit", {"blocks": {"relay_every": 5, "count": 1}}, "needs more than the one block"),
        ("vit", {"blocks": {"relay_every": 5, "stem": "averaged"}}, "does not go with blocks.stem 'averaged'"),
        ("vit", {"blocks": {"relay_every": 5}, "training": {"steps": 10}}, "below half of training.steps 10"),
        ("vit", {"blocks": {"relay_every": 5}, "chain": {"steps": 6}}, "chain of one step a block"),
        ("vit", {"blocks": {"relay_every": 5}, "chain": {"bridge": "argmax"}}, "chain of one step a block"),
        ("vit", {"blocks": {"relay_every": 5}, "resources": {"replicas": 2}}, "has one worker a block"),
    ],
)
def test_what_relay_does_not_go_with(
    family_config: Callable[..., RunConfig], family: str, changes: dict[str, object], problem: str
) -> None:
    with pytest.raises((UserError, ValueError), match=problem):
        family_config(family, **changes)


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_on_ray_with_a_worker_killed(config: RunConfig, tmp_path: Path) -> None:
    """A killed predecessor holds nobody up; whatever schedule that gave, following it gives the same bytes."""
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 400})})
    killed: list[int] = []

    class Kill:
        def update(self, snapshot: Snapshot) -> None:
            status = snapshot.blocks[0]
            if not killed and status.state is BlockState.RUNNING and status.step >= 30:
                assert status.pid is not None
                os.kill(status.pid, signal.SIGKILL)
                killed.append(status.pid)

    run, followed = tmp_path / "ray", tmp_path / "followed"
    result = train_run(longer, run, backend="ray", watch=Kill())
    assert killed
    assert [block.restarts for block in result.blocks] == [1, 0, 0]
    expected = assemble(RunDirectory.open(run)).sha256
    train_run(longer, followed, backend="inline", stop=_at_once())
    for block in ("01", "02"):
        (followed / f"blocks/{block}").mkdir(parents=True, exist_ok=True)
        (followed / f"blocks/{block}/relay.jsonl").write_bytes((run / f"blocks/{block}/relay.jsonl").read_bytes())
    assert _digest(longer, followed) == expected


def test_a_full_disk_costs_newer_weights_and_no_wait(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a publication nor a line of the schedule that finds no room keeps a block from training on."""
    write, append, full = LocalStorage.write_atomic, LocalStorage.append_line, {"step-00000010.safetensors", "relay"}

    def write_atomic(storage: LocalStorage, rel: str, data: bytes) -> None:
        if rel in full:
            raise NoRoom("no room")
        write(storage, rel, data)

    def append_line(storage: LocalStorage, rel: str, text: str) -> None:
        if rel == "relay.jsonl" and '"step": 3' in text:
            raise NoRoom("no room")
        append(storage, rel, text)

    monkeypatch.setattr(LocalStorage, "write_atomic", write_atomic)
    monkeypatch.setattr(LocalStorage, "append_line", append_line)
    _digest(config, tmp_path / "run")
    assert [(step, seen["0"]) for step, seen in _seen(tmp_path / "run", 1).items()] == [
        (0, 0), (10, 0), (20, 0), (40, 30), (50, 40),
    ]  # fmt: skip


def test_who_starts_again_on_a_full_disk_goes_on_with_the_weights_in_force(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, token = tmp_path / "run", StopToken()

    class Stop:
        def update(self, snapshot: Snapshot) -> None:
            if snapshot.blocks[1].step >= 35:
                token.request()

    train_run(config, run, backend="inline", watch=Stop(), stop=token)

    def no_room(*_: object) -> None:
        raise NoRoom("no room")

    monkeypatch.setattr(LocalStorage, "append_line", no_room)
    relay = Relay(RunDirectory.open(run), 1, 99, torch.device("cpu"))
    relay.look(55)
    assert relay._loaded == {0: max(seen["0"] for seen in _seen(run, 1).values())}


def test_weights_that_are_not_finite_are_not_published(config: RunConfig, plain: Path) -> None:
    run = RunDirectory.open(plain)
    module = initial_module(run.config, run.plan, 0, family_of(config).codebook(config))
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        Relay(run, 0, 99, torch.device("cpu")).publish(70, module, None)
    assert not (plain / "blocks/00/relay/step-00000070.safetensors").exists()


def test_what_is_published_stays(config: RunConfig, plain: Path) -> None:
    """A block that goes back and does other steps must not change what another one trains on."""
    run = RunDirectory.open(plain)
    path = plain / "blocks/00/relay/step-00000020.safetensors"
    before = path.read_bytes()
    relay = Relay(run, 0, 99, torch.device("cpu"))
    relay.publish(20, initial_module(run.config, run.plan, 0, family_of(config).codebook(config)), None)
    assert path.read_bytes() == before
