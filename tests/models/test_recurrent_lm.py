from __future__ import annotations

import math

import pytest
import torch
from small_text import LENGTH, RANGE, VOCAB, noisy_codes, random_tokens, text_config, train_a_little
from torch import Tensor
from torch.nn import functional as F

from dbtrain.config import RunConfig
from dbtrain.models import family_of
from dbtrain.models.llama import noisy_mask
from dbtrain.models.recurrent_lm import STATE_STD, RecurrentLM, RecurrentLMBlock, draw_iterations
from dbtrain.training.planner import make_plan

DEFAULT = {"iterations": 3, "backprop": 2}
VARIANTS = [{}, {"kv_heads": 2, "tie_head": True, "separator": 3, "prelude": 2}, {"coda": 0}]


def _config(model: dict[str, object] | None = None, **sections: object) -> RunConfig:
    sections = {"blocks": {"count": 1}, **sections}
    return text_config("recurrent_lm", model={**DEFAULT, **(model or {})}, **sections)


def _block(config: RunConfig, steps: int = 5) -> RecurrentLMBlock:
    torch.manual_seed(0)
    family = family_of(config)
    block = family.build_block(config, (0, 4), RANGE, family.codebook(config))
    assert isinstance(block, RecurrentLMBlock)
    train_a_little(block, steps)
    return block.eval()


def _whole(config: RunConfig, steps: int = 5) -> RecurrentLM:
    torch.manual_seed(0)
    whole = RecurrentLM(config)
    train_a_little(whole, steps)
    return whole.eval()


def _same(a: Tensor, b: Tensor) -> list[bool]:
    """By position, whether it is the same bit for bit in every row."""
    return [torch.equal(a[:, i], b[:, i]) for i in range(a.shape[1])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_is_seen_by_later_ones_alone(variant: dict[str, object]) -> None:
    """Changing token j changes no output for x_0 ... x_j, in the clean stream, the noisy stream and end to end."""
    block, whole = _block(_config(variant)), _whole(_config(variant))
    tokens, (z, sigma) = random_tokens(), noisy_codes(block)
    for changed in range(LENGTH):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % VOCAB
        expected = [i <= changed for i in range(LENGTH)]
        before, after = (block(x, z, sigma, clean=True) for x in (tokens, other))
        assert _same(before, after) == 2 * expected
        assert _same(whole(tokens), whole(other)) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_noise_is_seen_by_its_own_target_alone(variant: dict[str, object]) -> None:
    block = _block(_config(variant))
    tokens, (z, sigma) = random_tokens(), noisy_codes(block)
    before = block(tokens, z, sigma, clean=True)
    for changed in range(LENGTH):
        other_z, other_sigma = z.clone(), sigma.clone()
        other_z[:, changed] += 1.0
        other_sigma[:, changed] *= 2.0
        for after in (block(tokens, other_z, sigma, clean=True), block(tokens, z, other_sigma, clean=True)):
            assert _same(before, after) == [i != changed for i in range(2 * LENGTH)]


@pytest.mark.parametrize("weight", ["unit", "edm"])
def test_training_loss_of_a_block_by_hand(weight: str) -> None:
    """One pass, whatever the number of iterations; each token at its own noise level."""
    block = _block(_config(noise={"weight": weight}))
    tokens, draw = random_tokens(), block.draw(8, torch.Generator().manual_seed(3))
    z = block.codebook[tokens] + draw["sigma"][..., None] * draw["eps"]
    said = block(tokens, z, draw["sigma"]).log_softmax(dim=-1).gather(2, tokens[..., None])[..., 0]
    factors = 1.0 if weight == "unit" else (draw["sigma"] ** 2 + 0.25) / (draw["sigma"] * 0.5) ** 2
    expected = -(factors * said).mean()
    torch.testing.assert_close(block.training_loss({"tokens": tokens}, draw), expected)
    more = _block(_config({"iterations": 30}, noise={"weight": weight}))
    assert torch.equal(more.training_loss({"tokens": tokens}, draw), block.training_loss({"tokens": tokens}, draw))


def test_a_block_by_hand() -> None:
    """The prelude reads the clean stream alone; core and coda have two streams, each joined with its second input."""
    block = _block(_config({"prelude": 2}))
    tokens, (z, sigma) = random_tokens(), noisy_codes(block)
    rotation, condition = block.rotary(slice(0, LENGTH + 1)), block.noise_embedding(sigma.log().flatten() / 4)
    e = block.embed_tokens(torch.cat([torch.full((8, 1), VOCAB - 1), tokens[:, :-1]], dim=1))
    for layer in block.prelude.layers:
        e = layer(e, rotation[:, :-1])
    e = block.prelude.norm(e)
    code = block.code_stem(z / (sigma**2 + 0.25).sqrt()[..., None])
    x = tuple(F.linear(torch.cat([e, b], dim=-1), block.prelude.adapter.weight) for b in (torch.zeros_like(e), code))
    assert len(block.layers) == 2
    for layer in block.layers:
        x = layer.two_streams(x, condition.view(8, LENGTH, -1), rotation, noisy_mask(LENGTH, e))
    shift, scale = block.norm_modulation(condition).view(8, LENGTH, -1).chunk(2, dim=-1)
    expected = block.head(block.norm(x[1]) * (1 + scale) + shift)
    torch.testing.assert_close(block(tokens, z, sigma), expected)


def test_a_block_starts_as_if_there_were_no_code() -> None:
    block = _block(_config(), steps=0)
    tokens, (z, sigma) = random_tokens(), noisy_codes(block)
    assert torch.equal(block(tokens, z, sigma), block(tokens, -z, 2 * sigma))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant: dict[str, object]) -> None:
    # An iteration without gradients before those with, as in most steps.
    for module in (_block(_config(variant), steps=0), _whole(_config({**variant, "backprop": 1}), steps=0)):
        start = {name: p.detach().clone() for name, p in module.named_parameters()}
        train_a_little(module, 4)
        for name, parameter in module.named_parameters():
            assert not torch.equal(parameter, start[name]), name


def _gradients(whole: RecurrentLM, draw: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the training loss, by name."""
    whole.zero_grad()
    whole.training_loss({"tokens": random_tokens()}, draw).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}


def _draw(whole: RecurrentLM, iterations: int) -> dict[str, Tensor]:
    return {**whole.draw(8, torch.Generator().manual_seed(3)), "iterations": torch.zeros(8, iterations)}


def _by_hand(whole: RecurrentLM, draw: dict[str, Tensor], cut: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients with the state after `cut` iterations taken for a constant."""
    tokens, rotation = random_tokens(), whole.rotary(slice(0, LENGTH))
    e = whole.prelude.norm(whole.prelude.layers[0](whole.embed_tokens(whole.shifted(tokens)), rotation))
    state = draw["state"]
    for iteration in range(draw["iterations"].shape[1]):
        state = state.detach() if iteration == cut else state
        state = F.linear(torch.cat([e, state], dim=-1), whole.prelude.adapter.weight)
        for layer in whole.core:
            state = layer(state, rotation)
        state = whole.core_norm(state)
    for layer in whole.coda:
        state = layer(state, rotation)
    loss = F.cross_entropy(whole.head(whole.norm(state)).flatten(0, 1), tokens.flatten())
    names, parameters = zip(*whole.named_parameters(), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize(("iterations", "backprop"), [(1, 2), (2, 2), (5, 2), (5, 8)])
def test_gradients_go_through_the_last_iterations(iterations: int, backprop: int) -> None:
    whole = _whole(_config({"backprop": backprop}))
    draw = _draw(whole, iterations)
    loss, expected = _by_hand(whole, draw, cut=iterations - backprop)
    torch.testing.assert_close(whole.training_loss({"tokens": random_tokens()}, draw), loss)
    found = _gradients(whole, draw)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    assert expected["prelude.layers.0.self_attn.q_proj.weight"].abs().max() > 0
    full = _by_hand(whole, draw, cut=-1)[1]
    cut = any(not torch.allclose(found[name], full[name], rtol=1e-3, atol=1e-7) for name in full)
    assert cut == (iterations > backprop)


@pytest.mark.filterwarnings("error")
def test_gradients_flow_under_autocast() -> None:
    """Autocast converts a weight once, in an iteration without gradients; old versions of PyTorch lost them by it.

    And nothing takes a slow path, of which PyTorch would warn.
    """
    whole = _whole(_config({"backprop": 1}))
    with torch.autocast("cpu", torch.bfloat16):
        rough = _gradients(whole, _draw(whole, 3))
    exact = _gradients(whole, _draw(whole, 3))
    assert rough.keys() == exact.keys()
    for name, value in exact.items():
        assert F.cosine_similarity(rough[name].flatten(), value.flatten(), dim=0) > 0.95, name


def test_recomputing_changes_no_gradient() -> None:
    for module in (_block(_config()), _whole(_config())):
        draw = module.draw(8, torch.Generator().manual_seed(4))
        grads = []
        for recompute in (False, True):
            module.recompute = recompute
            module.zero_grad()
            module.training_loss({"tokens": random_tokens()}, draw).backward()  # type: ignore[no-untyped-call]
            grads.append([p.grad for p in module.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("mean", [1, 2, 8, 32])
def test_iterations_are_log_normal_poisson(mean: int) -> None:
    """Mean, and variance rate + (exp(1/4) - 1) rate^2 of a Poisson number whose rate has a logarithm with std 1/2."""
    source = torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw_iterations(mean, source) for _ in range(20_000)]).double()
    variance = (mean - 1) + (math.exp(0.25) - 1) * (mean - 1) ** 2
    assert drawn.min() >= 1
    assert float(drawn.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / 20_000))
    assert float(drawn.var()) == pytest.approx(variance, rel=0.08)


def test_draw_follows_the_generator() -> None:
    whole = _whole(_config({"iterations": 8}), steps=0)
    one, again = (whole.draw(16, torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert one["state"].shape == (16, LENGTH, 16)
    assert one["state"].abs().max() <= 3 * STATE_STD
    assert float(one["state"].std()) == pytest.approx(STATE_STD, rel=0.05)
    assert len(one["iterations"]) == 16
    source = torch.Generator().manual_seed(6)
    counts = [whole.draw(2, source)["iterations"].shape[1] for _ in range(40)]
    assert len(set(counts)) > 5
    assert sum(counts) / 40 == pytest.approx(8, abs=2.5)


def test_iterations_are_free_at_inference() -> None:
    whole, tokens = _whole(_config()), random_tokens()
    said = [whole(tokens, iterations) for iterations in (1, 2, 3, 7)]
    assert not any(torch.equal(said[0], other) for other in said[1:])
    assert torch.equal(said[2], whole(tokens))
    assert torch.equal(whole(tokens), whole(tokens))
    with pytest.raises(ValueError, match="0 iterations"):
        whole(tokens, 0)
    other_seed = RecurrentLM(_config().model_copy(update={"seed": 8})).eval()
    other_seed.load_state_dict(whole.state_dict())
    assert not torch.equal(other_seed(tokens), whole(tokens))


@pytest.mark.parametrize("training", [{}, {"recompute": True}, {"precision": "bfloat16"}])
@pytest.mark.parametrize("count", [1, 2])
def test_plans(training: dict[str, object], count: int) -> None:
    """Every block has all layers; the baseline has as many layer-evaluations in fewer steps."""
    config = _config({"depth": 5, "prelude": 2, "iterations": 6}, blocks={"count": count}, training=training)
    plan, whole = make_plan(config), make_plan(config, "end_to_end")
    assert [block.layers for block in plan.blocks] == [(0, 5)] * count
    assert [block.evaluations for block in plan.blocks] == [5] * count
    assert plan.blocks[0].noise is not None
    assert plan.blocks[0].noise.high == 80.0
    assert (plan.blocks[-1].noise or RANGE).low == 0.002
    assert whole.blocks[0].evaluations == 2 + 6 * 2 + 1
    assert whole.steps == round(60 * count * 5 / 15)
    assert whole.layer_evaluations == plan.layer_evaluations


@pytest.mark.parametrize("recompute", [False, True])
def test_a_plan_counts_the_mean_step(recompute: bool) -> None:
    """Arithmetic grows with each iteration; what is kept for the way back only with those that gradients go through."""

    def measured(iterations: int, backprop: int = 2) -> tuple[int, int]:
        config = _config({"iterations": iterations, "backprop": backprop}, training={"recompute": recompute})
        block = make_plan(config, "end_to_end").blocks[0]
        return block.flops_per_sample, block.bytes.activations

    flops, kept = zip(*(measured(iterations) for iterations in (1, 2, 3, 4)), strict=True)
    assert kept[0] < kept[1]
    assert kept[2] == kept[3]
    assert flops[3] - flops[2] < flops[1] - flops[0]  # forward alone
    assert flops[2] < flops[3]
    assert measured(4, 4)[1] > kept[3]


def test_a_training_step_learns_something() -> None:
    """Rows that count upwards: the next token follows from the one before, whatever the noise says."""
    for module in (_block(_config(), steps=0), _whole(_config(), steps=0)):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        source = torch.Generator().manual_seed(0)
        for _ in range(60):
            tokens = (torch.randint(VOCAB, (16, 1), generator=source) + torch.arange(LENGTH)) % VOCAB
            loss = module.training_loss({"tokens": tokens}, module.draw(16, source))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        assert loss.item() < 0.4 * math.log(VOCAB)
