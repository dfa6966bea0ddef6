"""The protocol a model family meets: what the planner, the trainer and the assembly ask of it.

A family is one module of `dbtrain.models` that registers one object here. The rest of the system never asks which
family it has in hand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from dbtrain.config import RunConfig
from dbtrain.plan import NoiseRange

Batch = Mapping[str, Tensor]
"""Named tensors with one row a sample, e.g. image (N, C, H, W) and label (N,)."""
Draw = Mapping[str, Tensor]
"""What a loss needs of chance, one row a sample, e.g. sigma (N,) and eps (N, d)."""


class TrainableModule(nn.Module, ABC):
    """What the trainer trains: a block, or the end-to-end network."""

    @abstractmethod
    def draw(self, batch_size: int, generator: torch.Generator) -> Draw:
        """Random numbers for the loss of `batch_size` samples, on the generator's device."""

    @abstractmethod
    def training_loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Mean loss of the batch, a scalar."""


class Family(Protocol):
    """One way to build networks that train block by block."""

    name: str

    def codebook(self, config: RunConfig) -> Tensor | None:
        """The frozen targets all blocks share, (classes, width), float32, on the CPU; None if it needs none."""
        ...

    def build_block(
        self, config: RunConfig, layers: tuple[int, int], trained: NoiseRange, codebook: Tensor | None
    ) -> TrainableModule:
        """One complete block: its own stem, layers [first, end) and head; nothing of any other block."""
        ...

    def build_end_to_end(self, config: RunConfig) -> TrainableModule:
        """The whole network trained the ordinary way, on the same layers."""
        ...

    def example_batch(self, config: RunConfig, batch_size: int) -> Batch:
        """A batch of the right shapes and types on the current default device (the planner's is `meta`)."""
        ...


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known under its name."""
    _FAMILIES[family.name] = family


def family_of(config: RunConfig) -> Family:
    """The family that `config.model.family` names."""
    return _FAMILIES[config.model.family]
