"""Preconditioning and loss weight of EDM (Karras et al. 2022, table 1 and equation 7).

D = c_skip * z + c_out * F(c_in * z, c_noise): F sees inputs, and is asked for outputs, of unit variance at
every noise level. All functions are elementwise in `sigma` and keep its shape, type and device.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def c_skip(sigma: Tensor, sigma_data: float) -> Tensor:
    """Share of the noisy input in the estimate."""
    return sigma_data**2 / (sigma**2 + sigma_data**2)


def c_out(sigma: Tensor, sigma_data: float) -> Tensor:
    """Scale of the network's output."""
    return sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()


def c_in(sigma: Tensor, sigma_data: float) -> Tensor:
    """Scale of the network's input."""
    return (sigma**2 + sigma_data**2).rsqrt()


def c_noise(sigma: Tensor) -> Tensor:
    """The noise level as the network is told it."""
    return sigma.log() / 4.0


def weights(kind: Literal["unit", "edm"], sigma: Tensor, sigma_data: float) -> Tensor:
    """Per-sample loss weight: 1, or 1 / c_out^2 = (sigma^2 + sigma_data^2) / (sigma * sigma_data)^2."""
    if kind == "unit":
        return torch.ones_like(sigma)
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def weighted_errors(
    kind: Literal["unit", "edm"], estimate: Tensor, clean: Tensor, sigma_n: Tensor, sigma_data: float
) -> Tensor:
    """Mean square errors (N,) of the estimates D, (N, ...), each with the weight of its sigma; at least float32."""
    difference = estimate - clean if estimate.dtype == torch.float64 else estimate.float() - clean
    return weights(kind, sigma_n, sigma_data) * difference.square().flatten(1).mean(dim=1)
