from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbtrain.config import NoiseConfig
from dbtrain.diffusion.noise import NoiseDistribution
from dbtrain.plan import NoiseRange
from dbtrain.randomness import generator

PAPER = NoiseDistribution.from_config(NoiseConfig())


def kolmogorov_smirnov(uniform: torch.Tensor) -> float:
    """sqrt(n) times the distance of a sample's CDF from the uniform; above 1.95 one time in a thousand."""
    ordered = uniform.double().sort().values
    n = len(ordered)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((ordered - steps[:-1]).abs().max(), (steps[1:] - ordered).abs().max())
    return float(distance * math.sqrt(n))


def test_cdf_and_quantile_reach_exactly_the_ends() -> None:
    assert (PAPER.cdf(0.002), PAPER.cdf(80.0)) == (0.0, 1.0)
    assert (PAPER.cdf(1e-9), PAPER.cdf(1e9)) == (0.0, 1.0)
    assert (PAPER.quantile(0.0), PAPER.quantile(1.0)) == (0.002, 80.0)


def test_median_is_that_of_the_log_normal() -> None:
    assert PAPER.quantile(0.5) == pytest.approx(math.exp(-1.2), rel=1e-4)
    assert PAPER.cdf(math.exp(-1.2 + 1.2)) == pytest.approx(0.841345, abs=2e-5)


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_quantile_refuses_what_is_no_probability(q: float) -> None:
    with pytest.raises(ValueError, match="not a probability"):
        PAPER.quantile(q)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    p_mean=st.floats(-6.0, 6.0),
    p_std=st.floats(0.3, 3.0),
    q=st.floats(0.001, 0.999),
    other=st.floats(0.001, 0.999),
)
def test_quantile_inverts_cdf_and_rises(p_mean: float, p_std: float, q: float, other: float) -> None:
    noise = NoiseDistribution(p_mean, p_std, 0.002, 80.0)
    assert noise.cdf(noise.quantile(q)) == pytest.approx(q, abs=1e-6)
    assert (noise.quantile(q) <= noise.quantile(other)) == (q <= other)


@pytest.mark.parametrize(
    "within",
    [
        NoiseRange(low=0.002, high=80.0),
        NoiseRange(low=0.5050414640313312, high=80.0),
        NoiseRange(low=0.17963247211160274, high=0.5050414640313312),
        NoiseRange(low=0.002, high=0.17963247211160274),
        NoiseRange(low=30.0, high=80.0),
    ],
)
def test_samples_follow_the_truncated_distribution(within: NoiseRange) -> None:
    sigma = PAPER.sample(within, 20_000, generator(1))
    low, high = PAPER.cdf(within.low), PAPER.cdf(within.high)
    uniform = torch.tensor([(PAPER.cdf(float(s)) - low) / (high - low) for s in sigma])
    assert kolmogorov_smirnov(uniform) < 1.95


def test_samples_deep_in_either_tail_still_spread_over_the_range() -> None:
    """Nine standard deviations out, a CDF near 1 has no digits left; the mirrored tail has."""
    narrow = NoiseDistribution(p_mean=0.0, p_std=0.25, sigma_min=0.002, sigma_max=80.0)
    above = narrow.sample(NoiseRange(low=10.0, high=80.0), 4000, generator(2)).double()
    below = narrow.sample(NoiseRange(low=0.0125, high=0.1), 4000, generator(2)).double()
    # In the tail the excess of log sigma over the near end is exponential with mean p_std^2 / distance.
    for excess in (above.log() - math.log(10.0), math.log(0.1) - below.log()):
        assert float(excess.mean()) == pytest.approx(0.25**2 / math.log(10.0), rel=0.1)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(low=st.floats(0.002, 79.0), factor=st.floats(1.001, 1000.0), seed=st.integers(0, 2**40))
def test_no_sample_leaves_its_range(low: float, factor: float, seed: int) -> None:
    within = NoiseRange(low=low, high=low * factor)
    sigma = PAPER.sample(within, 500, generator(seed))
    assert sigma.dtype == torch.float32
    assert sigma.shape == (500,)
    assert all(within.low <= float(s) <= within.high for s in sigma)


def test_sampling_is_a_function_of_the_key() -> None:
    within = NoiseRange(low=0.5, high=80.0)
    assert torch.equal(PAPER.sample(within, 9, generator(3)), PAPER.sample(within, 9, generator(3)))
    assert not torch.equal(PAPER.sample(within, 9, generator(3)), PAPER.sample(within, 9, generator(4)))


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="not a range"):
        PAPER.sample(NoiseRange(low=1.0, high=1.0), 1, generator(0))
