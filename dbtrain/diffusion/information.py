"""Edges between which a noisy code tells equal shares of what it tells of its label.

For y uniform over the C rows of a codebook and z = y + sigma eps, the information I(y; z) is log C less the mean of
-log p(y | z) = log sum_j exp(-|y - y_j|^2 / (2 sigma^2) - <y - y_j, eps> / sigma). The mean is taken over all rows and
over noises that are the same for every sigma and every run, so that I falls smoothly. Edges are rounded to 4 digits:
machines whose exponentials differ in the last bits agree on them.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dbtrain.randomness import derive_key, keyed_uniform

MAX_ROWS = 1024
"""Of a larger codebook so many rows are used, spread evenly over it."""
_SIZE = 2**18
"""Noises times rows, about."""
_TINY = 1e-290
_Array = npt.NDArray[np.float64]


class LabelInformation:
    """I(y; z) as a function of sigma, for one codebook (C, d)."""

    def __init__(self, codebook: Tensor):
        rows = codebook.double().numpy()
        if len(rows) > MAX_ROWS:
            rows = rows[np.arange(MAX_ROWS) * len(rows) // MAX_ROWS]
        rows = _in_few_coordinates(rows)
        positions = np.arange(_SIZE // len(rows) // 2 + 1)
        uniform = torch.from_numpy(keyed_uniform(derive_key(0, "information"), positions, rows.shape[1]))
        half = torch.special.ndtri(uniform.clamp_min(2.0**-54)).numpy()
        projections = np.concatenate([half, -half]) @ rows.T  # in pairs, what is odd in the noise cancels
        self._projections = projections - projections.max(axis=1, keepdims=True)
        gram = rows @ rows.T
        self._half_distances = (gram.diagonal()[:, None] + gram.diagonal()[None, :]) / 2 - gram

    def at(self, sigma: float) -> float:
        """The information at one noise level, in nats; log C at most."""
        own = np.exp(self._projections / sigma)
        everyone = own @ np.exp(-self._half_distances / sigma**2)
        # Where even the row's own term underflows, sigma is so small that nothing else is left beside it.
        losses = np.log(np.maximum(everyone, _TINY) / np.maximum(own, _TINY))
        return math.log(len(self._half_distances)) - float(losses.mean())


def equal_information_edges(codebook: Tensor, count: int, low: float, high: float) -> list[float]:
    """The count - 1 noise levels, falling, that cut what is told between `high` and `low` into equal shares."""
    return list(_edges(codebook.float().numpy().tobytes(), codebook.shape[1], count, low, high))


@lru_cache(maxsize=8)
def _edges(codebook_bytes: bytes, width: int, count: int, low: float, high: float) -> tuple[float, ...]:
    """A run asks for them once a block, and they take part of a second."""
    codebook = torch.frombuffer(bytearray(codebook_bytes), dtype=torch.float32).view(-1, width)
    at = cache(LabelInformation(codebook).at)
    edges = []
    for index in range(1, count):
        wanted = at(high) + (at(low) - at(high)) * index / count
        floor, ceiling = low, high
        while ceiling > floor * (1.0 + 5e-5):
            middle = math.sqrt(floor * ceiling)
            floor, ceiling = (middle, ceiling) if at(middle) > wanted else (floor, middle)
        edges.append(float(f"{floor:.4g}"))
    return tuple(edges)


def _in_few_coordinates(rows: _Array) -> _Array:
    """Orthogonal rows of one norm in coordinates of their own, which makes edges the same for every seed."""
    norm = math.sqrt(float((rows * rows).sum(axis=1).mean()))
    own = float(f"{norm:.5g}") * np.eye(len(rows))
    return own if np.allclose(rows @ rows.T, own @ own, rtol=0.0, atol=1e-4 * norm**2) else rows
