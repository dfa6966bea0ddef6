"""Inference: the walk from pure noise down through the blocks' ranges, and what can be read off it.

Source: Shing, Koyama, Akiba 2026, section 3, with the sign of equations 3 to 5 corrected: one Euler step of
the probability-flow ODE from sigma to sigma' is z' = a z + (1 - a) D with a = sigma' / sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dbtrain.config import READOUTS, Bridge, NoiseConfig
from dbtrain.diffusion.noise import NoiseDistribution
from dbtrain.diffusion.partition import owner
from dbtrain.errors import UserError
from dbtrain.plan import NoiseRange

Denoise = Callable[[int, Tensor, float], Tensor]
"""(index of the block that owns sigma, z (N, d), sigma) -> log-probabilities of the labels (N, classes)."""
Fresh = Callable[[int], Tensor]
"""(number of a step, from 1 on) -> uniform numbers in [0, 1), float64 (N, 1 + d), others for every step."""


@dataclass(frozen=True)
class ChainTrace:
    """What the blocks said along one walk, one entry a step, highest noise first."""

    log_probs: tuple[Tensor, ...]
    """Each step's log-probabilities of the labels, (N, classes), float32 or wider."""
    blocks: tuple[int, ...]
    """The block that acted at each step."""
    sigmas: tuple[float, ...]
    """The noise level at which it acted."""


def sigma_grid(ranges: Sequence[NoiseRange], steps: int, noise: NoiseConfig) -> list[float]:
    """The noise levels at which blocks act, falling; none at sigma_min, where a block could change nothing.

    Steps are shared out evenly, with the remainder to the first blocks. Each block acts at the top of its own
    range first; further steps are spaced at equal probability inside the range.

    Raises:
        UserError: fewer steps than blocks.
    """
    if steps < len(ranges):
        raise UserError(
            f"would skip some of the {len(ranges)} blocks",
            field="chain.steps",
            value=steps,
            mend=f"give at least {len(ranges)}",
        )
    distribution = NoiseDistribution.from_config(noise)
    grid = []
    for index, own in enumerate(ranges):
        count = steps // len(ranges) + (1 if index < steps % len(ranges) else 0)
        grid += [distribution.quantile(1.0 - step / count, own) for step in range(count)]
    return grid


def run_chain(
    denoise: Denoise,
    ranges: Sequence[NoiseRange],
    codebook: Tensor,
    noise: NoiseConfig,
    steps: int,
    bridge: Bridge,
    start: Tensor,
    stop_after: int | None = None,
    skip: Collection[int] = (),
    fresh: Fresh | None = None,
) -> ChainTrace:
    """Walk from `start` through all blocks, or through the first `stop_after` steps of that walk alone.

    Without the blocks in `skip` the other steps keep their noise levels, and the walk goes from one to the next of
    them; where the first of all steps is left out, `start` is scaled to the level of the first that is not.

    Args:
        denoise: asked once a step, with the block that owns the step's sigma.
        ranges: the blocks' own ranges (without overlap), highest first.
        codebook: clean targets of the labels, (classes, d).
        noise: spaces the steps where there are more of them than blocks.
        steps: number of steps, at least one a block.
        bridge: an Euler step goes towards the codebook's mean under the labels' probabilities ("softmax"), or towards
            its row of the likeliest label ("argmax"). With "sample" there is no such step: the row of a label drawn
            from the probabilities gets fresh noise of the next level.
        start: sigma_max times standard normal noise, (N, d); its type and device are those of the walk.
        fresh: what "sample" draws with.

    Raises:
        ValueError: every block is skipped, or "sample" has nothing to draw with.
    """
    grid = sigma_grid(ranges, steps, noise)
    sigmas = [sigma for sigma in grid if owner(ranges, sigma) not in skip][:stop_after]
    if not sigmas:
        raise ValueError("a walk needs at least one block")
    if bridge == "sample" and fresh is None:
        raise ValueError("bridge 'sample' draws random numbers: give `fresh`")
    blocks = [owner(ranges, sigma) for sigma in sigmas]
    codes = codebook.to(start)
    z = sigmas[0] / grid[0] * start
    said = [_as_float(denoise(blocks[0], z, sigmas[0]))]
    for step, (index, (sigma, lower)) in enumerate(zip(blocks[1:], pairwise(sigmas), strict=True), 1):
        if fresh is not None and bridge == "sample":
            z = _sample(said[-1], codes, lower, fresh(step))
        else:
            a = lower / sigma
            z = a * z + (1.0 - a) * _estimate(said[-1], codes, bridge)
        said.append(_as_float(denoise(index, z, lower)))
    return ChainTrace(tuple(said), tuple(blocks), tuple(sigmas))


def read_out(traces: Sequence[ChainTrace], name: str) -> Tensor:
    """Probabilities of the labels, (N, classes), by one of `READOUTS`.

    `first` and `last` are what the first and the last step said. `product` multiplies the steps' posteriors, each to
    the power 1 / steps, and normalises (the logarithmic opinion pool, Genest and Zidek 1986): steps see the same
    evidence, and the plain product would count it as often as there are steps. These take the first trace alone; with
    `_mean`, the mean of the probabilities over all traces (one a starting noise).

    Raises:
        ValueError: an unknown name, or no trace.
    """
    if name not in READOUTS:
        raise ValueError(f"unknown read-out {name!r}; known: {', '.join(READOUTS)}")
    if not traces:
        raise ValueError("a read-out needs at least one trace")
    base = name.removesuffix("_mean")
    used = traces if name != base else traces[:1]
    return torch.stack([log_read_out(trace, base).exp() for trace in used]).mean(dim=0)


def log_read_out(trace: ChainTrace, base: str) -> Tensor:
    """Log-probabilities of the labels, (N, classes), of one walk by `first`, `last` or `product`."""
    if base == "product":
        return pool(trace.log_probs)
    return trace.log_probs[0 if base == "first" else -1]


def pool(log_probs: Sequence[Tensor]) -> Tensor:
    """The normalised geometric mean of what steps said: log-probabilities of the labels, (N, classes)."""
    return torch.stack(list(log_probs)).mean(dim=0).log_softmax(dim=-1)


def pools_so_far(log_probs: Iterable[Tensor]) -> Iterator[Tensor]:
    """`pool` of the first step, of the first two, and so on."""
    total: Tensor | None = None
    for count, said in enumerate(log_probs, 1):
        total = said if total is None else total + said
        yield (total / count).log_softmax(dim=-1)


def _sample(log_probs: Tensor, codes: Tensor, sigma: float, uniform: Tensor) -> Tensor:
    """The code of a label drawn with the first uniform number of a row, under noise from the others."""
    cumulative = log_probs.double().exp().cumsum(dim=-1)
    # It ends at 1 exactly, which no uniform number reaches.
    labels = torch.searchsorted(cumulative / cumulative[:, -1:], uniform[:, :1].contiguous(), right=True)[:, 0]
    normal: Tensor = torch.special.ndtri(uniform[:, 1:].clamp_min(2.0**-54))
    return codes[labels] + sigma * normal.to(codes)


def _estimate(log_probs: Tensor, codes: Tensor, bridge: Bridge) -> Tensor:
    if bridge == "argmax":
        return codes[log_probs.argmax(dim=-1)]
    return log_probs.exp().to(codes.dtype) @ codes


def _as_float(log_probs: Tensor) -> Tensor:
    """Sums over steps and means over noises need more digits than autocast leaves."""
    return log_probs if log_probs.dtype == torch.float64 else log_probs.float()
