"""What a model family offers to the planner, the trainer and the assembly.

A family is one module of `dbtrain.models`, or of anybody's package, that registers one object here. The rest of the
system never asks which family it has in hand; how its assembled model is used follows from its `task`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dbtrain.config import RunConfig
from dbtrain.diffusion.partition import partition, widen
from dbtrain.errors import UserError
from dbtrain.plan import DatasetFacts, Kind, NoiseRange, split_layers

Batch = Mapping[str, Tensor]
"""Named tensors with one row a sample: image (N, C, H, W) and label (N,), or tokens (N, L)."""
Draw = Mapping[str, Tensor]
"""What a loss needs of chance, one row a sample, e.g. sigma (N,) and eps (N, d)."""
FEATURES, BELIEF, CODE = "relayed_features", "relayed_belief", "relayed_code"
"""Names in a batch of what the block before hands on where blocks relay: what it makes of the samples; what it says of
their labels, log-probabilities (N, classes); and the noisy code that its step of the chain leads to, (N, d)."""
Task = Literal["classify", "generate_images", "generate_text", "unmask_text"]
"""How an assembled model is used; docs/adding-a-family.md says what each asks of the modules."""
Scaling = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel that images are normalised with."""


class TrainableModule(nn.Module, ABC):
    """What the trainer trains: a block, or the end-to-end network."""

    recompute: bool = False
    """Whether to keep each layer's input alone for the way back; modules hand it to `apply_layers`."""
    iterates: ClassVar[bool] = False
    """Whether inference may iterate it at will: blocks by steps of the chain, an end-to-end network with `iterations`.
    """

    @abstractmethod
    def draw(self, batch_size: int, generator: torch.Generator) -> Draw:
        """Random numbers for the loss of `batch_size` samples, on the generator's device."""

    def example_draw(self, batch_size: int) -> Draw:
        """What the planner sizes a step by, on the CPU: a draw; where sizes are left to chance, one of mean size."""
        return self.draw(batch_size, torch.Generator("cpu"))

    def features(self, batch: Batch) -> Tensor:
        """What a block's layers make of a batch, one row a sample, where that depends on no noise and on no target.

        Where blocks relay, all but the first find `FEATURES` of the block before in the batch, and go on from them.
        """
        raise NotImplementedError(f"blocks of task 'classify' need `features`: {type(self).__name__} has none")

    def hand_on(self, batch: Batch, draw: Draw) -> Batch:
        """What the block says to the next one where blocks relay: `FEATURES`, `BELIEF`, `CODE`. No label is looked at;
        the chain starts from the noise of the draw.
        """
        raise NotImplementedError(f"blocks of a family that relays need `hand_on`: {type(self).__name__} has none")

    @abstractmethod
    def training_loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Mean loss of the batch, a scalar."""


@dataclass(frozen=True)
class Piece:
    """What one worker trains."""

    layers: tuple[int, int]
    """First layer and the one after the last."""
    noise: NoiseRange | None
    """The range of noise levels the block answers for at inference; none for the end-to-end network."""
    trained: NoiseRange | None
    """That range with the overlap."""
    evaluations: float
    """Layers evaluated for one sample in a training step; the mean, where chance decides."""
    kept: float | None = None
    """Of these, the evaluations that gradients go through; all when not given."""


class Family(ABC):
    """One way to build networks that train block by block."""

    name: ClassVar[str]
    """What `model.family` says."""
    task: ClassVar[Task]
    """How an assembled model is used."""

    def codebook(self, config: RunConfig) -> Tensor | None:
        """The frozen targets all blocks share, (classes, width), float32, on the CPU; None if it needs none."""
        return None

    def cut(self, config: RunConfig) -> list[Piece]:
        """One piece a block, highest noise first; by default contiguous layers and ranges of Gaussian noise.

        Raises:
            UserError: as `ranges`.
        """
        layers = split_layers(config.model.depth, config.blocks.count, config.blocks.split)
        ranges = self.ranges(config)
        trained = widen(ranges, config.blocks.overlap, config.noise)
        return [
            # A relayed block also evaluates, forward only, all layers before its own.
            Piece((first, end), own, wide, end if relayed(config, (first, end)) else end - first, end - first)
            for (first, end), own, wide in zip(layers, ranges, trained, strict=True)
        ]

    def ranges(self, config: RunConfig) -> list[NoiseRange]:
        """The ranges of Gaussian noise that the blocks answer for, highest first.

        Raises:
            UserError: one would be empty, or they follow from a codebook that the family does not have.
        """
        codebook = self.codebook(config) if config.blocks.partition.kind == "equal_information" else None
        return partition(config.noise, config.blocks, codebook)

    def whole(self, config: RunConfig) -> Piece:
        """The end-to-end network as the only piece."""
        return Piece((0, config.model.depth), None, None, config.model.depth)

    def scaling(self, config: RunConfig, data: DatasetFacts) -> Scaling:
        """What images are normalised with: (x - mean) / std. By default to zero mean and unit variance."""
        return data.mean, data.std

    @abstractmethod
    def build_block(
        self, config: RunConfig, layers: tuple[int, int], trained: NoiseRange, codebook: Tensor | None
    ) -> TrainableModule:
        """One complete block: its own stem, layers [first, end) and head; nothing of any other block."""

    @abstractmethod
    def build_end_to_end(self, config: RunConfig) -> TrainableModule:
        """The whole network trained the ordinary way, on the same layers."""

    def check_start(self, config: RunConfig) -> None:
        """Asked before a run is planned: whether `start_from` will find what it needs.

        Raises:
            UserError: it will not.
        """
        return

    def start_from(self, config: RunConfig, layers: tuple[int, int], module: TrainableModule) -> None:
        """Replace the random weights of a module that has just been built, where training starts from others.

        Raises:
            UserError: they cannot be had.
        """
        return

    @abstractmethod
    def example_batch(self, config: RunConfig, batch_size: int) -> Batch:
        """A batch of the right shapes and types on the current default device (the planner's is `meta`)."""


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known under its name."""
    _FAMILIES[family.name] = family


def relays(config: RunConfig, kind: Kind) -> bool:
    """Whether the blocks of such a run go on from each other's features."""
    return config.blocks.relay_every is not None and kind == "blocks"


def relayed(config: RunConfig, layers: tuple[int, int]) -> bool:
    """Whether the block with these layers goes on from the features of the block before it."""
    return config.blocks.relay_every is not None and layers[0] > 0


@torch.no_grad()
def walk_to(modules: Sequence[TrainableModule], batch: Batch, draw: Draw) -> Batch:
    """The batch with what the last of `modules`, the first blocks of a network, hands on; each goes on from another."""
    for module in modules:
        batch = {**batch, **module.hand_on(batch, draw)}
    return batch


def family_of(config: RunConfig) -> Family:
    """The family that `config.model.family` names.

    Raises:
        UserError: the module of that name has defined a section of the configuration and no family.
    """
    name = config.model.family
    if name not in _FAMILIES:
        raise UserError(
            "the module registers no family of that name",
            field="model.family",
            value=name,
            mend="call `register` there with a Family of that `name`",
        )
    return _FAMILIES[name]
