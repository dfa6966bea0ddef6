from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dbtrain.inference.decoding import choose

PROBS = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2])
EVEN = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
TOP = 1 - 2.0**-53


def _shares(log_probs: Tensor, **options: float) -> list[float]:
    """How often each token is chosen over evenly spread random numbers."""
    chosen = choose(log_probs.expand(len(EVEN), -1), EVEN, **{"temperature": 1.0, "top_p": 1.0, **options})
    assert chosen.dtype == torch.int64
    return (torch.bincount(chosen, minlength=len(log_probs)) / len(EVEN)).tolist()


def test_tokens_come_as_often_as_they_should() -> None:
    assert _shares(PROBS.log()) == pytest.approx(PROBS.tolist(), abs=1e-4)
    assert _shares(PROBS.log() + 5.0) == pytest.approx(PROBS.tolist(), abs=1e-4)  # need not be normalised


def test_temperature() -> None:
    for temperature in (0.5, 2.0):
        expected = PROBS ** (1 / temperature)
        found = _shares(PROBS.log(), temperature=temperature)
        assert found == pytest.approx((expected / expected.sum()).tolist(), abs=1e-4)
    for cold in (1e-4, 1e-300):
        assert _shares(PROBS.log(), temperature=cold) == [0, 1, 0, 0, 0]


def test_nucleus() -> None:
    """The smallest set of at least this probability, renormalised."""
    for top_p, kept in ((0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.75, [1, 3, 4]), (1.0, [0, 1, 3, 4])):
        expected = torch.zeros(5)
        expected[kept] = PROBS[kept] / PROBS[kept].sum()
        assert _shares(PROBS.log(), top_p=top_p) == pytest.approx(expected.tolist(), abs=1e-4)
    assert _shares(torch.zeros(4), top_p=0.5) == pytest.approx([0.5, 0.5, 0, 0], abs=1e-4)  # ties by token id


def test_ends_of_the_random_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4000, generator=generator)
    logits[:, 1::2] = -torch.inf
    for uniform in (0.0, TOP):
        chosen = choose(logits, torch.full((50,), uniform, dtype=torch.float64), temperature=1.0, top_p=1.0)
        assert (chosen % 2 == 0).all()
        limit = logits.argmax(dim=1) if uniform == 0.0 else logits.masked_fill(logits.isinf(), 99.0).argmin(dim=1)
        assert torch.equal(chosen, limit)


def test_rows_are_apart() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, uniform = torch.randn(30, 7, generator=generator), torch.rand(30, generator=generator, dtype=torch.float64)
    together = choose(logits, uniform, temperature=0.8, top_p=0.9)
    alone = [choose(logits[i : i + 1], uniform[i : i + 1], temperature=0.8, top_p=0.9) for i in range(30)]
    assert torch.equal(together, torch.cat(alone))
