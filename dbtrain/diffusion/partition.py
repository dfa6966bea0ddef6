"""Cutting the noise axis into one range a block, block 0 the highest (Shing, Koyama, Akiba 2026, section 3).

Edges are rounded, to 12 significant digits if nothing else is said: a plan reads the same whichever libm computed it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from dbtrain.config import BlocksConfig, NoiseConfig
from dbtrain.diffusion.information import equal_information_edges
from dbtrain.diffusion.noise import NoiseDistribution
from dbtrain.errors import UserError
from dbtrain.plan import NoiseRange


def partition(noise: NoiseConfig, blocks: BlocksConfig, codebook: Tensor | None = None) -> list[NoiseRange]:
    """The ranges the blocks answer for, highest first; neighbours share an edge.

    The ends are exactly sigma_max and sigma_min. `equal_probability` gives each range the same mass of the
    training distribution, `uniform` the same log-width, `equal_information` the same share of what z tells of its
    label, `explicit` takes the given boundaries.

    Args:
        codebook: the targets of the labels, (C, d), which `equal_information` asks for.

    Raises:
        UserError: the distribution is so narrow that a range would be empty or would never be drawn from, or there is
            no codebook where it is needed.
    """
    distribution = NoiseDistribution.from_config(noise)
    if distribution.mass(noise.sigma_min, noise.sigma_max) <= 0.0:
        raise _too_narrow(noise)
    edges = _edges(distribution, blocks, codebook)
    for high, low in pairwise(edges):
        if low >= high and blocks.partition.kind == "equal_information":
            raise UserError(
                f"codes tell as much of labels from sigma {noise.sigma_min:g} to {noise.sigma_max:g}: nothing to cut",
                field="blocks.partition.kind",
                value="equal_information",
                mend="widen noise.sigma_min and noise.sigma_max around codebook.scale, or use equal_probability",
            )
        if low >= high or distribution.mass(low, high) <= 0.0:
            raise _too_narrow(noise)
    return [NoiseRange(low=low, high=high) for high, low in pairwise(edges)]


def widen(ranges: Sequence[NoiseRange], overlap: float, noise: NoiseConfig) -> list[NoiseRange]:
    """The ranges blocks train on: wider by `overlap` times the log-width at both ends, clamped globally."""
    widened = []
    for own in ranges:
        factor = (own.high / own.low) ** overlap
        low = max(_round(own.low / factor), noise.sigma_min)
        high = min(_round(own.high * factor), noise.sigma_max)
        # Rounding must not make a range narrower than the one the block answers for.
        widened.append(NoiseRange(low=min(low, own.low), high=max(high, own.high)))
    return widened


def owner(ranges: Sequence[NoiseRange], sigma: float) -> int:
    """Index of the block that answers for `sigma`; a shared edge belongs to the block below it, at its top.

    Raises:
        ValueError: sigma lies in no range.
    """
    if not ranges[-1].low <= sigma <= ranges[0].high:
        raise ValueError(f"sigma {sigma} lies outside [{ranges[-1].low}, {ranges[0].high}]")
    return sum(sigma <= own.high for own in ranges) - 1


def _edges(distribution: NoiseDistribution, blocks: BlocksConfig, codebook: Tensor | None) -> list[float]:
    """The count + 1 boundaries, falling."""
    if blocks.partition.boundaries is not None:
        return list(blocks.partition.boundaries)
    count, low, high = blocks.count, distribution.sigma_min, distribution.sigma_max
    if blocks.partition.kind == "uniform":
        width = math.log(high / low) / count
        inner = [high * math.exp(-width * index) for index in range(1, count)]
    elif blocks.partition.kind == "equal_information":
        if codebook is None:
            raise UserError(
                "is for targets that are codes of labels or tokens, and this family has none",
                field="blocks.partition.kind",
                value="equal_information",
                mend="use equal_probability, uniform or explicit",
            )
        inner = equal_information_edges(codebook, count, low, high)
    else:
        inner = [distribution.quantile(1.0 - index / count) for index in range(1, count)]
    return [high, *(_round(edge) for edge in inner), low]


def _round(value: float) -> float:
    return float(f"{value:.12g}")


def _too_narrow(noise: NoiseConfig) -> UserError:
    return UserError(
        f"a block's range would have no probability under log sigma ~ N({noise.p_mean}, {noise.p_std}^2)",
        field="noise.p_std",
        value=noise.p_std,
        mend="widen it, move noise.p_mean into the range of sigma, or use fewer blocks",
    )
