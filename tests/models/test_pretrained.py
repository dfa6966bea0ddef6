"""Blocks that start from a checkpoint: the right weights in the right places, and only those."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_checkpoints import SECTION, make_llama, random_rows, save_llama, shifted
from safetensors.torch import load_file, save_file
from small_families import raw_config
from small_runs import start_run, train_all
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from dbtrain.assembly.assemble import assemble
from dbtrain.assembly.loading import load_model
from dbtrain.config import RunConfig
from dbtrain.config_file import parse_config
from dbtrain.diffusion.codebook import digest
from dbtrain.errors import CorruptData, UserError
from dbtrain.models import TrainableModule, family_of
from dbtrain.models.causal_lm import CausalLM, CausalLMBlock
from dbtrain.models.pretrained import checkpoint_name
from dbtrain.plan import Kind, NoiseRange
from dbtrain.training.planner import make_plan
from dbtrain.training.trainer import BlockTrainer

WHOLE = NoiseRange(low=0.002, high=80.0)


def _config(shards: Path, checkpoint: Path, **sections: dict[str, Any]) -> RunConfig:
    model = {**SECTION, "pretrained": str(checkpoint), **sections.pop("model", {})}
    return parse_config(raw_config("causal_lm", shards, **{"training": {"steps": 4}, "model": model, **sections}))


def _fresh(config: RunConfig, where: Path, index: int = 0, kind: Kind = "blocks") -> TrainableModule:
    """What a worker has before its first step."""
    with closing(BlockTrainer(start_run(config, where, kind), index, 1)) as trainer:
        assert trainer.step == 0
        return trainer.module


def _assert_from(module: TrainableModule, layers: tuple[int, int], stored: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters that do not come from the checkpoint; the others are its, bit for bit."""
    own = set()
    for name, parameter in module.named_parameters():
        known = checkpoint_name(name, layers[0])
        if known is None:
            own.add(name)
        else:
            assert torch.equal(parameter, stored[known].float()), name
    return own


@pytest.mark.parametrize("shard", ["1GB", "4KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_each_block_takes_its_own_layers(topics: Path, tmp_path: Path, tied: bool, shard: str) -> None:
    network = make_llama(tied=tied)
    blocks, model = {"split": [2, 1, 1]}, {"noisy_layers": 1}
    config = _config(topics, save_llama(tmp_path / "llama", network, shard), blocks=blocks, model=model)
    stored = network.state_dict()
    for index, layers in enumerate([(0, 2), (2, 3), (3, 4)]):
        module = _fresh(config, tmp_path / "run", index)
        assert isinstance(module, CausalLMBlock)
        own = _assert_from(module, layers, stored)
        # What makes it a denoising block is not in the checkpoint.
        assert {name.partition(".")[0] for name in own} == {"code_stem", "noise_embedding", "norm_modulation", "layers"}
        assert all("modulation" in name for name in own if name.startswith("layers."))


def test_a_tied_checkpoint_may_stay_tied(topics: Path, tmp_path: Path) -> None:
    network = make_llama(tied=True)
    config = _config(topics, save_llama(tmp_path / "llama", network), model={"tie_head": True})
    module = _fresh(config, tmp_path / "run")
    assert isinstance(module, CausalLMBlock)
    assert module.lm_head is None
    _assert_from(module, (0, 2), network.state_dict())


@pytest.mark.parametrize("mistral", [False, True])
def test_the_baseline_says_what_the_checkpoint_says(topics: Path, tmp_path: Path, mistral: bool) -> None:
    network = make_llama(mistral=mistral)
    config = _config(topics, save_llama(tmp_path / "llama", network))
    module = _fresh(config, tmp_path / "run", kind="end_to_end").eval()
    assert isinstance(module, CausalLM)
    assert _assert_from(module, (0, 4), network.state_dict()) == set()
    rows = random_rows()
    with torch.no_grad():
        torch.testing.assert_close(module(rows), network(shifted(rows)).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_become_long_ones(topics: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    network = make_llama().to(dtype)
    module = _fresh(_config(topics, save_llama(tmp_path / "llama", network)), tmp_path / "run")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    _assert_from(module, (0, 2), network.state_dict())


def test_random_parts_are_those_of_a_run_from_scratch(topics: Path, tmp_path: Path) -> None:
    save_llama(tmp_path / "llama")
    started = _fresh(_config(topics, tmp_path / "llama"), tmp_path / "started")
    scratch = _fresh(_config(topics, tmp_path, model={"pretrained": None}), tmp_path / "scratch")
    theirs = dict(scratch.named_parameters())
    for name, parameter in started.named_parameters():
        if checkpoint_name(name) is None:
            assert torch.equal(parameter, theirs[name]), name


def test_a_block_reads_its_own_tensors_only(topics: Path, tmp_path: Path) -> None:
    """Each tensor has a file of its own here; those of other blocks may be missing."""
    folder = save_llama(tmp_path / "llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / f"{name}.st")
    index = {"weight_map": {name: f"{name}.st" for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = _config(topics, folder, blocks={"count": 2})
    family = family_of(config)
    codebook = family.codebook(config)
    first, second = (family.build_block(config, layers, WHOLE, codebook) for layers in ((0, 2), (2, 4)))
    for name in tensors:
        if name.startswith(("model.layers.0.", "model.layers.1.")):
            (folder / f"{name}.st").unlink()
    family.start_from(config, (2, 4), second)
    with pytest.raises(UserError, match=r"no file model\.layers\.0\."):
        family.start_from(config, (0, 2), first)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_codebook_has_the_directions_of_the_embedding(topics: Path, tmp_path: Path, scale: float) -> None:
    network = make_llama()
    with torch.no_grad():
        network.model.embed_tokens.weight[5] = 0.0  # as libraries leave the row of a padding token
        network.model.embed_tokens.weight[6] = 1e-30  # its square is no float32
    config = _config(topics, save_llama(tmp_path / "llama", network), codebook={"scale": scale})
    family = family_of(config)
    codebook = family.codebook(config)
    assert codebook is not None
    assert (codebook.shape, codebook.dtype) == ((257, 16), torch.float32)
    norms = torch.full((257,), scale)
    norms[5] = 0.0
    torch.testing.assert_close(codebook.norm(dim=1), norms)
    expected = F.normalize(network.model.embed_tokens.weight.detach().double(), dim=1, eps=1e-300) * scale
    torch.testing.assert_close(codebook.double(), expected, rtol=1e-6, atol=1e-7)
    again = family.codebook(config)
    assert again is not None
    assert digest(again) == digest(codebook) == make_plan(config).codebook_sha256
    assert torch.equal(family.build_block(config, (0, 2), WHOLE, codebook).get_buffer("codebook"), codebook)


def test_training_goes_on_from_its_own_checkpoints(topics: Path, tmp_path: Path) -> None:
    """The second start of a block takes its own last step, and nothing of where it began."""
    config = _config(topics, save_llama(tmp_path / "llama"))
    run = train_all(start_run(config, tmp_path / "run"))
    with closing(BlockTrainer(run, 1, 2)) as trainer:
        assert trainer.step == 4
        assert not torch.equal(trainer.module.get_parameter("lm_head.weight"), make_llama().lm_head.weight)


def test_an_assembled_model_needs_no_checkpoint(topics: Path, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama")
    run = train_all(start_run(_config(topics, folder), tmp_path / "run"))
    path = assemble(run).path
    folder.rename(tmp_path / "away")
    assert len(load_model(path).modules) == 3
    with pytest.raises(UserError, match=r"model\.pretrained = .*/llama': there is no such folder"):
        assemble(run)
    (tmp_path / "away").rename(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] += 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptData, match="the codebook made here"):
        assemble(run)


def test_workers_elsewhere_find_the_folder(topics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = _config(topics, Path("llama")).located()
    assert getattr(config.model, "pretrained", None) == str(tmp_path / "llama")
    scratch = _config(topics, tmp_path, model={"pretrained": None})
    assert scratch.located() == scratch


def _markov(rows: int, seed: int, length: int = 16) -> torch.Tensor:
    """Text in which two tokens say much about the next: (rows, length) ids below 15."""
    source = torch.Generator().manual_seed(0)
    next_token = torch.softmax(3 * torch.randn(15, 15, 15, generator=source), dim=-1)
    source.manual_seed(seed)
    tokens = list(torch.randint(15, (2, rows), generator=source))
    while len(tokens) < length:
        tokens.append(torch.multinomial(next_token[tokens[-2], tokens[-1]], 1, generator=source)[:, 0])
    return torch.stack(tokens, dim=1)


def _fit(module: torch.nn.Module, steps: int, loss_of: Any) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(_markov(32, seed=step)).backward()
        optimizer.step()


@pytest.mark.parametrize("noisy_layers", [None, 0])
def test_what_the_checkpoint_can_do_is_kept(tmp_path: Path, noisy_layers: int | None) -> None:
    """Next-token cross-entropy of the clean path, as it is exported. Where noisy tokens go through the layers, it gets
    worse without the clean loss; with it a single block gets better, and several lose less, for each learns to stand
    alone. Where they do not, the clean path is what is trained. docs/pretrained.md has the figures."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16, "rms_norm_eps": 1e-5}
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=48, **sizes))
    _fit(network, 150, lambda rows: F.cross_entropy(network(shifted(rows, 15)).logits.flatten(0, 1), rows.flatten()))
    save_llama(tmp_path / "llama", network)
    held_out = _markov(256, seed=10**6)

    def clean_cross_entropy(blocks: list[CausalLMBlock]) -> float:
        with torch.no_grad():
            x = blocks[0].embed_tokens(blocks[0].shifted(held_out))
            for block in blocks:
                for layer in block.layers:
                    x = layer(x, block.rotary(slice(0, 16)))
            said = blocks[-1].head(blocks[-1].norm(x))
        return float(F.cross_entropy(said.flatten(0, 1), held_out.flatten()))

    section = {"depth": 2, "width": 32, "heads": 2, "kv_heads": 2, "mlp_width": 48, "length": 16, "vocab_size": 16}
    usual = {"rope_theta": 10000.0, "norm_eps": 1e-5}
    found = {}
    for count, clean_loss in ((1, 0.0), (1, 1.0), (2, 0.0), (2, 1.0)):
        model = {**section, **usual, "clean_loss": clean_loss, "noisy_layers": noisy_layers}
        config = _config(tmp_path, tmp_path / "llama", model=model, blocks={"count": count}, noise={"p_mean": 0.5})
        family, blocks = family_of(config), []
        for piece in family.cut(config):
            torch.manual_seed(0)
            assert piece.trained is not None
            block = family.build_block(config, piece.layers, piece.trained, family.codebook(config))
            assert isinstance(block, CausalLMBlock)
            family.start_from(config, piece.layers, block)
            blocks.append(block)
        before = clean_cross_entropy(blocks)
        for block in blocks:
            source = torch.Generator().manual_seed(3)
            _fit(block, 60, lambda rows, b=block, s=source: b.training_loss({"tokens": rows}, b.draw(32, s)))
        found[count, clean_loss] = clean_cross_entropy(blocks) - before
        print(f"{count} blocks, clean_loss {clean_loss}: {before:.2f} nats, {found[count, clean_loss]:+.2f}")
    assert found[1, 1.0] < 0.02
    if noisy_layers is None:
        assert found[1, 0.0] > 0.1
        assert found[2, 1.0] < found[2, 0.0] - 0.1
    else:
        assert all(abs(found[count, 0.0] - found[count, 1.0]) < 0.05 for count in (1, 2))
