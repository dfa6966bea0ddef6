"""Bits of a model that is sure of itself, and wrong: what float32 probabilities cannot hold is paid for in full."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from text_models import small_language_model
from torch import Tensor

from dbtrain.config import READOUTS
from dbtrain.data.shards import ShardSet
from dbtrain.diffusion.chain import ChainTrace
from dbtrain.inference import bits
from dbtrain.inference.bits import evaluate_text
from dbtrain.inference.generate import TextGenerator
from dbtrain.plan import Kind

LENGTH, ROWS, SURE = 32, 6, 300.0


@pytest.fixture
def held_out(topics: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ShardSet, Tensor]:
    monkeypatch.setattr(bits, "EVALUATED_TOKENS", ROWS * LENGTH)
    monkeypatch.setattr(bits, "JUDGED_TEXTS", 2)
    shards = ShardSet.open(topics, "test")
    return shards, torch.from_numpy(shards.gather("tokens", np.arange(ROWS) * shards.rows // ROWS).astype(np.int64))


def _sure(topics: Path, where: Path, kind: Kind) -> TextGenerator:
    model = small_language_model(topics, where, kind)
    for module in model.modules:
        module.lm_head.weight.data.mul_(SURE)  # type: ignore[union-attr,operator]
    return TextGenerator(model)


def _bits(log_probs_tv: Tensor, tokens: Tensor) -> float:
    nats = -float(log_probs_tv.double().reshape(-1, 257).gather(1, tokens.reshape(-1, 1)).sum())
    return nats / math.log(2) / int((tokens != 256).sum())


def _by_hand(traces: list[ChainTrace], name: str) -> Tensor:
    base = name.removesuffix("_mean")
    walks = [torch.stack(trace.log_probs).double() for trace in (traces if name != base else traces[:1])]
    each = {"first": lambda w: w[0], "last": lambda w: w[-1], "product": lambda w: w.mean(dim=0).log_softmax(dim=-1)}
    return torch.stack([each[base](walk) for walk in walks]).logsumexp(dim=0) - math.log(len(walks))


def test_blocks(topics: Path, tmp_path: Path, held_out: tuple[ShardSet, Tensor]) -> None:
    shards, tokens = held_out
    generator = _sure(topics, tmp_path / "run", "blocks")
    rows = np.arange(ROWS) * shards.rows // ROWS
    traces = [generator.trace(generator.contexts(tokens), rows, noise) for noise in range(3)]
    result = evaluate_text(generator, shards)
    assert result.readouts["first"] > 69 / math.log(2)  # less than 1e-30 a token
    for name in READOUTS:
        assert result.readouts[name] == pytest.approx(_bits(_by_hand(traces, name), tokens), rel=1e-4), name
    assert result.chain[-1]["so_far"] == pytest.approx(result.readouts["product"], rel=1e-6)
    for index, point in enumerate(result.chain):
        expected = sum(_bits(trace.log_probs[index], tokens) for trace in traces) / 3
        assert point["bits_per_byte"] == pytest.approx(expected, rel=1e-4)
    assert result.alone[0]["bits_per_byte"] == pytest.approx(result.readouts["first"], rel=1e-4)


def test_a_baseline(topics: Path, tmp_path: Path, held_out: tuple[ShardSet, Tensor]) -> None:
    shards, tokens = held_out
    generator = _sure(topics, tmp_path / "run", "end_to_end")
    expected = _bits(generator.logits(tokens).log_softmax(dim=-1), tokens)
    assert evaluate_text(generator, shards).value == pytest.approx(expected, rel=1e-5)
    rows = torch.from_numpy(shards.gather("tokens", np.arange(2) * shards.rows // 2).astype(np.int64))
    said = generator.logits(rows).log_softmax(dim=-1)[:, LENGTH // 4 :]
    judged = bits.judged(generator, generator, shards)
    assert (rows[:, LENGTH // 4 :] != 256).all()
    assert judged["real_bits_per_byte"] == pytest.approx(_bits(said, rows[:, LENGTH // 4 :]), rel=1e-5)
