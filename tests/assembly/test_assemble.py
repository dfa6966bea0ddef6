from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from small_runs import start_run, train_all, train_block

from dbtrain.assembly.assemble import assemble
from dbtrain.config import RunConfig
from dbtrain.diffusion.codebook import digest
from dbtrain.errors import CorruptData, UserError
from dbtrain.models.vit import ViTFamily
from dbtrain.run_directory import RunDirectory
from dbtrain.storage import LocalStorage
from dbtrain.training.checkpoint import checkpoint_steps, read_weights

SmallConfig = Callable[..., RunConfig]


def test_the_model_holds_what_the_blocks_saved(finished: RunDirectory) -> None:
    made = assemble(finished)
    tensors = safetensors.torch.load_file(f"{made.path}/model.safetensors")
    assert digest(tensors.pop("codebook")) == finished.plan.codebook_sha256
    for block in finished.plan.blocks:
        for name, value in read_weights(finished.block(block.index), "ema")[1].items():
            assert torch.equal(tensors.pop(f"blocks.{block.index}.{name}"), value)
    assert tensors == {}
    assert (made.weights, made.blocks) == ("ema", 3)
    assert made.parameters == sum(block.parameters for block in finished.plan.blocks)
    assert made.bytes == Path(made.path, "model.safetensors").stat().st_size
    assert sorted(path.name for path in Path(made.path).iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert made.sha256 in Path(made.path, "README.md").read_text()
    assert not [name for name in finished.storage.list() if name.startswith(".tmp")]


def test_two_assemblies_at_once_leave_a_whole_model(finished: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(finished.storage.sub("model").uri, ignore_errors=True)
    written: list[str] = []
    plain = LocalStorage.write_atomic

    def interrupted(storage: LocalStorage, rel: str, data: bytes) -> None:
        plain(storage, rel, data)
        written.append(rel)
        if len(written) == 1:  # the other one begins and ends between two files of the first
            assemble(finished)

    monkeypatch.setattr(LocalStorage, "write_atomic", interrupted)
    made = assemble(finished)
    assert len(written) == 6
    assert sorted(path.name for path in Path(made.path).iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert not [name for name in finished.storage.list() if name.startswith(".tmp")]


def test_equal_runs_equal_digests(small_config: SmallConfig, finished: RunDirectory, tmp_path: Path) -> None:
    first = assemble(finished).sha256
    assert assemble(finished).sha256 == first
    again = start_run(finished.config, tmp_path / "again")
    for index in (2, 0, 1):
        train_block(again, index, attempt=4)
    assert assemble(again).sha256 == first


def test_averaged_or_last_weights(finished: RunDirectory) -> None:
    averaged, raw = assemble(finished, "ema"), assemble(finished, "raw")
    assert averaged.sha256 != raw.sha256
    assert averaged.bytes == raw.bytes
    about = json.loads(Path(raw.path, "config.json").read_text())
    assert (about["weights"], about["sha256"]) == ("raw", raw.sha256)
    assert "last step" in Path(raw.path, "README.md").read_text()
    assert assemble(finished).sha256 == averaged.sha256


def test_without_averages(small_config: SmallConfig, tmp_path: Path) -> None:
    run = train_all(start_run(small_config(training={"steps": 3}, ema={"half_life": 0}), tmp_path))
    assert assemble(run).weights == "raw"
    with pytest.raises(UserError, match=r"--weights = 'ema'.*ema\.half_life"):
        assemble(run, "ema")


def test_a_baseline(small_config: SmallConfig, tmp_path: Path) -> None:
    run = train_all(start_run(small_config(training={"steps": 3}), tmp_path, "end_to_end"))
    made = assemble(run)
    names = safetensors.torch.load_file(f"{made.path}/model.safetensors").keys()
    assert made.blocks == 1
    assert all(name.startswith("blocks.0.") for name in names)


def test_an_unfinished_run_is_refused(small_config: SmallConfig, tmp_path: Path) -> None:
    config = small_config(training={"steps": 20}, checkpoints={"every": 15})
    run = start_run(config, tmp_path)
    with pytest.raises(UserError, match="block 0 has no checkpoint"):
        assemble(run)
    train_all(run)
    shutil.rmtree(tmp_path / "blocks/02/checkpoints/step-00000020")
    with pytest.raises(UserError, match=r"block 2 has reached step 15 of 20.*dbtrain train"):
        assemble(run)
    assert not run.storage.exists("model")


@pytest.mark.parametrize("weights", ["ema", "raw"])
@pytest.mark.parametrize("part", ["model", "ema", "state", "optimizer", "MANIFEST"])
def test_one_flipped_byte(finished: RunDirectory, weights: Any, part: str) -> None:
    intact = assemble(finished, weights).sha256
    folder = Path(finished.uri, "blocks/01/checkpoints/step-00000020")
    path = next(path for path in folder.iterdir() if path.name.startswith(part))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if part == "optimizer" or part == {"ema": "model", "raw": "ema"}[weights]:
        assert assemble(finished, weights).sha256 == intact  # nothing of that file is in the model
        return
    with pytest.raises(CorruptData, match=r"blocks/01/checkpoints/step-00000020"):
        assemble(finished, weights)
    assert checkpoint_steps(finished.block(1)) == [15, 20]  # the older one is not taken instead


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("noise", "p_mean", 0.0), ("codebook", "scale", 2.0), ("training", "steps", 15), ("model", "dropout", 0.0)],
)
def test_a_configuration_edited_afterwards(finished: RunDirectory, section: str, field: str, value: object) -> None:
    path = Path(finished.uri, "config.yaml")
    raw = yaml.safe_load(path.read_text())
    raw[section][field] = value
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(CorruptData, match="different configurations"):
        assemble(RunDirectory.open(finished.uri))


def test_fields_that_train_nothing_may_change(finished: RunDirectory) -> None:
    path = Path(finished.uri, "config.yaml")
    before = assemble(finished).sha256
    raw = yaml.safe_load(path.read_text())
    raw["chain"]["readout"], raw["name"] = "product", "other"
    path.write_text(yaml.safe_dump(raw))
    again = assemble(RunDirectory.open(finished.uri))
    assert again.sha256 == before
    assert json.loads(Path(again.path, "config.json").read_text())["config"]["chain"]["readout"] == "product"


def test_a_plan_edited_afterwards(finished: RunDirectory) -> None:
    path = Path(finished.uri, "plan.json")
    text = path.read_text()
    for edit in ({"steps": 15}, {"seed": 8}, {"codebook_sha256": "0" * 64}, {"config_sha256": "0" * 64}):
        path.write_text(json.dumps(json.loads(text) | edit))
        with pytest.raises(CorruptData):
            assemble(RunDirectory.open(finished.uri))
    raw = json.loads(text)
    raw["blocks"][0]["noise"], raw["blocks"][1]["noise"] = raw["blocks"][1]["noise"], raw["blocks"][0]["noise"]
    path.write_text(json.dumps(raw))
    with pytest.raises(CorruptData):
        assemble(RunDirectory.open(finished.uri))
    path.write_text(text)
    assemble(RunDirectory.open(finished.uri))


def test_another_codebook(finished: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ViTFamily().codebook(finished.config)
    monkeypatch.setattr(ViTFamily, "codebook", lambda self, config: made.flip(0))
    with pytest.raises(CorruptData, match="codebook"):
        assemble(finished)


def test_blocks_of_equal_shape_are_told_apart(
    small_config: SmallConfig, finished: RunDirectory, tmp_path: Path
) -> None:
    first, second = Path(finished.uri, "blocks/01"), Path(finished.uri, "blocks/02")
    assert finished.plan.blocks[1].parameters == finished.plan.blocks[2].parameters
    kept = tmp_path / "kept"
    shutil.move(first, kept)
    shutil.copytree(second, first)
    with pytest.raises(CorruptData, match="block 1 comes from another block or run"):
        assemble(finished)
    shutil.rmtree(first)
    other = start_run(finished.config.model_copy(update={"seed": 99}), tmp_path / "other")
    train_block(other, 1)
    shutil.copytree(tmp_path / "other/blocks/01", first)
    with pytest.raises(CorruptData, match="block 1 comes from another block or run"):
        assemble(finished)
    shutil.rmtree(first)
    shutil.move(kept, first)  # blocks trained elsewhere may be brought together, if they are of this run
    assemble(finished)


def test_a_run_by_uri(finished: RunDirectory) -> None:
    made = assemble(RunDirectory.open(f"file://{finished.uri}"))
    assert made.sha256 == assemble(finished).sha256
