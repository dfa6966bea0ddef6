"""Losses over large vocabularies: the same, with a part of the logits in memory at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dbtrain.config import RunConfig
from dbtrain.models import TrainableModule, family_of, token_loss
from dbtrain.plan import Kind
from dbtrain.training.live_bytes import LiveBytes
from dbtrain.training.planner import build_module, make_plan

FamilyConfig = Callable[..., RunConfig]
KINDS: tuple[Kind, ...] = ("blocks", "end_to_end")
TEXT_FAMILIES = ("causal_lm", "masked_lm", "recurrent_lm")


def _module(config: RunConfig, kind: Kind) -> TrainableModule:
    family, block = family_of(config), make_plan(config, kind).blocks[0]
    torch.manual_seed(0)
    module = build_module(family, config, block.layers, block.trained, family.codebook(config))
    with torch.no_grad():
        for parameter in module.parameters():  # so that no gradient is zero because a projection still is
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module


def _step(module: TrainableModule, config: RunConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and the most bytes alive in forward and backward."""
    torch.manual_seed(1)
    batch = {"tokens": torch.randint(257, (config.training.batch_size, 32))}
    draw = module.draw(config.training.batch_size, torch.Generator().manual_seed(2))
    module.zero_grad()
    with LiveBytes() as live:
        loss = module.training_loss(batch, draw)
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}, live.peak


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "model"), [*((family, {}) for family in TEXT_FAMILIES), ("causal_lm", {"clean_loss": 0.5})]
)
def test_chunks_change_memory_and_nothing_else(
    family_config: FamilyConfig, monkeypatch: pytest.MonkeyPatch, family: str, kind: Kind, model: dict[str, float]
) -> None:
    config = family_config(family, model=model)
    module = _module(config, kind)
    loss, grads, peak = _step(module, config)
    monkeypatch.setattr(token_loss, "WHOLE", 0)
    monkeypatch.setattr(token_loss, "CHUNK", 257 * 50)  # 512 or 1,024 tokens do not fall into whole chunks
    chunked_loss, chunked_grads, chunked_peak = _step(module, config)
    torch.testing.assert_close(chunked_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(chunked_grads, grads, rtol=1e-4, atol=1e-7)
    assert chunked_peak < peak - 512 * 257 * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "training"), [*((family, {}) for family in TEXT_FAMILIES), ("causal_lm", {"precision": "bfloat16"})]
)
def test_the_logits_of_a_large_vocabulary_are_never_whole(
    family_config: FamilyConfig, family: str, kind: Kind, training: dict[str, str]
) -> None:
    vocab_size, tokens = 50_000, 64 * 32
    config = family_config(
        family, model={"vocab_size": vocab_size, "depth": 3}, training={"batch_size": 64, **training}
    )
    (block, *_) = make_plan(config, kind).blocks
    logits = 4 * tokens * vocab_size
    assert tokens * vocab_size > token_loss.WHOLE
    assert block.bytes.activations < logits / 10
    assert block.bytes.activations + block.bytes.temporary < 0.75 * logits


def test_recipes_with_bytes_as_tokens_are_not_cut_up() -> None:
    assert not token_loss.needs_chunks(torch.empty(512, 256, device="meta"), 257)
