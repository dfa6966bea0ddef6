"""Sampling images: the probability-flow ODE from pure noise to the clean image, by Euler's or Heun's method.

Source: Karras et al. 2022, algorithm 1 and equation 5, with sigma(t) = t and s(t) = 1: dz/dsigma = (z - D(z; sigma)) /
sigma. The state is float64 whatever the network computes in, so that many small steps add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor

from dbtrain.config import NoiseConfig

Solver = Literal["euler", "heun"]
Denoiser = Callable[[Tensor, float], Tensor]
"""(z (N, ...) float64, sigma) -> the estimate D of the clean samples, of the same shape."""

RHO = 7.0
"""How much the noise grid leans to low noise; the value of Karras et al. 2022, appendix D.1."""


def rho_grid(noise: NoiseConfig, steps: int) -> list[float]:
    """Noise levels of a walk: `steps` from sigma_max down to sigma_min, evenly spaced in sigma^(1/7), then 0.

    A single step goes from sigma_max to 0. Both ends are exact, so that the blocks' ranges hold every level but the 0.
    """
    if steps < 1:
        raise ValueError(f"a walk of {steps} steps")
    high, low = noise.sigma_max ** (1 / RHO), noise.sigma_min ** (1 / RHO)
    inner = [(high + index / (steps - 1) * (low - high)) ** RHO for index in range(1, steps - 1)]
    clamped = [min(max(sigma, noise.sigma_min), noise.sigma_max) for sigma in inner]
    return [noise.sigma_max, *clamped, *([noise.sigma_min] if steps > 1 else []), 0.0]


def network_calls(solver: Solver, steps: int) -> int:
    """How often a walk asks for an estimate. Heun's method asks twice a step, but for the last, which ends at 0."""
    return steps if solver == "euler" else 2 * steps - 1


def sample(
    denoise: Denoiser,
    start: Tensor,
    sigmas: Sequence[float],
    solver: Solver,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Walk from `start` down the noise levels `sigmas`.

    Args:
        denoise: asked once a step, twice by Heun's method.
        start: a sample at the first level: sigmas[0] times standard normal noise, (N, ...).
        sigmas: falling; the last may be 0.
        on_step: told the number of steps done, after each.

    Returns:
        float64, of the shape and on the device of `start`.
    """
    z = start.double()
    for index, (sigma, lower) in enumerate(pairwise(sigmas)):
        slope = (z - denoise(z, sigma).double()) / sigma
        ahead = z + (lower - sigma) * slope
        # There is no slope at 0, nor much to correct there.
        if solver == "heun" and lower > 0.0:
            slope_ahead = (ahead - denoise(ahead, lower).double()) / lower
            ahead = z + (lower - sigma) * 0.5 * (slope + slope_ahead)
        z = ahead
        if on_step is not None:
            on_step(index + 1)
    return z
