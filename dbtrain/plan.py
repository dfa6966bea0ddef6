"""The plan: which layers and which noise range each block owns, and what that costs a worker.

Plain data with JSON in and out; `dbtrain.training.planner` makes one from a `RunConfig`. A plan is written once, at the
start of a run, and everything later (workers, assembly, monitors) reads it instead of deciding again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dbtrain.model_config import DataKind

Kind = Literal["blocks", "end_to_end"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class NoiseRange(_Record):
    """An interval of noise levels, low < high: of sigma, or of the mask level t in [0, 1] where tokens are masked."""

    low: float
    high: float


class Bytes(_Record):
    """Bytes of tensors in one worker at the moment of a step when they are most, while it trains its block."""

    parameters: int
    buffers: int
    """Frozen tensors, such as the codebook."""
    gradients: int
    """Those that are there by then: most are made when the activations they come from are gone. With
    `training.accumulate`, or replicas, all of them."""
    optimiser: int
    ema: int
    activations: int
    """Tensors that autograd keeps for the backward pass of one (micro-)batch."""
    temporary: int = 0
    """What is alive beside them at that moment: the batch and its noise, results and gradients on their way, and with
    `training.recompute` the layer that is computed again."""
    gathered: int = 0
    """With `resources.shard`: what FSDP2 gathers from the other replicas and has not reduced yet, at most."""

    @property
    def total(self) -> int:
        """All of them together: the peak."""
        state = self.parameters + self.buffers + self.gradients + self.optimiser + self.ema
        return state + self.activations + self.temporary + self.gathered


class BlockPlan(_Record):
    """One block of the run. An end-to-end baseline has a single one that owns all layers and no noise."""

    index: int
    """0 has the earliest layers and the highest noise."""
    layers: tuple[int, int]
    """First layer and the one after the last."""
    noise: NoiseRange | None
    """The range of noise levels the block answers for at inference."""
    trained: NoiseRange | None
    """That range with the overlap: what it trains on."""
    parameters: int
    """Number of trained scalars."""
    bytes: Bytes
    evaluations: float
    """Layers evaluated for one sample in a training step; the mean, where chance decides."""
    flops_per_sample: int
    """Floating-point operations of one sample's forward and backward pass (matrix products, 2 a multiply-add)."""

    @property
    def num_layers(self) -> int:
        """How many layers the block owns."""
        return self.layers[1] - self.layers[0]


class DatasetFacts(_Record):
    """What a run has to know of its data; taken from the shards' manifest when training starts."""

    sha256: str
    """Digest of the manifest's content: two folders with the same digest hold the same rows in the same order."""
    kind: DataKind
    """What a row is."""
    shape: tuple[int, ...]
    """Of an image or latent, (channels, height, width); of a window of text, (tokens,)."""
    train_rows: int
    test_rows: int
    class_names: tuple[str, ...]
    """Names of the labels; none for text and for latents without labels."""
    mean: tuple[float, ...]
    """Mean of each channel over the training rows: of pixels in [0, 1], of latents as they are; none for text."""
    std: tuple[float, ...]
    """Their standard deviation."""
    vocab_size: int | None
    """Number of token ids, for text."""
    separator: int | None
    """Id of the token that ends a document and begins a text, for text."""
    tokenizer_sha256: str | None
    """Digest of the tokenizer's file, for text."""


class Plan(_Record):
    """Who trains what."""

    kind: Kind
    name: str
    config_sha256: str
    """`RunConfig.digest()` of the configuration the plan was made from."""
    codebook_sha256: str | None
    """Digest of the frozen targets that all blocks share; none for an end-to-end network."""
    seed: int
    steps: int
    """Optimiser steps of every block."""
    batch_size: int
    threads: int
    """Threads of PyTorch in each worker."""
    data: DatasetFacts | None = None
    """None in a dry run, before the data has been looked at."""
    blocks: tuple[BlockPlan, ...] = Field(min_length=1)

    @property
    def layer_evaluations(self) -> int:
        """Layers evaluated in training, summed over blocks, steps and samples: the unit of fair comparisons."""
        return round(self.steps * self.batch_size * sum(block.evaluations for block in self.blocks))

    @property
    def flops(self) -> int:
        """Floating-point operations of the whole training."""
        return self.steps * self.batch_size * sum(block.flops_per_sample for block in self.blocks)


def human_bytes(count: float) -> str:
    """12.3 MB, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def split_layers(depth: int, count: int, split: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Cut `depth` layers into `count` contiguous pieces, as (first, end) pairs.

    Without an explicit `split` the pieces differ by at most one layer and the remainder goes to the first blocks, which
    own the highest noise; no layer is ever dropped.

    Raises:
        ValueError: more pieces than layers, or a split that does not add up.
    """
    if split is None:
        if not 1 <= count <= depth:
            raise ValueError(f"cannot cut {depth} layers into {count} blocks")
        split = [depth // count + (1 if index < depth % count else 0) for index in range(count)]
    if len(split) != count or sum(split) != depth or min(split) < 1:
        raise ValueError(f"split {list(split)} does not share {depth} layers among {count} blocks")
    ends = [sum(split[: index + 1]) for index in range(count)]
    return [(end - size, end) for end, size in zip(ends, split, strict=True)]
