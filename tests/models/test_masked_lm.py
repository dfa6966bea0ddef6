from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dbtrain.config import RunConfig
from dbtrain.config_file import parse_config
from dbtrain.diffusion.masking import MaskSchedule, partition_levels
from dbtrain.errors import UserError
from dbtrain.models import family_of
from dbtrain.models.masked_lm import MaskedLM
from dbtrain.plan import NoiseRange
from dbtrain.training.planner import make_plan

LENGTH, VOCABULARY = 4, 7
TOKENS = torch.tensor([[3, 0, 6, 6]])


def _config(**sections: object) -> RunConfig:
    raw: dict[str, Any] = {
        "name": "small",
        "model": {
            "family": "masked_lm",
            "length": LENGTH,
            "vocab_size": VOCABULARY,
            "depth": 3,
            "width": 8,
            "heads": 2,
            "mlp_width": 16,
        },
        "data": {"source": "topics"},
        "blocks": {"count": 3},
        "training": {"steps": 5, "batch_size": 8},
    }
    for name, value in sections.items():
        raw[name] = {**raw.get(name, {}), **value} if isinstance(value, dict) else value
    return parse_config(raw)


def _fixed(config: RunConfig, trained: NoiseRange) -> MaskedLM:
    """A model whose answers depend on everything they may depend on; the same weights for every range."""
    torch.manual_seed(0)
    module = MaskedLM(config, 2, trained).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


WHOLE = NoiseRange(low=0.0, high=1.0)


def _exact_bound(module: MaskedLM, own: NoiseRange) -> float:
    """The integral over [low, high] in nats: all masks of the row, Gauss-Legendre quadrature over the level."""
    nodes, shares = np.polynomial.legendre.leggauss(24)
    masks = torch.tensor(list(itertools.product((False, True), repeat=LENGTH)))[1:]
    seen = torch.where(masks, VOCABULARY, TOKENS)
    number = masks.sum(dim=1)
    total = 0.0
    for node, share in zip(nodes, shares, strict=True):
        level = own.low + (own.high - own.low) * (node + 1) / 2
        m = level if module.schedule.kind == "linear" else np.sin(np.pi / 2 * level)
        slope = 1.0 if module.schedule.kind == "linear" else np.pi / 2 * np.cos(np.pi / 2 * level)
        with torch.no_grad():
            log_probs = module(seen, torch.full((len(masks),), level)).log_softmax(dim=-1)
        nats = -(log_probs.gather(2, TOKENS.expand(len(masks), -1)[..., None])[..., 0] * masks).sum(dim=1)
        probability = m**number * (1 - m) ** (LENGTH - number)
        total += (own.high - own.low) / 2 * share * slope / m * float((probability * nats).sum())
    return total


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_block_losses_are_terms_of_the_bound(kind: str) -> None:
    """Each block's training loss, its range's width, and the bound in one sum; against exact integrals."""
    config, n = _config(model={"mask_schedule": kind}), 10_000
    ranges = partition_levels(MaskSchedule(kind), 3)  # type: ignore[arg-type]
    exact, estimates = [], []
    for index, own in enumerate([*ranges, WHOLE]):
        module = _fixed(config, own)
        draw = module.draw(n, torch.Generator().manual_seed(index))
        with torch.no_grad():
            loss = module.training_loss({"tokens": TOKENS.expand(n, -1)}, draw)
        estimates.append((own.high - own.low) * LENGTH * loss.item())
        exact.append(_exact_bound(module, own))
    assert estimates == pytest.approx(exact, rel=0.02)
    assert sum(exact[:3]) == pytest.approx(exact[3], rel=1e-6)
    assert sum(estimates[:3]) == pytest.approx(estimates[3], rel=0.015)
    assert max(exact[:3]) > 1.02 * min(exact[:3])  # the ranges can be told apart


def test_loss_by_hand() -> None:
    module = _fixed(_config(), NoiseRange(low=0.2, high=0.9))
    source = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCABULARY, (6, LENGTH), generator=source)
    draw = module.draw(6, source)
    total = 0.0
    for row in range(6):
        level, masked = draw["level"][row : row + 1], draw["masked"][row]
        seen = [VOCABULARY if hidden else token for hidden, token in zip(masked, tokens[row].tolist(), strict=True)]
        log_probs = module(torch.tensor([seen]), level)[0].detach().log_softmax(dim=-1)
        nats = -sum(log_probs[i, tokens[row, i]].item() for i in range(LENGTH) if masked[i])
        t = level.item()
        total += nats * (1 - (1 - t) ** LENGTH) / t / LENGTH
    assert module.training_loss({"tokens": tokens}, draw).item() == pytest.approx(total / 6, rel=1e-5)


def test_every_output_sees_every_token_and_the_level() -> None:
    module, level = _fixed(_config(), WHOLE), torch.tensor([0.4])
    said = module(TOKENS, level)
    assert said.shape == (1, LENGTH, VOCABULARY)
    for j in range(LENGTH):
        other = TOKENS.clone()
        other[0, j] = VOCABULARY
        assert ((module(other, level) - said).abs().amax(dim=-1) > 1e-4).all()
    assert ((module(TOKENS, torch.tensor([0.5])) - said).abs().amax(dim=-1) > 1e-4).all()
    rows = module(TOKENS.flip(1).repeat(3, 1).index_put((torch.tensor([1]),), TOKENS[0]), level.expand(3))
    torch.testing.assert_close(rows[1:2], said)


def test_draw_follows_generator_and_range() -> None:
    module = _fixed(_config(), NoiseRange(low=1 / 3, high=2 / 3))
    one, again, other = (module.draw(64, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert {name: (value.shape, value.dtype) for name, value in one.items()} == {
        "level": ((64,), torch.float32),
        "masked": ((64, LENGTH), torch.bool),
    }
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert 1 / 3 - 1e-6 < one["level"].min() < one["level"].max() < 2 / 3 + 1e-6
    assert one["masked"].any(dim=1).all()
    assert 0.4 < one["masked"].double().mean() < 0.65


def test_cut_and_baseline() -> None:
    config = _config(model={"depth": 7}, blocks={"count": 3, "overlap": 0.1})
    family = family_of(config)
    pieces = family.cut(config)
    assert [piece.layers for piece in pieces] == [(0, 3), (3, 5), (5, 7)]
    assert [piece.noise for piece in pieces] == partition_levels(MaskSchedule("linear"), 3)
    assert [(piece.trained.low, piece.trained.high) for piece in pieces if piece.trained] == [
        pytest.approx((0.6333333, 1.0)),
        pytest.approx((0.3, 0.7)),
        pytest.approx((0.0, 0.3666667)),
    ]
    assert _config().blocks.overlap == 0.0  # the family's default
    whole = family.build_end_to_end(config)
    assert isinstance(whole, MaskedLM)
    assert (len(whole.layers), whole.trained) == (7, WHOLE)
    block = family.build_block(config, (0, 3), WHOLE, None)
    assert len(block.layers) == 3  # type: ignore[arg-type]
    plan = make_plan(config)
    assert plan.codebook_sha256 is None
    assert plan.layer_evaluations == make_plan(config, "end_to_end").layer_evaluations


def test_every_parameter_learns() -> None:
    module = family_of(_config()).build_end_to_end(_config())
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    source = torch.Generator().manual_seed(2)
    for _ in range(6):
        optimizer.zero_grad()
        tokens = torch.randint(VOCABULARY, (64, LENGTH), generator=source)
        module.training_loss({"tokens": tokens}, module.draw(64, source)).backward()
        optimizer.step()
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, start[name]), name


def test_recomputing_changes_no_gradient() -> None:
    module = _fixed(_config(model={"dropout": 0.2}), WHOLE).train()
    draw = module.draw(8, torch.Generator().manual_seed(1))
    grads: list[list[Tensor]] = []
    for recompute in (False, True):
        module.recompute = recompute
        module.zero_grad()
        torch.manual_seed(4)
        module.training_loss({"tokens": TOKENS.expand(8, -1)}, draw).backward()
        grads.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_bfloat16_loss_is_taken_in_float32() -> None:
    module = _fixed(_config(), WHOLE)
    draw = module.draw(8, torch.Generator().manual_seed(1))
    batch = {"tokens": TOKENS.expand(8, -1)}
    exact = module.training_loss(batch, draw)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_loss(batch, draw)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


def test_what_does_not_go_with_the_family() -> None:
    with pytest.raises(UserError, match="rotary positions need an even width a head, not 3"):
        _config(model={"width": 6})
    with pytest.raises(UserError, match="mask levels are cut at equal decrements of alpha"):
        _config(blocks={"partition": {"kind": "uniform"}})
    assert _config(chain={"steps": 1}).chain.steps == 1  # fewer steps than blocks will do


def test_example_batch_looks_like_a_real_one() -> None:
    example = family_of(_config()).example_batch(_config(), 16)
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {"tokens": ((16, LENGTH), torch.int64)}
