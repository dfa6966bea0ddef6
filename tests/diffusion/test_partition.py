from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbtrain.config import BlocksConfig, NoiseConfig, PartitionConfig
from dbtrain.diffusion.codebook import make_codebook
from dbtrain.diffusion.information import equal_information_edges
from dbtrain.diffusion.noise import NoiseDistribution
from dbtrain.diffusion.partition import owner, partition, widen
from dbtrain.diffusion.precondition import weights
from dbtrain.errors import UserError
from dbtrain.plan import NoiseRange
from dbtrain.randomness import generator

NOISE = NoiseConfig()


def cut(count: int, kind: str = "equal_probability", noise: NoiseConfig = NOISE) -> list[NoiseRange]:
    config = BlocksConfig.model_validate({"count": count, "partition": {"kind": kind}})
    return partition(noise, config)


def edges(ranges: list[NoiseRange]) -> list[float]:
    return [ranges[0].high, *(own.low for own in ranges)]


@pytest.mark.parametrize(
    ("count", "rising"),
    [
        (1, [0.002, 80]),
        (2, [0.002, 0.3012, 80]),
        (3, [0.002, 0.1796, 0.5050, 80]),
        (4, [0.002, 0.1341, 0.3012, 0.6767, 80]),
        (6, [0.002, 0.0943, 0.1796, 0.3012, 0.5050, 0.9617, 80]),
    ],
)
def test_equal_probability_gives_the_boundaries_of_the_paper(count: int, rising: list[float]) -> None:
    ranges = cut(count)
    assert len(ranges) == count
    assert edges(ranges) == pytest.approx(rising[::-1], abs=1e-4)
    assert (ranges[0].high, ranges[-1].low) == (80.0, 0.002)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    count=st.integers(1, 24),
    kind=st.sampled_from(["equal_probability", "uniform"]),
    p_mean=st.floats(-3.0, 3.0),
    p_std=st.floats(0.5, 3.0),
    overlap=st.floats(0.0, 1.0),
)
def test_any_partition_tiles_the_axis_and_widening_covers_it(
    count: int, kind: str, p_mean: float, p_std: float, overlap: float
) -> None:
    noise = NoiseConfig(p_mean=p_mean, p_std=p_std)
    ranges = cut(count, kind, noise)
    assert edges(ranges) == sorted(set(edges(ranges)), reverse=True)
    assert all(upper.low == lower.high for upper, lower in pairwise(ranges))
    assert (ranges[0].high, ranges[-1].low) == (noise.sigma_max, noise.sigma_min)
    distribution = NoiseDistribution.from_config(noise)
    for own, trained in zip(ranges, widen(ranges, overlap, noise), strict=True):
        assert noise.sigma_min <= trained.low <= own.low < own.high <= trained.high <= noise.sigma_max
        if kind == "equal_probability":
            mass = distribution.cdf(own.high) - distribution.cdf(own.low)
            assert mass == pytest.approx(1 / count, abs=1e-6)
        else:
            assert math.log(own.high / own.low) == pytest.approx(math.log(40_000) / count, rel=1e-6)


def test_explicit_boundaries_are_taken_as_they_are() -> None:
    bounds = (80.0, 0.718, 0.450, 0.191, 0.002)
    config = BlocksConfig(count=4, partition=PartitionConfig(kind="explicit", boundaries=bounds))
    assert edges(partition(NOISE, config)) == list(bounds)


def test_widening_adds_gamma_of_the_log_width_on_both_sides() -> None:
    middle = NoiseRange(low=0.2, high=0.8)
    (trained,) = widen([middle], 0.1, NOISE)
    assert math.log(trained.high / middle.high) == pytest.approx(0.1 * math.log(4), abs=1e-9)
    assert math.log(middle.low / trained.low) == pytest.approx(0.1 * math.log(4), abs=1e-9)


def test_no_overlap_leaves_the_ranges_alone() -> None:
    assert widen(cut(3), 0.0, NOISE) == cut(3)


def test_mean_edm_weight_of_each_block_matches_the_paper() -> None:
    """468 / 17.5 / 6.1 (lowest noise first) are means over the paper's ranges, overlap 0.05 included."""
    distribution = NoiseDistribution.from_config(NOISE)
    means = [
        float(weights("edm", distribution.sample(trained, 1_000_000, generator(0)).double(), 0.5).mean())
        for trained in widen(cut(3), 0.05, NOISE)
    ]
    assert means == pytest.approx([6.1, 17.5, 468.0], rel=0.01)


def test_equal_information_follows_from_the_codebook() -> None:
    blocks = BlocksConfig(count=3, partition=PartitionConfig(kind="equal_information"))
    found = edges(partition(NOISE, blocks, make_codebook(10, 16, 1.0, seed=0)))
    assert found == [80.0, *equal_information_edges(torch.eye(10), 3, 0.002, 80.0), 0.002]
    with pytest.raises(UserError, match=r"blocks\.partition\.kind = .*equal_information.*codes of labels.*equal_prob"):
        partition(NOISE, blocks)


def test_where_codes_tell_everything_there_is_nothing_to_cut() -> None:
    blocks = BlocksConfig(count=3, partition=PartitionConfig(kind="equal_information"))
    with pytest.raises(UserError, match=r"blocks\.partition\.kind = .*sigma 0\.002 to 0\.1.*widen noise\.sigma_min"):
        partition(NoiseConfig(sigma_max=0.1), blocks, make_codebook(10, 16, 1.0, seed=0))


def test_an_edge_belongs_to_the_block_below_it() -> None:
    ranges = cut(3)
    assert [owner(ranges, own.high) for own in ranges] == [0, 1, 2]
    assert owner(ranges, 0.002) == 2
    assert [owner(ranges, sigma) for sigma in (79.0, 0.506, 0.3, 0.18, 0.1)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("sigma", [80.1, 0.0019, math.nan])
def test_a_noise_level_outside_all_ranges_has_no_owner(sigma: float) -> None:
    with pytest.raises(ValueError, match="lies outside"):
        owner(cut(3), sigma)


@pytest.mark.parametrize(
    ("noise", "blocks"),
    [
        (NoiseConfig(p_mean=60.0), BlocksConfig(count=2)),
        (NoiseConfig(p_std=1e-14), BlocksConfig(count=4)),
        (NoiseConfig(p_std=0.05), BlocksConfig(count=3, partition=PartitionConfig(kind="uniform"))),
    ],
)
def test_a_distribution_that_never_visits_a_range_is_the_users_mistake(
    noise: NoiseConfig, blocks: BlocksConfig
) -> None:
    with pytest.raises(UserError, match=r"noise\.p_std = .*no probability.*\(widen it"):
        partition(noise, blocks)


def test_every_range_of_a_lopsided_distribution_can_be_sampled() -> None:
    noise = NoiseConfig(p_mean=-5.0, p_std=0.6)
    distribution = NoiseDistribution.from_config(noise)
    for own in cut(4, "uniform", noise):
        sigma = distribution.sample(own, 1000, generator(1))
        assert torch.isfinite(sigma).all()
        assert len(set(sigma.tolist())) > 900
