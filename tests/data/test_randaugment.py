"""Every operation against Pillow, in which the paper's operations are defined."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from image_files import random_pixels
from PIL import Image, ImageEnhance, ImageOps

from dbtrain.data.randaugment import GEOMETRIC, LANES_PER_OPERATION, OPERATIONS, distort, rand_augment
from dbtrain.data_config import RandAugmentConfig

SIZE = 33


def pictures(channels: int) -> list[Image.Image]:
    """Noise, a gradient, a dark one, a constant one, and one with few values."""
    noise = random_pixels(1, SIZE, channels)[0]
    ramp = np.broadcast_to(np.linspace(20, 180, SIZE, dtype=np.uint8)[:, None], (SIZE, SIZE))
    ramp = np.stack([ramp, ramp.T, ramp // 2], -1) if channels == 3 else np.ascontiguousarray(ramp)
    few = (noise // 100 * 60 + 7).astype(np.uint8)
    return [Image.fromarray(a) for a in (noise, ramp, noise // 5, np.full_like(noise, 90), few)]


def to_tensor(picture: Image.Image) -> torch.Tensor:
    pixels = np.asarray(picture)
    return torch.from_numpy(pixels[None].copy() if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def affine(a: float, b: float, c: float, d: float, e: float, f: float) -> Callable[[Image.Image], Image.Image]:
    return lambda picture: picture.transform(
        picture.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.NEAREST
    )


def reference(name: str, strength: float) -> Callable[[Image.Image], Image.Image]:
    shift = strength * 150 / 331 * SIZE
    factor = 1 + 0.9 * strength
    return {
        "identity": lambda picture: picture,
        "rotate": lambda picture: picture.rotate(strength * 30),
        "shear_x": affine(1, strength * 0.3, 0, 0, 1, 0),
        "shear_y": affine(1, 0, 0, strength * 0.3, 1, 0),
        "translate_x": affine(1, 0, shift, 0, 1, 0),
        "translate_y": affine(1, 0, 0, 0, 1, shift),
        "auto_contrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
        "solarize": lambda picture: ImageOps.solarize(picture, math.ceil(255 * (1 - abs(strength)))),
        "posterize": lambda picture: ImageOps.posterize(picture, 8 - round(abs(strength) * 4)),
        "contrast": lambda picture: ImageEnhance.Contrast(picture).enhance(factor),
        "brightness": lambda picture: ImageEnhance.Brightness(picture).enhance(factor),
        "color": lambda picture: ImageEnhance.Color(picture).enhance(factor),
        "sharpness": lambda picture: ImageEnhance.Sharpness(picture).enhance(factor),
    }[name]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [-1.0, -0.3, 0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_pillows(name: str, strength: float, channels: int) -> None:
    sources = pictures(channels)
    batch = torch.stack([to_tensor(picture) for picture in sources])
    operation = np.full(len(sources), OPERATIONS.index(name))
    found = distort(batch, operation, np.full(len(sources), strength))
    expected = torch.stack([to_tensor(reference(name, strength)(picture)) for picture in sources])
    difference = (found.int() - expected.int()).abs()
    if name in GEOMETRIC:
        # Which side of a pixel's edge a point falls on is a matter of the last bit.
        assert (difference > 0).float().mean() < 0.02
    else:
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01


def test_samples_of_a_batch_get_their_own_operation() -> None:
    batch = torch.stack([to_tensor(pictures(3)[0])] * len(OPERATIONS))
    everything = np.arange(len(OPERATIONS))
    strength = np.full(len(OPERATIONS), 0.6)
    found = distort(batch, everything, strength)
    for index in everything:
        alone = distort(batch[index : index + 1], everything[index : index + 1], strength[:1])
        assert torch.equal(found[index], alone[0])
    assert len({image.numpy().tobytes() for image in found}) >= len(OPERATIONS) - 1


def test_there_are_the_papers_fourteen() -> None:
    assert len(OPERATIONS) == len(set(OPERATIONS)) == 14


def test_chance_picks_operations_in_a_row() -> None:
    policy = RandAugmentConfig(operations=2, magnitude=15)
    batch = torch.stack([to_tensor(pictures(3)[0])])
    first, second = OPERATIONS.index("brightness"), OPERATIONS.index("posterize")
    chance = np.array([[(first + 0.5) / 14, 0.9, (second + 0.5) / 14, 0.1]])
    assert chance.shape[1] == policy.operations * LANES_PER_OPERATION
    once = distort(batch, np.array([first]), np.array([0.5]))
    twice = distort(once, np.array([second]), np.array([-0.5]))
    assert torch.equal(rand_augment(batch, policy, chance), twice)


def test_tiny_images() -> None:
    batch = torch.randint(0, 256, (14, 1, 2, 2), dtype=torch.uint8)
    assert distort(batch, np.arange(14), np.full(14, 0.5)).shape == batch.shape
