"""The distribution of noise levels in training: a log-normal, truncated to [sigma_min, sigma_max].

Source: Karras et al. 2022, table 1 (the log-normal); Shing, Koyama, Akiba 2026, section 3 (its use for a
partition). Everything is computed in float64, in whichever tail is small, so that ranges far out stay exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from dbtrain.config import NoiseConfig
from dbtrain.plan import NoiseRange

_STANDARD_NORMAL = NormalDist()


def _phi(x: float) -> float:
    """The standard normal CDF, with full relative precision in the lower tail."""
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


@dataclass(frozen=True)
class NoiseDistribution:
    """log sigma ~ N(p_mean, p_std^2), given that sigma lies in [sigma_min, sigma_max]."""

    p_mean: float
    p_std: float
    sigma_min: float
    sigma_max: float

    @classmethod
    def from_config(cls, noise: NoiseConfig) -> NoiseDistribution:
        """The distribution that the section `noise` of a configuration describes."""
        return cls(noise.p_mean, noise.p_std, noise.sigma_min, noise.sigma_max)

    def cdf(self, sigma: float) -> float:
        """Probability of a noise level at or below `sigma`: 0 at sigma_min, 1 at sigma_max."""
        if sigma <= self.sigma_min:
            return 0.0
        if sigma >= self.sigma_max:
            return 1.0
        sign, low, high = self._tail(self.sigma_min, self.sigma_max)
        at = _phi(sign * self._standard(sigma))
        return (at - low) / (high - low) if sign > 0 else (high - at) / (high - low)

    def quantile(self, q: float, within: NoiseRange | None = None) -> float:
        """The noise level with probability `q` below it, of the distribution truncated to `within`.

        `within` is [sigma_min, sigma_max] when not given; q = 0 and q = 1 give its ends exactly.

        Raises:
            ValueError: q is not a probability.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"{q} is not a probability")
        floor, ceiling = (self.sigma_min, self.sigma_max) if within is None else (within.low, within.high)
        if q in (0.0, 1.0):
            return floor if q == 0.0 else ceiling
        sign, low, high = self._tail(floor, ceiling)
        p = low + (high - low) * (q if sign > 0 else 1.0 - q)
        sigma = math.exp(self.p_mean + self.p_std * sign * _STANDARD_NORMAL.inv_cdf(p))
        return min(max(sigma, floor), ceiling)

    def mass(self, low: float, high: float) -> float:
        """Probability of [low, high] under the log-normal before truncation."""
        _, p_low, p_high = self._tail(low, high)
        return p_high - p_low

    def sample(self, within: NoiseRange, n: int, generator: torch.Generator) -> Tensor:
        """Draw `n` noise levels from the distribution truncated further to `within`, by inverse CDF.

        Returns:
            (n,) float32 on the generator's device; no value lies outside `within`, rounding included.

        Raises:
            ValueError: the range is empty.
        """
        if not 0.0 < within.low < within.high:
            raise ValueError(f"[{within.low}, {within.high}] is not a range of noise levels")
        sign, low, high = self._tail(within.low, within.high)
        u = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        x = torch.special.ndtri(low + (high - low) * u)
        sigma = torch.exp(self.p_mean + self.p_std * sign * x).to(torch.float32)
        return sigma.clamp(_float32_above(within.low), _float32_below(within.high))

    def _standard(self, sigma: float) -> float:
        return (math.log(sigma) - self.p_mean) / self.p_std

    def _tail(self, low: float, high: float) -> tuple[int, float, float]:
        """(sign, Phi at the two ends in ascending order), mirrored (sign -1) for a range above the median.

        1 - Phi loses all digits where Phi is near 1, so such a range is measured from the other end.
        """
        a, b = self._standard(low), self._standard(high)
        if a > 0.0:
            return -1, _phi(-b), _phi(-a)
        return 1, _phi(a), _phi(b)


def _float32_above(value: float) -> float:
    """The least float32 that is not below `value`."""
    nearest = np.float32(value)
    return float(nearest if float(nearest) >= value else np.nextafter(nearest, np.float32(np.inf)))


def _float32_below(value: float) -> float:
    """The greatest float32 that is not above `value`."""
    nearest = np.float32(value)
    return float(nearest if float(nearest) <= value else np.nextafter(nearest, np.float32(-np.inf)))
