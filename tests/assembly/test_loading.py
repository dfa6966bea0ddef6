from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import start_run, train_all

from dbtrain.assembly.assemble import assemble
from dbtrain.assembly.loading import load_model
from dbtrain.config import RunConfig
from dbtrain.errors import CorruptData, UserError
from dbtrain.run_directory import RunDirectory
from dbtrain.training.checkpoint import read_weights

SmallConfig = Callable[..., RunConfig]


def test_from_the_run_the_folder_a_uri_and_elsewhere(finished: RunDirectory, model: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(model, tmp_path / "elsewhere")
    before = torch.random.get_rng_state()
    loaded = [
        load_model(str(path)) for path in (finished.uri, model, f"file://{model}", f"file://{finished.uri}", copied)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    shutil.rmtree(finished.uri)  # what was copied stands on its own
    loaded.append(load_model(str(copied)))
    assert len({one.sha256 for one in loaded}) == 1
    one = loaded[-1]
    assert (one.weights, len(one.modules), one.device) == ("ema", 3, torch.device("cpu"))
    assert one.plan == finished.plan
    assert one.config == finished.config
    for module in one.modules:
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_weights_are_those_of_the_blocks(finished: RunDirectory, model: Path) -> None:
    for index, module in enumerate(load_model(str(model)).modules):
        saved = read_weights(finished.block(index), "ema")[1]
        assert {name for name, _ in module.named_parameters()} == saved.keys()
        assert all(torch.equal(parameter, saved[name]) for name, parameter in module.named_parameters())


def test_a_baseline_loads(small_config: SmallConfig, tmp_path: Path) -> None:
    run = train_all(start_run(small_config(training={"steps": 3}), tmp_path, "end_to_end"))
    assemble(run)
    loaded = load_model(run.uri)
    assert loaded.codebook is None
    assert len(loaded.modules) == 1


def test_nothing_there(finished: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no assembled model"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="dbtrain assemble"):
        load_model(finished.uri)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file(model: Path, name: str) -> None:
    (model / name).unlink()
    with pytest.raises(UserError, match="holds no assembled model"):
        load_model(str(model))


@pytest.mark.parametrize("where", [0, 9, 2000, -1])
def test_a_flipped_byte(model: Path, where: int) -> None:
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptData, match=r"model\.safetensors"):
        load_model(str(model))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"format": 1}', b"\xff\xfe", -10])
def test_a_damaged_description(model: Path, text: str | bytes | int) -> None:
    path = model / "config.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:text] if isinstance(text, int) else text.encode() if isinstance(text, str) else text)
    with pytest.raises(CorruptData, match=r"config\.json"):
        load_model(str(model))


def _edit(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = model / "config.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about["config"]["model"].update(width=32),
        lambda about: about["config"]["model"].update(width=15),
        lambda about: about["config"].update(surprise=1),
        lambda about: about["plan"].pop("blocks"),
        lambda about: about["plan"]["blocks"].pop(),
        lambda about: about["plan"]["blocks"][0].update(layers=[0, 1]),
        lambda about: about["plan"].update(codebook_sha256="0" * 64),
        lambda about: about.pop("weights"),
        lambda about: about.update(sha256="0" * 64),
    ],
)
def test_an_edited_description(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    _edit(model, change)
    with pytest.raises(CorruptData):
        load_model(str(model))


def test_a_newer_format(model: Path) -> None:
    _edit(model, lambda about: about.update(format=2))
    with pytest.raises(UserError, match="format 2; this version reads 1"):
        load_model(str(model))


def test_no_such_device(model: Path) -> None:
    with pytest.raises(UserError, match="device = 'tpu9'"):
        load_model(str(model), "tpu9")
