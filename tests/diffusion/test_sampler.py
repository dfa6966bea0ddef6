"""The sampler against targets whose denoiser, and whose flow, are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dbtrain.config import NoiseConfig
from dbtrain.diffusion.sampler import Solver, network_calls, rho_grid, sample

NOISE = NoiseConfig()
MEAN, STD = 0.3, 0.4


def _gaussian(z: Tensor, sigma: float) -> Tensor:
    """The estimate for data from N(MEAN, STD^2): the posterior mean."""
    return (STD**2 * z + sigma**2 * MEAN) / (STD**2 + sigma**2)


def _flow(z: Tensor, sigma: float, lower: float) -> Tensor:
    """Where the probability-flow ODE of that Gaussian takes z: its standard score does not change."""
    return MEAN + (z - MEAN) * math.sqrt((STD**2 + lower**2) / (STD**2 + sigma**2))


def _start(n: int = 64) -> Tensor:
    return NOISE.sigma_max * torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_grid_is_that_of_the_paper() -> None:
    """Karras et al. 2022, equation 5."""
    grid = rho_grid(NOISE, 18)
    assert len(grid) == 19
    assert grid[0] == NOISE.sigma_max
    assert grid[-2:] == [NOISE.sigma_min, 0.0]
    for index in range(18):
        root = 80 ** (1 / 7) + index / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))
        assert grid[index] == pytest.approx(root**7, rel=1e-12)
    assert grid == sorted(grid, reverse=True)


def test_short_grids() -> None:
    assert rho_grid(NOISE, 1) == [NOISE.sigma_max, 0.0]
    assert rho_grid(NOISE, 2) == [NOISE.sigma_max, NOISE.sigma_min, 0.0]
    with pytest.raises(ValueError, match="0 steps"):
        rho_grid(NOISE, 0)


@pytest.mark.parametrize("high", [80.0, 79.99999999, 3.3333333333])
@pytest.mark.parametrize("steps", [2, 3, 7, 50])
def test_no_level_leaves_the_range(high: float, steps: int) -> None:
    noise = NoiseConfig(sigma_max=high, sigma_min=high * (1 - 1e-15) if steps == 50 else 0.002)
    assert all(noise.sigma_min <= sigma <= noise.sigma_max for sigma in rho_grid(noise, steps)[:-1])


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_converges_with_its_order(solver: Solver, order: int) -> None:
    start, lowest = _start(), 0.05
    exact = _flow(start, NOISE.sigma_max, lowest)
    noise = NoiseConfig(sigma_min=lowest)
    errors = []
    for steps in (64, 128, 256):
        walked = sample(_gaussian, start, rho_grid(noise, steps)[:-1], solver)
        errors.append(float((walked - exact).abs().max()))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)
    assert errors[-1] < 0.05


def test_last_step_goes_to_the_estimate() -> None:
    start = _start()
    for solver in ("euler", "heun"):
        assert torch.allclose(sample(_gaussian, start, [NOISE.sigma_max, 0.0], solver), _gaussian(start, 80.0))


def test_samples_of_a_mixture_have_its_shares() -> None:
    """Two far modes, a quarter and three quarters: the walk keeps their weights, which no shrinking sampler does."""
    places, shares = torch.tensor([-1.0, 1.0], dtype=torch.float64), torch.tensor([0.25, 0.75])

    def denoise(z: Tensor, sigma: float) -> Tensor:
        logits = shares.log() - (z[..., None] - places).square() / (2 * sigma**2)
        return logits.softmax(dim=-1) @ places

    noise = torch.randn(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = sample(denoise, NOISE.sigma_max * noise, rho_grid(NOISE, 18), "heun")
    assert (drawn.abs() - 1).abs().mean() < 0.02
    assert (drawn > 0).double().mean() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_counts_network_calls_and_steps(solver: Solver, steps: int) -> None:
    asked: list[float] = []
    told: list[int] = []

    def denoise(z: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return z * 0

    sample(denoise, _start(), rho_grid(NOISE, steps), solver, told.append)
    assert len(asked) == network_calls(solver, steps)
    assert told == list(range(1, steps + 1))
    assert min(asked) >= NOISE.sigma_min


def test_state_is_double_whatever_the_network_says() -> None:
    seen: set[torch.dtype] = set()

    def half(denoise: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float], Tensor]:
        def asked(z: Tensor, sigma: float) -> Tensor:
            seen.add(z.dtype)
            return denoise(z, sigma).bfloat16()

        return asked

    start = _start().float()
    before = start.clone()
    assert sample(half(_gaussian), start, rho_grid(NOISE, 4), "heun").dtype == torch.float64
    assert seen == {torch.float64}
    assert torch.equal(start, before)
