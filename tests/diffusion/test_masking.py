from __future__ import annotations

import itertools
import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbtrain.diffusion.masking import (
    MaskSchedule,
    level_grid,
    partition_levels,
    random_mask,
    stratified_levels,
    widen_levels,
)
from dbtrain.diffusion.partition import owner
from dbtrain.plan import NoiseRange

Kind = Literal["linear", "cosine"]
KINDS: tuple[Kind, ...] = ("linear", "cosine")
LEVELS = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)


def _uniform(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_schedules_are_the_papers() -> None:
    """MD4, table 1: alpha(t) and alpha'(t) / (1 - alpha(t))."""
    torch.testing.assert_close(1 - MaskSchedule("linear").masked(LEVELS), 1 - LEVELS)
    cosine = MaskSchedule("cosine")
    torch.testing.assert_close(1 - cosine.masked(LEVELS), 1 - torch.cos(math.pi / 2 * (1 - LEVELS)))
    inner = LEVELS[1:]
    torch.testing.assert_close(
        cosine.slope(inner) / cosine.masked(inner), math.pi / 2 * torch.tan(math.pi / 2 * (1 - inner))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_slope_is_the_derivative(kind: Kind) -> None:
    schedule = MaskSchedule(kind)
    level = LEVELS.clone().requires_grad_()
    schedule.masked(level).sum().backward()
    torch.testing.assert_close(schedule.slope(LEVELS), level.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_level_inverts_alpha(kind: Kind) -> None:
    schedule = MaskSchedule(kind)
    assert (schedule.level(1.0), schedule.level(0.0)) == (0.0, 1.0)
    for alpha in (0.0, 0.01, 0.3, 0.5, 0.99, 1.0):
        assert schedule.alpha(schedule.level(alpha)) == pytest.approx(alpha, abs=1e-11)
    for alpha in (-0.01, 1.01, math.nan):
        with pytest.raises(ValueError, match="is not a probability"):
            schedule.level(alpha)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_by_hand_and_at_the_ends(kind: Kind, dtype: torch.dtype) -> None:
    schedule, length = MaskSchedule(kind), 128
    levels = torch.tensor([1e-3, 0.1, 0.5, 0.9], dtype=dtype)
    for level, found in zip(levels.tolist(), schedule.weight(levels, length).tolist(), strict=True):
        masked = level if kind == "linear" else math.sin(math.pi / 2 * level)
        slope = 1.0 if kind == "linear" else math.pi / 2 * math.cos(math.pi / 2 * level)
        assert found == pytest.approx(slope / masked * (1 - (1 - masked) ** length), rel=1e-4)
    low, high = schedule.weight(torch.tensor([0.0, 1.0], dtype=dtype), length).tolist()
    assert low == pytest.approx(length * (1.0 if kind == "linear" else math.pi / 2), rel=1e-6)
    assert high == pytest.approx(1.0 if kind == "linear" else 0.0, abs=1e-6)


def test_linear_edges() -> None:
    edges = [(own.low, own.high) for own in partition_levels(MaskSchedule("linear"), 4)]
    assert edges == [(0.75, 1.0), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
def test_ranges_are_equal_decrements_of_alpha(kind: Kind, count: int) -> None:
    schedule = MaskSchedule(kind)
    ranges = partition_levels(schedule, count)
    assert (ranges[0].high, ranges[-1].low, len(ranges)) == (1.0, 0.0, count)
    assert all(above.low == below.high for above, below in itertools.pairwise(ranges))
    for own in ranges:
        assert schedule.alpha(own.low) - schedule.alpha(own.high) == pytest.approx(1 / count, abs=1e-10)
    if count > 1 and kind == "cosine":  # alpha falls slowest near t = 1
        widths = [own.high - own.low for own in ranges]
        assert widths == sorted(widths, reverse=True)
        assert widths[0] > 1.5 * widths[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_overlap_is_a_part_of_the_width_in_alpha(kind: Kind) -> None:
    schedule = MaskSchedule(kind)
    ranges = partition_levels(schedule, 4)
    assert widen_levels(schedule, ranges, 0.0) == ranges
    first, second, third, last = widen_levels(schedule, ranges, 0.2)
    assert (first.high, last.low) == (1.0, 0.0)
    assert [schedule.alpha(level) for level in (second.high, second.low)] == pytest.approx([0.2, 0.55], abs=1e-10)
    assert schedule.alpha(first.low) == pytest.approx(0.3, abs=1e-10)
    assert schedule.alpha(third.high) == pytest.approx(0.45, abs=1e-10)
    assert all(
        wide.low <= own.low < own.high <= wide.high for wide, own in zip((first, last), ranges[::3], strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@given(count=st.integers(1, 12), each=st.integers(1, 9))
def test_steps_are_shared_out_evenly_and_go_to_their_owners(kind: Kind, count: int, each: int) -> None:
    schedule = MaskSchedule(kind)
    ranges = partition_levels(schedule, count)
    levels = level_grid(schedule, count * each)
    assert levels[0] == 1.0
    assert levels == sorted(set(levels), reverse=True)
    assert [owner(ranges, level) for level in levels] == [block for block in range(count) for _ in range(each)]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_may_start_below_the_top(kind: Kind) -> None:
    schedule = MaskSchedule(kind)
    assert level_grid(schedule, 4, masked=0.4) == [schedule.level(alpha) for alpha in (0.6, 0.7, 0.8, 0.9)]
    assert level_grid(schedule, 1) == [1.0]


@given(n=st.integers(1, 40), low=st.floats(0.0, 0.9), width=st.floats(0.05, 0.1), seed=st.integers(0, 99))
def test_levels_fill_the_range_evenly(n: int, low: float, width: float, seed: int) -> None:
    within = NoiseRange(low=low, high=low + width)
    levels = stratified_levels(within, n, torch.Generator().manual_seed(seed))
    assert (levels.shape, levels.dtype) == ((n,), torch.float32)
    parts = (levels.double() - low) / width * n
    assert torch.allclose(parts, torch.arange(n, dtype=torch.float64) + 0.5, atol=0.5001)
    assert torch.equal(levels, stratified_levels(within, n, torch.Generator().manual_seed(seed)))


def test_masks_follow_the_conditional_distribution() -> None:
    """All 7 patterns of 3 tokens, against independent masks with the empty pattern left out."""
    rows = 200_000
    for masked in (0.0, 0.05, 0.6, 1.0):
        p = torch.full((rows,), masked, dtype=torch.float64)
        masks = random_mask(p, _uniform((rows,), 1), _uniform((rows, 3), 2))
        assert masks.any(dim=1).all()
        for pattern in itertools.product((False, True), repeat=3):
            number = sum(pattern)
            if number == 0:
                continue
            if masked == 0.0:  # the limit: one mask, anywhere
                expected = 1 / 3 if number == 1 else 0.0
            else:
                expected = masked**number * (1 - masked) ** (3 - number) / (1 - (1 - masked) ** 3)
            found = (masks == torch.tensor(pattern)).all(dim=1).double().mean().item()
            assert found == pytest.approx(expected, abs=5 * math.sqrt(0.25 / rows))


def test_masks_at_the_ends_of_the_random_numbers() -> None:
    top = 1 - 2.0**-53
    for first, other in itertools.product((0.0, top), repeat=2):
        for masked in (0.0, 1e-9, 0.5, 1.0):
            p, numbers = torch.tensor([masked], dtype=torch.float64), torch.full((1, 5), other, dtype=torch.float64)
            mask = random_mask(p, torch.tensor([first], dtype=torch.float64), numbers)
            assert mask.any()
            assert masked < 1.0 or mask.all()


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_masks_integrate_to_the_bound(kind: Kind) -> None:
    """With f(mask) = number of masked tokens the bound's integral is the length, whatever the partition."""
    schedule, length, n = MaskSchedule(kind), 8, 60_000
    total = 0.0
    for index, own in enumerate(partition_levels(schedule, 3)):
        source = torch.Generator().manual_seed(index)
        levels = stratified_levels(own, n, source)
        masks = random_mask(schedule.masked(levels), _uniform((n,), index), _uniform((n, length), index + 9))
        term = (own.high - own.low) * (schedule.weight(levels, length) * masks.sum(dim=1)).double().mean().item()
        assert term == pytest.approx(length / 3, rel=0.01)
        total += term
    assert total == pytest.approx(length, rel=0.006)
