"""Exponential moving average of a module's parameters, with its half-life counted in samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dbtrain.config import EMAConfig


class EMA:
    """Averaged parameters, kept as separate tensors (Karras et al. 2022: half-life in images, with ramp-up)."""

    def __init__(self, module: nn.Module, config: EMAConfig):
        self.config = config
        self._names = [name for name, _ in module.named_parameters()]
        self._sources = [parameter.detach() for parameter in module.parameters()]
        self._averages = [source.clone() for source in self._sources]

    def update(self, samples: int, batch_size: int) -> None:
        """Take in the current parameters after `samples` samples in all, the last `batch_size` of them new."""
        half_life = max(1e-8, min(self.config.half_life, samples * self.config.ramp_up))
        decay = 0.5 ** (batch_size / half_life)
        torch._foreach_lerp_(self._averages, self._sources, 1.0 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name, without copies."""
        return dict(zip(self._names, self._averages, strict=True))

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(tensors[name])
