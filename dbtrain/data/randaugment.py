"""RandAugment (Cubuk et al. 2020), for batches: the paper's 14 distortions, grouped by how they are computed.

Geometric ones are one gather through a per-sample affine map; photometric ones that look at one pixel at a
time are a per-sample table of 256 values; the rest are blends. Strengths have the ranges of AutoAugment
(Cubuk et al. 2019), results are those of Pillow, in which the paper's operations are defined.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dbtrain.data_config import RandAugmentConfig

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
TABLES = ("auto_contrast", "equalize", "solarize", "posterize", "contrast", "brightness")
BLENDS = ("color", "sharpness")
OPERATIONS = ("identity", *GEOMETRIC, *TABLES, *BLENDS)

LANES_PER_OPERATION = 2
"""Uniform numbers a sample needs for each distortion: which one, and its sign."""

_FULL_MAGNITUDE = 30.0
_MAX_ROTATION = math.radians(30)
_MAX_SHEAR = 0.3
_MAX_SHIFT = 150 / 331
_MAX_BLEND = 0.9
_MAX_LOST_BITS = 4

Floats = npt.NDArray[np.float64]


def rand_augment(images: Tensor, policy: RandAugmentConfig, chance: Floats) -> Tensor:
    """Distort uint8 images (N, C, H, W), C = 1 or 3.

    `chance`, (N, operations * LANES_PER_OPERATION) in [0, 1), decides what happens to each.
    """
    for number in range(policy.operations):
        which, sign = chance[:, LANES_PER_OPERATION * number], chance[:, LANES_PER_OPERATION * number + 1]
        operation = (which * len(OPERATIONS)).astype(np.int64)
        strength = np.where(sign < 0.5, -1.0, 1.0) * (policy.magnitude / _FULL_MAGNITUDE)
        images = distort(images, operation, strength)
    return images


def distort(images: Tensor, operation: npt.NDArray[np.int64], strength: Floats) -> Tensor:
    """Apply OPERATIONS[operation[i]] with strength[i] in [-1, 1] to image i.

    The sign is a direction, or less and more; solarize and posterize ignore it.
    """
    out = images.clone()
    names = np.array(OPERATIONS)[operation]
    for group, function in ((GEOMETRIC, _warp), (TABLES, _look_up), (BLENDS, _blend)):
        members = np.flatnonzero(np.isin(names, group))
        if members.size:
            index = torch.from_numpy(members).to(images.device)
            out[index] = function(images[index], names[members], strength[members])
    return out


def _warp(images: Tensor, names: npt.NDArray[np.str_], strength: Floats) -> Tensor:
    """Nearest-pixel affine maps; what comes from outside is black."""
    count, channels, height, width = images.shape
    # Rows (a, b, c) of the map from output to input pixel centres: x' = a x + b y + c, likewise for y'.
    maps = np.tile(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), (count, 1, 1))
    for index, (name, amount) in enumerate(zip(names, strength, strict=True)):
        if name == "rotate":
            cos, sin = math.cos(amount * _MAX_ROTATION), math.sin(amount * _MAX_ROTATION)
            centre = np.array([width / 2, height / 2])
            turn = np.array([[cos, -sin], [sin, cos]])
            maps[index] = np.column_stack([turn, centre - turn @ centre])
        elif name == "shear_x":
            maps[index, 0, 1] = amount * _MAX_SHEAR
        elif name == "shear_y":
            maps[index, 1, 0] = amount * _MAX_SHEAR
        elif name == "translate_x":
            maps[index, 0, 2] = amount * _MAX_SHIFT * width
        else:
            maps[index, 1, 2] = amount * _MAX_SHIFT * height
    affine = torch.from_numpy(maps.astype(np.float32)).to(images.device)
    y = torch.arange(height, device=images.device).view(1, -1, 1) + 0.5
    x = torch.arange(width, device=images.device).view(1, 1, -1) + 0.5
    a, b, c = affine.unsqueeze(-1).unsqueeze(-1).unbind(2)
    source = (a * x.unsqueeze(1) + b * y.unsqueeze(1) + c).floor().long()
    source_x, source_y = source.unbind(1)
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    flat = (source_y.clamp(0, height - 1) * width + source_x.clamp(0, width - 1)).view(count, 1, -1)
    warped = images.reshape(count, channels, -1).gather(2, flat.expand(-1, channels, -1))
    return warped.view_as(images) * inside.unsqueeze(1)


def _look_up(images: Tensor, names: npt.NDArray[np.str_], strength: Floats) -> Tensor:
    """Replace each value by its entry in the image's own tables, one for each channel."""
    count, channels = images.shape[:2]
    values = torch.arange(256, device=images.device)
    flat = images.reshape(count * channels, -1).long()
    tables = values.expand(count, channels, 256).clone()
    for name in np.unique(names):
        members = np.flatnonzero(names == name)
        index = torch.from_numpy(members).to(images.device)
        amount = torch.from_numpy(strength[members].astype(np.float32)).to(images.device).view(-1, 1, 1)
        if name in ("auto_contrast", "equalize"):
            counts = _histograms(flat.view(count, channels, -1)[index])
            table = _stretched(counts) if name == "auto_contrast" else _equalized(counts)
        elif name == "solarize":
            table = torch.where(values >= 255 * (1 - amount.abs()), 255 - values, values)
        elif name == "posterize":
            lost = torch.round(amount.abs() * _MAX_LOST_BITS).long()
            table = (values >> lost) << lost
        else:
            middle = torch.zeros_like(amount)
            if name == "contrast":
                middle = (_grey(images[index]).float().mean((1, 2, 3)) + 0.5).floor().view(-1, 1, 1)
            table = _mix(middle, values, 1 + amount * _MAX_BLEND).long()
        tables[index] = table.expand(-1, channels, -1)
    return tables.view(-1, 256).to(torch.uint8).gather(1, flat).view_as(images)


def _blend(images: Tensor, names: npt.NDArray[np.str_], strength: Floats) -> Tensor:
    """Away from, or towards, a plainer image: a grey one for color, a smooth one for sharpness."""
    grey = torch.from_numpy(names == "color").to(images.device).view(-1, 1, 1, 1)
    plain = torch.where(grey, _grey(images), _smooth(images))
    amount = torch.from_numpy(strength.astype(np.float32)).to(images.device).view(-1, 1, 1, 1)
    return _mix(plain, images, 1 + amount * _MAX_BLEND).to(torch.uint8)


def _mix(plain: Tensor, vivid: Tensor, factor: Tensor) -> Tensor:
    """plain + factor * (vivid - plain), clipped to a byte's range; float32."""
    base = plain.float()
    return (base + factor * (vivid.float() - base)).clamp(0, 255)


def _grey(images: Tensor) -> Tensor:
    """ITU-R 601-2 luma in Pillow's fixed-point arithmetic, (N, 1, H, W)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16).to(torch.uint8).unsqueeze(1)


def _smooth(images: Tensor) -> Tensor:
    """A 3 x 3 filter of ones around a 5, rounded; border pixels stay as they are."""
    height, width = images.shape[-2:]
    if height < 3 or width < 3:
        return images
    wide = images.int()
    total = 4 * wide[..., 1:-1, 1:-1]
    for top in range(3):
        for left in range(3):
            total = total + wide[..., top : top + height - 2, left : left + width - 2]
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)
    return smooth


def _histograms(flat: Tensor) -> Tensor:
    """Counts of the values of (N, C, pixels) int64 -> (N, C, 256) int64."""
    count, channels = flat.shape[:2]
    rows = torch.arange(count * channels, device=flat.device).view(count, channels, 1)
    counts = torch.bincount((flat + rows * 256).flatten(), minlength=count * channels * 256)
    return counts.view(count, channels, 256)


def _stretched(counts: Tensor) -> Tensor:
    """Tables that map the darkest value to 0 and the lightest to 255; a constant channel stays."""
    values = torch.arange(256, device=counts.device)
    used = counts > 0
    low = torch.where(used, values, 255).amin(-1, keepdim=True).double()
    high = torch.where(used, values, 0).amax(-1, keepdim=True).double()
    scale = 255 / (high - low).clamp_min(1)
    stretched = (values * scale - low * scale).clamp(0, 255).long()
    return torch.where(high > low, stretched, values)


def _equalized(counts: Tensor) -> Tensor:
    """Tables that make all values about as frequent, from the cumulative histogram."""
    values = torch.arange(256, device=counts.device)
    last = torch.where(counts > 0, values, 0).amax(-1, keepdim=True)
    step = (counts.sum(-1, keepdim=True) - counts.gather(-1, last)) // 255
    below = counts.cumsum(-1) - counts
    safe = step.clamp_min(1)
    return torch.where(step > 0, ((below + step // 2) // safe).clamp_max(255), values)
