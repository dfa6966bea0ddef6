"""Batches as the shards hold them -> as networks want them, on whatever device they are.

Images become normalised float32, distorted per sample; latents normalised float32; tokens int64.

Every random parameter is a function of (key, position of the sample) alone: neither batch size, nor step, nor
the samples beside it change what happens to an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from dbtrain.data.randaugment import LANES_PER_OPERATION, rand_augment
from dbtrain.data_config import AugmentConfig
from dbtrain.randomness import keyed_uniform

# Which of a sample's uniform numbers decides what. Fixed: turning one distortion on leaves the others alone.
_CROP_Y, _CROP_X, _FLIP, _RANDAUGMENT = 0, 1, 2, 3
# Positions whose uniform numbers are made at once and remembered: for a small batch alone, calls of numpy would take
# longer than its numbers.
_STRETCH = 4096


Batch = dict[str, Tensor]
"""Columns of one batch by name, each (N, ...)."""


class Transform(Protocol):
    """What a loader does to the columns it has gathered."""

    def __call__(self, batch: Batch, positions: npt.NDArray[np.int64]) -> Batch:
        """Columns as stored and the samples' positions (N,) in the order -> columns as networks want them."""
        ...


class _Affine:
    """x * scale - shift for each channel, in float32."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], full: float):
        scale = torch.tensor(std, dtype=torch.float64).reciprocal() / full
        shift = torch.tensor(mean, dtype=torch.float64) * full * scale
        self._scale = scale.float().view(-1, 1, 1)
        self._shift = shift.float().view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """(N, C, H, W) of any type -> float32 of the same shape, in memory of its own."""
        self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        return images.to(torch.float32, copy=True).mul_(self._scale).sub_(self._shift)


class EvalTransform:
    """Normalise images: (pixel / 255 - mean) / std for each channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self._normalise = _Affine(mean, std, full=255)

    def __call__(self, batch: Batch, positions: npt.NDArray[np.int64] | None = None) -> Batch:
        """image: uint8 (N, C, H, W) -> float32."""
        return {**batch, "image": self._normalise(batch["image"])}


class LatentTransform:
    """Normalise latents: (x - mean) / std for each channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self._normalise = _Affine(mean, std, full=1)

    def __call__(self, batch: Batch, positions: npt.NDArray[np.int64] | None = None) -> Batch:
        """image: float16 or float32 (N, C, H, W) -> float32."""
        return {**batch, "image": self._normalise(batch["image"])}


class TokenTransform:
    """Token ids in the type that embeddings are indexed with."""

    def __call__(self, batch: Batch, positions: npt.NDArray[np.int64] | None = None) -> Batch:
        """tokens: unsigned (N, L) -> int64."""
        return {**batch, "tokens": batch["tokens"].long()}


class TrainTransform:
    """Pad-crop, flip, RandAugment, normalise: those of them that the configuration asks for."""

    def __init__(self, augment: AugmentConfig, mean: Sequence[float], std: Sequence[float], key: int):
        self._augment = augment
        self._normalise = EvalTransform(mean, std)
        self._key = key
        policy = augment.randaugment
        self._lanes = _RANDAUGMENT + (0 if policy is None else policy.operations * LANES_PER_OPERATION)
        self._remembered: tuple[int, npt.NDArray[np.float64]] | None = None

    def __call__(self, batch: Batch, positions: npt.NDArray[np.int64]) -> Batch:
        """image: uint8 (N, C, H, W) -> float32, distorted as the positions (N,) decide."""
        return self._normalise({**batch, "image": self.distort(batch["image"], positions)})

    def distort(self, images: Tensor, positions: npt.NDArray[np.int64]) -> Tensor:
        """The distortions alone: uint8 (N, C, H, W) in and out."""
        augment = self._augment
        if not (augment.crop_padding or augment.flip or augment.randaugment is not None):
            return images
        chance = self._chance(positions)
        chosen = chance[:, _FLIP] < 0.5 if augment.flip else np.zeros(len(chance), np.bool_)
        if augment.crop_padding and images.device.type == "cpu":
            images = pad_crop_flip(images, augment.crop_padding, chance[:, _CROP_Y], chance[:, _CROP_X], chosen)
        else:
            if augment.crop_padding:
                images = pad_crop(images, augment.crop_padding, chance[:, _CROP_Y], chance[:, _CROP_X])
            if augment.flip:
                images = flip(images, chosen)
        if augment.randaugment is not None:
            images = rand_augment(images, augment.randaugment, chance[:, _RANDAUGMENT:])
        return images

    def _chance(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Uniform numbers (N, lanes) of positions (N,), whose batches mostly lie in one stretch."""
        number = int(positions[0]) // _STRETCH if len(positions) else 0
        places = positions - number * _STRETCH
        if (places < 0).any() or (places >= _STRETCH).any():
            return keyed_uniform(self._key, positions, self._lanes)
        remembered = self._remembered
        if remembered is None or remembered[0] != number:
            whole = np.arange(number * _STRETCH, (number + 1) * _STRETCH, dtype=np.int64)
            self._remembered = remembered = (number, keyed_uniform(self._key, whole, self._lanes))
        return remembered[1][places]


def pad_crop(images: Tensor, padding: int, y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> Tensor:
    """Pad with zeros on all sides and cut the original size back out; y and x (N,) in [0, 1) say where."""
    height, width = images.shape[-2:]
    device = images.device
    top = torch.from_numpy((y * (2 * padding + 1)).astype(np.int64)).to(device)
    left = torch.from_numpy((x * (2 * padding + 1)).astype(np.int64)).to(device)
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=device), :, top, left]


def flip(images: Tensor, chosen: npt.NDArray[np.bool_]) -> Tensor:
    """Mirror the chosen images, (N,) bool, left to right."""
    mask = torch.from_numpy(chosen).to(images.device).view(-1, 1, 1, 1)
    return torch.where(mask, images.flip(-1), images)


def pad_crop_flip(
    images: Tensor,
    padding: int,
    y: npt.NDArray[np.float64],
    x: npt.NDArray[np.float64],
    chosen: npt.NDArray[np.bool_],
) -> Tensor:
    """What `pad_crop` and then `flip` do, for images on the CPU: windows of one padded copy, no loop."""
    n, channels, height, width = images.shape
    padded = np.zeros((n, channels, height + 2 * padding, width + 2 * padding), np.uint8)
    padded[:, :, padding : padding + height, padding : padding + width] = images.numpy()
    top, left = (y * (2 * padding + 1)).astype(np.int64), (x * (2 * padding + 1)).astype(np.int64)
    by_image, by_channel, by_row, by_column = padded.strides
    windows = np.lib.stride_tricks.as_strided(
        padded,
        (n, 2 * padding + 1, 2 * padding + 1, channels, height, width),
        (by_image, by_row, by_column, by_channel, by_row, by_column),
        writeable=False,
    )
    out = windows[np.arange(n), top, left]
    mirrored = np.flatnonzero(chosen)
    out[mirrored] = out[mirrored, ..., ::-1]
    return torch.from_numpy(out)
