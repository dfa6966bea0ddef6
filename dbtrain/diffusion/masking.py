"""Mask levels: the schedule, its partition into one range a block, and random masks of a row.

At level t in [0, 1] every token is masked independently with probability 1 - alpha(t): nothing at t = 0, everything
at t = 1. With x_t such a masked row and CE_i the cross-entropy of its i-th token, the evidence bound of a row is

    -log p(x) <= integral over t from 0 to 1 of rate(t) E[sum over masked i of CE_i(x_t, t)],
    rate(t) = -alpha'(t) / (1 - alpha(t))

(Shi et al. 2024, equation 5; Sahoo et al. 2024, equation 11). Cutting [0, 1] into ranges cuts the bound into one term a
block, and the terms add up to it.

The rate grows without limit towards t = 0, where nearly every row is left without a mask and says nothing. Masks are
drawn given that there is at least one, and the weight `rate(t) * P(at least one)` stands for the rate: the same
integral, and a weight that stays below length * -alpha'(0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from dbtrain.plan import NoiseRange


@dataclass(frozen=True)
class MaskSchedule:
    """alpha(t), the part of the tokens that is left at level t.

    `linear`: 1 - t. `cosine`: 1 - sin(pi t / 2), which is 1 - cos(pi (1 - t) / 2) (Shi et al. 2024, table 1); more of
    the levels are near t = 1. Functions of tensors are elementwise and keep shape, type and device.
    """

    kind: Literal["linear", "cosine"]

    def masked(self, level: Tensor) -> Tensor:
        """1 - alpha: the probability that a token is masked."""
        return level if self.kind == "linear" else torch.sin(0.5 * math.pi * level)

    def slope(self, level: Tensor) -> Tensor:
        """-alpha'."""
        if self.kind == "linear":
            return torch.ones_like(level)
        return 0.5 * math.pi * torch.cos(0.5 * math.pi * level)

    def weight(self, level: Tensor, length: int) -> Tensor:
        """-alpha' / (1 - alpha) times the probability that a row of `length` tokens has a mask; finite at level 0."""
        masked = _above_zero(self.masked(level))
        some = -torch.expm1(length * torch.log1p(-masked))
        return self.slope(level) * some / masked

    def level(self, alpha: float) -> float:
        """The inverse of alpha(t), rounded to 12 significant digits: equal shares give equal levels everywhere.

        Raises:
            ValueError: alpha is no probability.
        """
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"{alpha} is not a probability")
        exact = 1.0 - alpha if self.kind == "linear" else 2.0 / math.pi * math.asin(1.0 - alpha)
        return float(f"{exact:.12g}")

    def alpha(self, level: float) -> float:
        """alpha(t) of one level."""
        return 1.0 - (level if self.kind == "linear" else math.sin(0.5 * math.pi * level))


def partition_levels(schedule: MaskSchedule, count: int) -> list[NoiseRange]:
    """Ranges of equal decrements of alpha, the most masked first; neighbours share an edge, the ends are 1 and 0."""
    edges = [schedule.level(index / count) for index in range(count + 1)]
    return [NoiseRange(low=low, high=high) for high, low in pairwise(edges)]


def widen_levels(schedule: MaskSchedule, ranges: Sequence[NoiseRange], overlap: float) -> list[NoiseRange]:
    """The ranges blocks train on: wider by `overlap` times their width in alpha at both ends, within [0, 1]."""
    if overlap == 0.0:
        return list(ranges)
    widened = []
    for own in ranges:
        fewest, most = schedule.alpha(own.high), schedule.alpha(own.low)
        margin = overlap * (most - fewest)
        low, high = schedule.level(min(most + margin, 1.0)), schedule.level(max(fewest - margin, 0.0))
        # Rounding must not make a range narrower than the one the block answers for.
        widened.append(NoiseRange(low=min(low, own.low), high=max(high, own.high)))
    return widened


def level_grid(schedule: MaskSchedule, steps: int, masked: float = 1.0) -> list[float]:
    """The levels at which `steps` steps act, at equal decrements of alpha from where the part `masked` is masked.

    The first step acts at that level; none acts at level 0, where nothing is left to do.
    """
    return [schedule.level(1.0 - masked * ((steps - step) / steps)) for step in range(steps)]


def stratified_levels(within: NoiseRange, n: int, generator: torch.Generator) -> Tensor:
    """`n` levels, uniform in `within`: one in each of n equal parts of it, lowest first.

    Returns:
        (n,) float32 on the generator's device.
    """
    jitter = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
    parts = (torch.arange(n, device=generator.device) + jitter) / n
    return (within.low + (within.high - within.low) * parts).float()


def random_mask(masked_n: Tensor, first_n: Tensor, uniform_nl: Tensor) -> Tensor:
    """Which tokens to mask: each with its row's probability, independently, given that at least one is.

    Args:
        masked_n: probability of a mask in each row, (N,).
        first_n: uniform numbers in [0, 1), float64 (N,); they decide where a row's first mask is.
        uniform_nl: uniform numbers in [0, 1), (N, L); they decide about the tokens after it.

    Returns:
        (N, L) boolean, at least one true in each row.
    """
    length = uniform_nl.shape[1]
    log_left_n = torch.log1p(-_above_zero(masked_n.double()))
    some_n = -torch.expm1(length * log_left_n)
    # P(first mask <= i) = (1 - left^(i + 1)) / (1 - left^length), inverted; left = 0 has its first mask at once.
    first_n = torch.log1p(-first_n * some_n) / log_left_n
    first_n = first_n.floor().clamp(0, length - 1)
    position_l = torch.arange(length, device=uniform_nl.device)
    after_nl = position_l > first_n[:, None]
    return (position_l == first_n[:, None]) | (after_nl & (uniform_nl < masked_n[:, None]))


def _above_zero(masked: Tensor) -> Tensor:
    """Keeps 0/0 out; at 1e-12 the limit is reached to all digits of float32."""
    return masked.clamp_min(1e-12)
