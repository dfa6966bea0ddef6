from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dbtrain.config import READOUTS, BlocksConfig, ChainConfig, NoiseConfig, PartitionConfig
from dbtrain.diffusion.chain import ChainTrace, Denoise, Fresh, read_out, run_chain, sigma_grid
from dbtrain.diffusion.codebook import make_codebook
from dbtrain.diffusion.noise import NoiseDistribution
from dbtrain.diffusion.partition import owner, partition
from dbtrain.errors import UserError
from dbtrain.plan import NoiseRange
from dbtrain.randomness import generator

NOISE = NoiseConfig()
RANGES = partition(NOISE, BlocksConfig(count=3))
CODEBOOK = make_codebook(5, 8, 1.0, seed=0).double()
P_OF_Y = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64)


def bayes(prior: Tensor, codebook: Tensor = CODEBOOK) -> Denoise:
    """The exact posterior of the label, log p(y|x) - |z - e_y|^2 / (2 sigma^2), given p(y|x) = `prior`."""

    def denoise(block: int, z: Tensor, sigma: float) -> Tensor:
        distance = torch.cdist(z, codebook.to(z)) ** 2
        return (prior.to(z).log() - distance / (2 * sigma**2)).log_softmax(dim=-1)

    return denoise


def start(n: int, seed: int = 0, width: int = 8) -> Tensor:
    return 80.0 * torch.randn(n, width, generator=generator(seed), dtype=torch.float64)


def test_one_step_a_block_acts_at_the_top_of_each_range() -> None:
    grid = sigma_grid(RANGES, 3, NOISE)
    assert grid == [own.high for own in RANGES]
    assert grid == pytest.approx([80.0, 0.5050, 0.1796], abs=1e-4)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    count=st.integers(1, 12),
    extra=st.integers(0, 60),
    kind=st.sampled_from(["equal_probability", "uniform"]),
    p_mean=st.floats(-3.0, 3.0),
    p_std=st.floats(0.5, 3.0),
)
def test_grid_falls_and_gives_every_block_its_share(
    count: int, extra: int, kind: str, p_mean: float, p_std: float
) -> None:
    noise = NoiseConfig(p_mean=p_mean, p_std=p_std)
    config = BlocksConfig.model_validate({"count": count, "partition": {"kind": kind}})
    ranges = partition(noise, config)
    steps = count + extra
    grid = sigma_grid(ranges, steps, noise)
    assert len(grid) == steps
    assert all(upper > lower for upper, lower in pairwise(grid))
    assert grid[0] == noise.sigma_max
    assert grid[-1] > noise.sigma_min
    owners = [owner(ranges, sigma) for sigma in grid]
    assert owners == sorted(owners)
    shares = [owners.count(index) for index in range(count)]
    assert shares == sorted(shares, reverse=True)
    assert max(shares) - min(shares) <= 1
    for index, own in enumerate(ranges):
        assert grid[owners.index(index)] == own.high


def test_further_steps_have_equal_probability_within_a_range() -> None:
    distribution = NoiseDistribution.from_config(NOISE)
    grid = sigma_grid(RANGES, 8, NOISE)
    assert [distribution.cdf(sigma) for sigma in grid] == pytest.approx(
        [1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 1 / 6], abs=1e-6
    )


def test_grid_falls_in_a_range_far_out_in_the_tail() -> None:
    noise = NoiseConfig(p_mean=0.0, p_std=0.25)
    config = BlocksConfig(count=2, partition=PartitionConfig(kind="explicit", boundaries=(80.0, 10.0, 0.002)))
    grid = sigma_grid(partition(noise, config), 10, noise)
    assert all(upper > lower for upper, lower in pairwise(grid))


def test_fewer_steps_than_blocks_are_refused() -> None:
    with pytest.raises(UserError, match=r"chain\.steps = 2: would skip some of the 3 blocks"):
        sigma_grid(RANGES, 2, NOISE)


@pytest.mark.parametrize("bridge", ["softmax", "argmax"])
@pytest.mark.parametrize("steps", [3, 7])
def test_each_step_is_an_euler_step_towards_the_estimate(bridge: Literal["softmax", "argmax"], steps: int) -> None:
    seen: list[tuple[int, Tensor, float]] = []
    answer = bayes(P_OF_Y)

    def denoise(block: int, z: Tensor, sigma: float) -> Tensor:
        seen.append((block, z, sigma))
        return answer(block, z, sigma)

    z0 = start(4)
    trace = run_chain(denoise, RANGES, CODEBOOK, NOISE, steps, bridge, z0)
    assert torch.equal(seen[0][1], z0)
    assert trace.sigmas == tuple(sigma_grid(RANGES, steps, NOISE)) == tuple(sigma for *_, sigma in seen)
    assert trace.blocks == tuple(block for block, *_ in seen)
    assert trace.blocks == tuple(owner(RANGES, sigma) for sigma in trace.sigmas)
    for (before, after), said in zip(pairwise(seen), trace.log_probs, strict=False):
        a = after[2] / before[2]
        target = said.exp() @ CODEBOOK if bridge == "softmax" else CODEBOOK[said.argmax(-1)]
        assert torch.allclose(after[1], a * before[1] + (1 - a) * target, atol=1e-12)


def test_a_perfect_denoiser_leaves_noise_of_just_the_next_level() -> None:
    """With D = y throughout, z at sigma stays y + sigma * eps: the step's sign and size are right."""
    labels = torch.tensor([0, 3, 1])
    z0 = start(3)
    levels = []

    def denoise(block: int, z: Tensor, sigma: float) -> Tensor:
        levels.append((z - CODEBOOK[labels]) / sigma)
        return torch.nn.functional.one_hot(labels, 5).double().clamp_min(1e-300).log()

    run_chain(denoise, RANGES, CODEBOOK, NOISE, 9, "softmax", z0)
    for level in levels:
        assert torch.allclose(level, levels[0], atol=1e-9)


def test_the_chain_of_exact_posteriors_samples_the_labels_distribution() -> None:
    """Many fine steps of the probability-flow ODE turn N starting noises into N samples of p(y|x)."""
    n = 4000
    trace = run_chain(bayes(P_OF_Y), RANGES, CODEBOOK, NOISE, 300, "softmax", start(n, seed=5))
    last = trace.log_probs[-1].exp()
    assert float((last.max(dim=-1).values > 0.99).double().mean()) > 0.99
    counts = last.argmax(dim=-1).bincount(minlength=5).double()
    chi_square = float(((counts - n * P_OF_Y) ** 2 / (n * P_OF_Y)).sum())
    assert chi_square < 18.5, counts / n  # 4 degrees of freedom, p = 0.001


def test_the_first_read_out_is_the_labels_distribution_itself() -> None:
    trace = run_chain(bayes(P_OF_Y), RANGES, CODEBOOK, NOISE, 3, "softmax", start(200, seed=1))
    # z / sigma_max^2 = eps / 80, which moves each log-probability by about 1/80.
    assert torch.allclose(read_out([trace], "first"), P_OF_Y.expand(200, 5), atol=0.03)
    assert torch.allclose(read_out([trace], "first").mean(0), P_OF_Y, atol=0.002)


def test_averaging_over_starting_noises_recovers_the_distribution_from_the_last_step() -> None:
    denoise = bayes(P_OF_Y)
    traces = [run_chain(denoise, RANGES, CODEBOOK, NOISE, 60, "softmax", start(20, seed=s)) for s in range(100)]
    mean = read_out(traces, "last_mean")
    assert mean.shape == (20, 5)
    assert torch.allclose(mean.mean(0), P_OF_Y, atol=0.04)


def trace_of(*probabilities: list[float]) -> ChainTrace:
    said = tuple(torch.tensor([row], dtype=torch.float64).log() for row in probabilities)
    return ChainTrace(said, tuple(range(len(said))), tuple(1.0 / (k + 1) for k in range(len(said))))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("first", [0.5, 0.5]),
        ("last", [0.8, 0.2]),
        ("product", [(0.5 * 0.6 * 0.8) ** (1 / 3), (0.5 * 0.4 * 0.2) ** (1 / 3)]),
        ("first_mean", [0.3, 0.7]),
        ("last_mean", [0.6, 0.4]),
    ],
)
def test_read_outs(name: str, expected: list[float]) -> None:
    traces = [trace_of([0.5, 0.5], [0.6, 0.4], [0.8, 0.2]), trace_of([0.1, 0.9], [0.3, 0.7], [0.4, 0.6])]
    total = sum(expected)
    assert read_out(traces, name).tolist() == [pytest.approx([value / total for value in expected])]


def test_product_mean_is_the_mean_of_each_walks_product() -> None:
    traces = [trace_of([0.5, 0.5], [0.6, 0.4]), trace_of([0.1, 0.9], [0.3, 0.7])]
    each = [read_out([trace], "product") for trace in traces]
    assert torch.allclose(read_out(traces, "product_mean"), (each[0] + each[1]) / 2)


@pytest.mark.parametrize("name", READOUTS)
def test_every_read_out_gives_probabilities(name: str) -> None:
    traces = [
        run_chain(bayes(P_OF_Y), RANGES, CODEBOOK, NOISE, 5, "argmax", start(7, seed=s).float()) for s in range(3)
    ]
    probabilities = read_out(traces, name)
    assert (probabilities.shape, probabilities.dtype) == ((7, 5), torch.float32)
    assert torch.allclose(probabilities.sum(-1), torch.ones(7))
    assert float(probabilities.min()) >= 0.0


def test_the_configuration_knows_exactly_these_read_outs() -> None:
    for name in READOUTS:
        assert ChainConfig(readout=name).readout == name
    with pytest.raises(ValueError, match="readout 'middle' has to be one of first"):
        ChainConfig(readout="middle")


def test_unknown_read_outs_and_empty_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown read-out 'best'"):
        read_out([trace_of([1.0])], "best")
    with pytest.raises(ValueError, match="at least one trace"):
        read_out([], "first")


def test_half_precision_answers_are_widened() -> None:
    def denoise(block: int, z: Tensor, sigma: float) -> Tensor:
        return torch.zeros(len(z), 5, dtype=torch.bfloat16).log_softmax(-1)

    z0 = start(2).float()
    trace = run_chain(denoise, RANGES, CODEBOOK.float(), NOISE, 3, "softmax", z0)
    assert {said.dtype for said in trace.log_probs} == {torch.float32}


def test_a_single_block_owns_the_whole_walk() -> None:
    whole = [NoiseRange(low=0.002, high=80.0)]
    trace = run_chain(bayes(P_OF_Y), whole, CODEBOOK, NOISE, 4, "softmax", start(2))
    assert trace.blocks == (0, 0, 0, 0)


@pytest.mark.parametrize("stop_after", [1, 2, 5])
def test_stopping_early_gives_the_first_steps_of_the_same_walk(stop_after: int) -> None:
    whole = run_chain(bayes(P_OF_Y), RANGES, CODEBOOK, NOISE, 5, "softmax", start(3))
    early = run_chain(bayes(P_OF_Y), RANGES, CODEBOOK, NOISE, 5, "softmax", start(3), stop_after=stop_after)
    assert (early.sigmas, early.blocks) == (whole.sigmas[:stop_after], whole.blocks[:stop_after])
    for ours, theirs in zip(early.log_probs, whole.log_probs, strict=False):
        assert torch.equal(ours, theirs)


def test_a_walk_without_a_block_by_hand() -> None:
    """Two labels at +1 and -1; every block is sure of the first: D = 1, and z' = a z + (1 - a)."""
    ranges = [NoiseRange(low=8.0, high=16.0), NoiseRange(low=2.0, high=8.0), NoiseRange(low=1.0, high=2.0)]
    noise = NoiseConfig(sigma_min=1.0, sigma_max=16.0)
    codes = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    seen: list[tuple[int, float, float]] = []

    def denoise(block: int, z: Tensor, sigma: float) -> Tensor:
        seen.append((block, float(z), sigma))
        return torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)

    def walk(*skip: int) -> list[tuple[int, float, float]]:
        seen.clear()
        run_chain(denoise, ranges, codes, noise, 3, "softmax", torch.tensor([[32.0]]).double(), skip=skip)
        return list(seen)

    assert walk() == [(0, 32.0, 16.0), (1, 16.5, 8.0), (2, 0.25 * 16.5 + 0.75, 2.0)]
    assert walk(1) == [(0, 32.0, 16.0), (2, 32 / 8 + 7 / 8, 2.0)]
    assert walk(2) == [(0, 32.0, 16.0), (1, 16.5, 8.0)]
    assert walk(0) == [(1, 16.0, 8.0), (2, 0.25 * 16.0 + 0.75, 2.0)]  # twice its level, as at the start
    assert walk(0, 1) == [(2, 4.0, 2.0)]
    with pytest.raises(ValueError, match="at least one block"):
        walk(0, 1, 2)


def _fresh(n: int) -> Fresh:
    return lambda step: torch.rand(n, 9, generator=generator(step), dtype=torch.float64)


def test_the_sampling_bridge_draws_a_label_and_fresh_noise_at_every_step() -> None:
    seen: list[tuple[Tensor, float]] = []
    answer = bayes(P_OF_Y)

    def denoise(block: int, z: Tensor, sigma: float) -> Tensor:
        seen.append((z, sigma))
        return answer(block, z, sigma)

    trace = run_chain(denoise, RANGES, CODEBOOK, NOISE, 5, "sample", start(50), fresh=_fresh(50))
    for step, ((z, sigma), said) in enumerate(zip(seen[1:], trace.log_probs, strict=False), 1):
        uniform = _fresh(50)(step)
        labels = [
            next(label for label, top in enumerate(row.exp().cumsum(0)) if u < top)
            for row, u in zip(said, uniform[:, 0], strict=True)
        ]
        assert torch.allclose(z, CODEBOOK[labels] + sigma * torch.special.ndtri(uniform[:, 1:]), atol=1e-9)
    with pytest.raises(ValueError, match="fresh"):
        run_chain(answer, RANGES, CODEBOOK, NOISE, 5, "sample", start(50))


def test_with_exact_posteriors_the_sampling_bridge_samples_the_labels_prior_in_three_steps() -> None:
    """Each level is visited with its own distribution, so the answers average to p(y) however long the steps are."""
    n = 20_000
    trace = run_chain(bayes(P_OF_Y), RANGES, CODEBOOK, NOISE, 3, "sample", start(n), fresh=_fresh(n))
    for said in trace.log_probs:
        assert torch.allclose(said.exp().mean(0), P_OF_Y, atol=0.015)
    assert torch.bincount(trace.log_probs[-1].argmax(-1), minlength=5) / n == pytest.approx(P_OF_Y, abs=0.02)


def test_a_label_of_no_probability_is_never_drawn() -> None:
    said = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0], dtype=torch.float64).log()
    codes: list[Tensor] = []

    def denoise(block: int, z: Tensor, sigma: float) -> Tensor:
        codes.append(z)
        return said.expand(4, 5)

    ends = torch.full((4, 9), 0.5, dtype=torch.float64)
    ends[:, 0] = torch.tensor([0.0, 0.49, 0.51, 1 - 2.0**-53], dtype=torch.float64)
    run_chain(denoise, RANGES, CODEBOOK, NOISE, 3, "sample", start(4), fresh=lambda step: ends)
    assert torch.allclose(codes[1], CODEBOOK[[1, 1, 2, 2]])
