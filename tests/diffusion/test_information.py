from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dbtrain.diffusion.codebook import make_codebook
from dbtrain.diffusion.information import MAX_ROWS, LabelInformation, equal_information_edges
from dbtrain.randomness import generator

LOW, HIGH = 0.002, 80.0


def measured(codebook: Tensor, sigma: float, draws: int = 30_000) -> float:
    """log C less the mean cross-entropy of the exact posterior, over noisy codes drawn anew, noises with both signs."""
    source, rows = generator(1), codebook.double()
    labels = torch.arange(draws) % len(rows)
    noise = sigma * torch.randn(draws, rows.shape[1], generator=source, dtype=torch.float64)
    nats = 0.0
    for z in (rows[labels] + noise, rows[labels] - noise):
        log_probs = (-torch.cdist(z, rows).square() / (2 * sigma**2)).log_softmax(dim=-1)
        nats -= float(log_probs.gather(1, labels[:, None]).mean()) / 2
    return math.log(len(rows)) - nats


def test_ten_orthonormal_codes_have_the_known_bounds() -> None:
    """Blocks with these bounds were measured before, with the information from another program."""
    edges = equal_information_edges(make_codebook(10, 16, 1.0, seed=0), 3, LOW, HIGH)
    assert edges == pytest.approx([0.718, 0.450], rel=0.003)
    assert LabelInformation(torch.eye(10)).at(0.191) == pytest.approx(math.log(10), rel=0.01)


def test_two_codes_against_the_integral() -> None:
    """I between +1 and -1 is 1 - E log2(1 + exp(-2 (1 + sigma eps) / sigma^2)), in bits."""
    grid = np.linspace(-9.0, 9.0, 20_001)
    density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
    information = LabelInformation(torch.tensor([[1.0], [-1.0]]))
    for sigma in (0.3, 0.7, 1.0, 2.0, 5.0):
        losses = np.logaddexp(0.0, -2.0 * (1.0 + sigma * grid) / sigma**2)
        assert information.at(sigma) == pytest.approx(math.log(2) - float((density * losses).sum()), abs=2e-3)


@pytest.mark.parametrize(("rows", "width", "scale"), [(10, 16, 1.0), (40, 64, 3.0), (60, 8, 1.0)])
def test_every_block_has_the_same_share(rows: int, width: int, scale: float) -> None:
    codebook = make_codebook(rows, width, scale, seed=3)
    told = [measured(codebook, edge) for edge in (HIGH, *equal_information_edges(codebook, 4, LOW, HIGH), LOW)]
    shares = [(lower - upper) / math.log(rows) for upper, lower in pairwise(told)]
    assert shares == pytest.approx([0.25] * 4, rel=0.02)


@settings(deadline=None, derandomize=True, max_examples=6)
@given(
    rows=st.integers(2, 40),
    width=st.sampled_from([1, 4, 64]),
    scale=st.sampled_from([0.1, 1.0, 7.0]),
    count=st.integers(1, 8),
)
def test_edges_fall_scale_with_the_codes_and_come_back_the_same(
    rows: int, width: int, scale: float, count: int
) -> None:
    state = torch.random.get_rng_state()
    codebook = make_codebook(rows, width, 1.0, seed=1)
    if width == 1:  # only two directions there
        codebook = codebook * torch.arange(1, rows + 1)[:, None]
    edges = equal_information_edges(codebook, count, LOW, HIGH)
    assert len(edges) == count - 1
    assert all(upper > lower for upper, lower in pairwise([HIGH, *edges, LOW]))
    assert equal_information_edges(codebook, count, LOW, HIGH) == edges
    scaled = equal_information_edges(codebook * scale, count, LOW * scale, HIGH * scale)
    assert scaled == pytest.approx([edge * scale for edge in edges], rel=1e-3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_orthogonal_codes_have_the_same_edges_for_every_seed() -> None:
    found = {tuple(equal_information_edges(make_codebook(20, 32, 1.0, seed), 5, LOW, HIGH)) for seed in range(3)}
    assert len(found) == 1


def test_of_a_large_codebook_some_rows_speak_for_all() -> None:
    codebook = make_codebook(3 * MAX_ROWS, 16, 1.0, seed=0)
    assert equal_information_edges(codebook, 2, LOW, HIGH) == equal_information_edges(codebook[::3], 2, LOW, HIGH)


def test_codes_that_are_the_same_are_never_told_apart() -> None:
    codebook = torch.eye(4)[[0, 1, 2, 3, 0, 1, 2, 3]]
    assert LabelInformation(codebook).at(0.1) == pytest.approx(math.log(4), abs=1e-6)
