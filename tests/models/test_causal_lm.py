from __future__ import annotations

import math

import pytest
import torch
from small_text import (
    LENGTH,
    RANGE,
    VOCAB,
    causal_block,
    causal_lm,
    noisy_codes,
    random_tokens,
    text_config,
    train_a_little,
)
from torch.nn import functional as F

from dbtrain.diffusion.codebook import digest
from dbtrain.models import family_of
from dbtrain.models.causal_lm import CausalLM
from dbtrain.models.llama import LlamaLayer
from dbtrain.plan import NoiseRange
from dbtrain.training.planner import make_plan


@pytest.mark.parametrize("weight", ["unit", "edm"])
@pytest.mark.parametrize("clean_loss", [0.0, 0.5])
def test_training_loss_by_hand(weight: str, clean_loss: float) -> None:
    block = causal_block(text_config(noise={"weight": weight}, model={"clean_loss": clean_loss}))
    tokens, draw = random_tokens(), block.draw(8, torch.Generator().manual_seed(3))
    total = 0.0
    for n in range(8):
        z = block.codebook[tokens[n]] + draw["sigma"][n][:, None] * draw["eps"][n]
        both = block(tokens[n : n + 1], z[None], draw["sigma"][n : n + 1], clean=True)[0].detach().log_softmax(dim=-1)
        for i in range(LENGTH):
            sigma, target = float(draw["sigma"][n, i]), int(tokens[n, i])
            factor = 1.0 if weight == "unit" else (sigma**2 + 0.25) / (sigma * 0.5) ** 2
            total -= factor * float(both[i, target]) + clean_loss * float(both[LENGTH + i, target])
    assert block.training_loss({"tokens": tokens}, draw).item() == pytest.approx(total / (8 * LENGTH), rel=1e-4)


def test_the_clean_stream_is_an_ordinary_model() -> None:
    """With the weights of a block, the end-to-end network says what the block's clean stream says."""
    block = causal_block(text_config(model={"clean_loss": 1.0}))
    whole = CausalLM(text_config(model={"depth": 2}))
    shared = {name: value for name, value in block.state_dict().items() if name in whole.state_dict()}
    whole.load_state_dict(shared)
    tokens, (z, sigma) = random_tokens(), noisy_codes(block)
    said = block(tokens, z, sigma, clean=True)
    torch.testing.assert_close(said[:, LENGTH:], whole(tokens))
    assert torch.equal(said[:, :LENGTH], block(tokens, z, sigma))


def test_draw_follows_generator_and_range() -> None:
    block = causal_block(text_config(), steps=0)
    one, again, other = (block.draw(64, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert one["sigma"].shape == (64, LENGTH)
    assert one["eps"].shape == (64, LENGTH, 16)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert RANGE.low <= one["sigma"].min() < one["sigma"].max() <= RANGE.high
    assert len(one["sigma"].unique()) > 60 * LENGTH  # each token has its own


def test_one_noise_level_a_row_may_be_given_once() -> None:
    block = causal_block(text_config())
    tokens, (z, _) = random_tokens(), noisy_codes(block)
    row = torch.linspace(0.3, 4.0, 8)[:, None]
    torch.testing.assert_close(block(tokens, z, row), block(tokens, z, row.expand(-1, LENGTH)))


def test_output_depends_on_past_code_and_noise_level() -> None:
    block = causal_block(text_config())
    tokens, (z, sigma) = random_tokens(), noisy_codes(block)
    said = block(tokens, z, sigma)
    assert said.shape == (8, LENGTH, VOCAB)
    for other in (block(tokens.flip(0), z, sigma), block(tokens, -z, sigma), block(tokens, z, 3 * sigma)):
        assert (other[:, 1:] - said[:, 1:]).abs().amax(dim=(1, 2)).min() > 1e-4


def test_a_block_starts_as_if_there_were_no_code() -> None:
    """At the first step all that a block can know is the text before; it starts from there."""
    block = causal_block(text_config(), steps=0)
    tokens, (z, sigma) = random_tokens(), noisy_codes(block)
    assert torch.equal(block(tokens, z, sigma), block(tokens, -z, 2 * sigma))


@pytest.mark.parametrize("tie_head", [False, True])
@pytest.mark.parametrize("clean_loss", [0.0, 1.0])
@pytest.mark.parametrize("noisy_layers", [0, 1, None])
def test_every_parameter_learns(tie_head: bool, clean_loss: float, noisy_layers: int | None) -> None:
    model = {"tie_head": tie_head, "clean_loss": clean_loss, "noisy_layers": noisy_layers, "kv_heads": 2}
    config = text_config(model=model)
    for module in (causal_block(config, steps=0), causal_lm(config, steps=0)):
        start = {name: p.detach().clone() for name, p in module.named_parameters()}
        train_a_little(module, 4)
        assert any("lm_head" in name for name in start) != tie_head
        for name, parameter in module.named_parameters():
            assert not torch.equal(parameter, start[name]), name


def test_codebook_is_frozen() -> None:
    config = text_config()
    block = causal_block(config, steps=0)
    before = digest(block.codebook)
    torch.testing.assert_close(block.codebook @ block.codebook.T, torch.eye(VOCAB), atol=1e-5, rtol=0)
    assert not any("codebook" in name for name in [*block.state_dict(), *dict(block.named_parameters())])
    train_a_little(block, 3)
    assert digest(block.codebook) == before


def test_more_tokens_than_dimensions_have_codes_of_unit_length() -> None:
    codebook = family_of(text_config()).codebook(text_config(model={"vocab_size": 50}))
    assert codebook is not None
    torch.testing.assert_close(codebook.norm(dim=1), torch.ones(50))
    assert (codebook @ codebook.T - torch.eye(50)).abs().max() < 0.95


def test_a_training_step_learns_something() -> None:
    """Rows that count upwards: the next token follows from the one before, whatever the noise says."""
    config = text_config()
    family = family_of(config)
    torch.manual_seed(0)
    high = NoiseRange(low=20.0, high=80.0)
    for module in (family.build_block(config, (0, 2), high, family.codebook(config)), CausalLM(config)):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        source = torch.Generator().manual_seed(0)
        for _ in range(60):
            tokens = (torch.randint(VOCAB, (16, 1), generator=source) + torch.arange(LENGTH)) % VOCAB
            loss = module.training_loss({"tokens": tokens}, module.draw(16, source))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        assert loss.item() < 0.4 * math.log(VOCAB)


@pytest.mark.parametrize("noisy_layers", [None, 0])
def test_end_to_end_stands_on_the_same_layers(noisy_layers: int | None) -> None:
    config = text_config(model={"noisy_layers": noisy_layers})
    whole, block = causal_lm(config), causal_block(config)
    assert [type(layer) for layer in whole.layers] == [LlamaLayer] * config.model.depth
    ours, theirs = block.layers[0].state_dict(), whole.layers[0].state_dict()
    assert {name: ours[name].shape for name in theirs} == {name: value.shape for name, value in theirs.items()}
    beside = {name.partition(".")[0] for name in ours.keys() - theirs.keys()}
    assert beside == (set() if noisy_layers == 0 else {"modulation"})
    tokens = random_tokens()
    expected = F.cross_entropy(whole(tokens).flatten(0, 1), tokens.flatten())
    assert torch.equal(whole.training_loss({"tokens": tokens}, {}), expected)


@pytest.mark.parametrize("clean_loss", [0.0, 1.0])
@pytest.mark.parametrize("noisy_layers", [0, 1, None])
def test_recomputing_changes_no_gradient(clean_loss: float, noisy_layers: int | None) -> None:
    config = text_config(model={"clean_loss": clean_loss, "noisy_layers": noisy_layers})
    draw, tokens = None, random_tokens()
    for module in (causal_block(config), causal_lm(config)):
        draw = module.draw(8, torch.Generator().manual_seed(3))
        grads = []
        for recompute in (False, True):
            module.recompute = recompute
            module.zero_grad()
            module.training_loss({"tokens": tokens}, draw).backward()  # type: ignore[no-untyped-call]
            grads.append([p.grad for p in module.parameters() if p.grad is not None])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("training", [{}, {"recompute": True}, {"precision": "bfloat16"}])
def test_plans(training: dict[str, object]) -> None:
    plan = make_plan(text_config(training=training, model={"kv_heads": 2}))
    assert [block.layers for block in plan.blocks] == [(0, 2), (2, 4)]
    whole = make_plan(text_config(training=training, model={"kv_heads": 2}), "end_to_end")
    assert plan.layer_evaluations == whole.layer_evaluations
    assert plan.blocks[0].bytes.activations > 0 < plan.blocks[0].flops_per_sample


def test_loss_is_in_float32_under_autocast() -> None:
    config = text_config(model={"clean_loss": 1.0})
    for module in (causal_block(config), causal_lm(config)):
        draw = module.draw(8, torch.Generator().manual_seed(3))
        exact = module.training_loss({"tokens": random_tokens()}, draw)
        with torch.autocast("cpu", torch.bfloat16):
            rough = module.training_loss({"tokens": random_tokens()}, draw)
        assert rough.dtype == torch.float32
        assert rough.item() == pytest.approx(exact.item(), rel=0.02)
