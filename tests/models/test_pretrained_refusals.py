"""Checkpoints that cannot be cut into blocks, do not fit the configuration, or are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_checkpoints import SECTION, edit_json, make_llama, save_llama
from safetensors.torch import load_file, save_file
from small_families import raw_config

from dbtrain.config import RunConfig
from dbtrain.config_file import parse_config
from dbtrain.errors import CorruptData, UserError
from dbtrain.models import family_of
from dbtrain.training.planner import make_plan

INDEX = "model.safetensors.index.json"


def _config(checkpoint: Path, **model: Any) -> RunConfig:
    return parse_config(raw_config("causal_lm", "unused", model={**SECTION, "pretrained": str(checkpoint), **model}))


def _refused(checkpoint: Path, kind: type[UserError] = UserError, **model: Any) -> str:
    """The message; the baseline is refused with the same."""
    config = _config(checkpoint, **model)
    with pytest.raises(kind) as block_wise:
        make_plan(config)
    with pytest.raises(kind) as end_to_end:
        make_plan(config, "end_to_end")
    assert str(block_wise.value) == str(end_to_end.value)
    assert "\n" not in str(block_wise.value)
    return str(block_wise.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "its layers are not Llama's: model_type is 'gpt2'",
        ),
        ({"model_type": None}, "its layers are not Llama's: model_type is None"),
        ({"model_type": ["llama"]}, "its layers are not Llama's: model_type is ['llama']"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a language model with a head for tokens"),
        ({"quantization_config": {"bits": 4}}, "its weights are quantised"),
        ({"attention_bias": True}, "its attention has biases"),
        ({"mlp_bias": True}, "its MLP has biases"),
        ({"hidden_act": "gelu"}, "its MLP is no SwiGLU: hidden_act is 'gelu'"),
        ({"head_dim": 8}, "its heads are 8 wide and not 16 / 4"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0}}, "rescaled: rope_type is 'llama3'"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rescaled: rope_type is 'linear'",
        ),
        ({"partial_rotary_factor": 0.5}, "it turns a part of each head only"),
        ({"model_type": "mistral", "sliding_window": 31}, "a window of 31 tokens, shorter than the text"),
    ],
)
def test_other_architectures(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    folder = save_llama(tmp_path / "llama")
    edit_json(folder / "config.json", lambda about: about.update(changes))
    message = _refused(folder)
    assert message.startswith(f"model.pretrained = '{folder}': the checkpoint cannot be cut into blocks: ")
    assert part in message


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"vocab_size": 300},
            "model.vocab_size = 300: the checkpoint in {} has vocab_size 257 (set model.vocab_size=257",
        ),
        ({"width": 32}, "model.width = 32: the checkpoint in {} has hidden_size 16 (set model.width=16)"),
        ({"depth": 6}, "model.depth = 6: the checkpoint in {} has num_hidden_layers 4 (set model.depth=4)"),
        ({"heads": 2}, "model.heads = 2: the checkpoint in {} has num_attention_heads 4 (set model.heads=4)"),
        (
            {"kv_heads": None},
            "model.kv_heads = 4: the checkpoint in {} has num_key_value_heads 2 (set model.kv_heads=2)",
        ),
        (
            {"mlp_width": 64},
            "model.mlp_width = 64: the checkpoint in {} has intermediate_size 24 (set model.mlp_width=24)",
        ),
        ({"norm_eps": 1e-5}, "model.norm_eps = 1e-05: the checkpoint in {} has rms_norm_eps 0.0001"),
        ({"rope_theta": 10000.0}, "model.rope_theta = 10000.0: the checkpoint in {} has rope_theta 5000.0"),
        ({"length": 65}, "model.length = 65: the checkpoint in {} knows texts of up to 64 tokens"),
        (
            {"tie_head": True},
            "model.tie_head = True: the checkpoint in {} has a head of its own (set model.tie_head=false)",
        ),
    ],
)
def test_other_sizes(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    folder = save_llama(tmp_path / "llama")
    assert _refused(folder, **section).startswith(message.format(folder))


def test_a_padded_vocabulary_says_what_to_do(tmp_path: Path) -> None:
    """Neither number is right by itself: the text asks for the tokenizer's, the checkpoint for its own."""
    assert "resize_token_embeddings" in _refused(save_llama(tmp_path / "llama"), vocab_size=250)
    network = make_llama()
    network.resize_token_embeddings(250)
    make_plan(_config(save_llama(tmp_path / "fitting", network), vocab_size=250))


def test_older_spellings_and_values_left_out(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama")

    def as_version_4(about: dict[str, Any]) -> None:
        del about["rope_parameters"], about["head_dim"], about["mlp_bias"]
        about.update(rope_theta=5000.0, rope_scaling=None, architectures=None)

    edit_json(folder / "config.json", as_version_4)
    make_plan(_config(folder))
    edit_json(folder / "config.json", lambda about: [about.pop(name) for name in ("rope_theta", "num_key_value_heads")])
    assert "has num_key_value_heads 4" in _refused(folder)
    edit_json(folder / "config.json", lambda about: about.update(num_key_value_heads=2))
    assert "has rope_theta 10000.0" in _refused(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b""),
        ("config.json", b"[]"),
        ("config.json", b"\xff"),
        (INDEX, b"{"),
        (INDEX, b"{}"),
        (INDEX, b'{"weight_map": {"model.norm.weight": 3}}'),
        (INDEX, b'{"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}'),
    ],
)
def test_damaged_descriptions(tmp_path: Path, name: str, content: bytes) -> None:
    folder = save_llama(tmp_path / "llama", shard="4KB")
    (folder / name).write_bytes(content)
    assert name in _refused(folder, CorruptData)


@pytest.mark.parametrize("value", [None, "16", 0, True, [16]])
def test_a_size_that_is_none(tmp_path: Path, value: object) -> None:
    folder = save_llama(tmp_path / "llama")
    edit_json(folder / "config.json", lambda about: about.update(hidden_size=value))
    assert "config.json has hidden_size" in _refused(folder, CorruptData)


@pytest.mark.parametrize("value", ["64", [64], {}, 0, True])
def test_a_window_that_is_none(tmp_path: Path, value: object) -> None:
    folder = save_llama(tmp_path / "llama", make_llama(mistral=True))
    edit_json(folder / "config.json", lambda about: about.update(sliding_window=value))
    assert f"config.json has sliding_window {value!r}, which is no size" in _refused(folder, CorruptData)
    edit_json(folder / "config.json", lambda about: about.update(sliding_window=32))
    make_plan(_config(folder))


def test_nothing_there(tmp_path: Path) -> None:
    assert "there is no such folder (give the folder of a Hugging Face checkpoint" in _refused(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "there is no such folder" in _refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "the folder has no config.json" in _refused(tmp_path / "empty")
    folder = save_llama(tmp_path / "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert f"the folder has neither model.safetensors nor {INDEX}" in _refused(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_torn_files(tmp_path: Path, keep: int) -> None:
    folder = save_llama(tmp_path / "llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors is torn" in _refused(folder, CorruptData)


def test_missing_parts(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama", shard="4KB")
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    last = files["model.layers.3.mlp.down_proj.weight"]
    (folder / last).rename(folder / "aside")
    assert f"the checkpoint has no file {last}" in _refused(folder)
    (folder / "aside").rename(folder / last)
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    assert "the checkpoint has no tensor model.norm.weight" in _refused(folder)


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_wrong_tensors(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama")
    name = "model.layers.2.self_attn.k_proj.weight"
    whole = make_llama().state_dict()[name]
    _rewrite(folder, lambda tensors: tensors.pop(name))
    assert f"the checkpoint has no tensor {name}" in _refused(folder)
    _rewrite(folder, lambda tensors: tensors.update({name: whole[1:].contiguous()}))
    expected = f"the tensor {name} has the shape [7, 16], and config.json says [8, 16]"
    assert expected in _refused(folder, CorruptData)
    _rewrite(folder, lambda tensors: tensors.update({name: whole.to(torch.int8)}))
    assert f"cannot be cut into blocks: the tensor {name} is stored as I8" in _refused(folder)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    """Seen by the block that reads them."""
    folder, name = save_llama(tmp_path / "llama"), "model.layers.2.self_attn.k_proj.weight"
    _rewrite(folder, lambda tensors: tensors[name].fill_(torch.nan))
    config = _config(folder, depth=4)
    family = family_of(config)
    codebook = family.codebook(config)
    pieces = family.cut(config)
    for piece, holds in zip(pieces, (False, True, False), strict=True):
        assert piece.trained is not None
        block = family.build_block(config, piece.layers, piece.trained, codebook)
        assert (piece.layers[0] <= 2 < piece.layers[1]) == holds
        if holds:
            with pytest.raises(CorruptData, match=f"{name} holds values that are not finite"):
                family.start_from(config, piece.layers, block)
        else:
            family.start_from(config, piece.layers, block)
