from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import random_pixels

from dbtrain.data.transforms import EvalTransform, TrainTransform, flip, pad_crop, pad_crop_flip
from dbtrain.data_config import AugmentConfig, RandAugmentConfig

EVERYTHING = AugmentConfig(crop_padding=2, flip=True, randaugment=RandAugmentConfig())


def images(count: int, size: int = 8, channels: int = 3) -> torch.Tensor:
    pixels = random_pixels(count, size, channels)
    return torch.from_numpy(pixels.reshape(count, size, size, channels)).permute(0, 3, 1, 2).contiguous()


def test_normalise() -> None:
    batch = images(5)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    expected = (batch.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(
        3, 1, 1
    )
    found = EvalTransform(mean, std)({"image": batch})["image"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@settings(deadline=None)
@given(padding=st.integers(1, 5), size=st.integers(1, 9), data=st.data())
def test_pad_crop_shifts_and_fills_with_black(padding: int, size: int, data: st.DataObject) -> None:
    batch = images(4, size)
    chance = st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4)
    y, x = np.array(data.draw(chance)), np.array(data.draw(chance))
    found = pad_crop(batch, padding, y, x)
    padded = np.pad(batch.numpy(), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    for index in range(4):
        top, left = int(y[index] * (2 * padding + 1)), int(x[index] * (2 * padding + 1))
        assert np.array_equal(found[index], padded[index, :, top : top + size, left : left + size])


@given(padding=st.integers(1, 9), size=st.integers(1, 6), seed=st.integers(0, 1000))
def test_in_one_go_they_do_the_same(padding: int, size: int, seed: int) -> None:
    """Also where the padding is larger than the image, and nothing of it may be left."""
    generator = np.random.default_rng(seed)
    batch = torch.from_numpy(generator.integers(1, 256, (5, 2, size, size + 1), dtype=np.uint8))
    y, x, chosen = generator.random(5), generator.random(5), generator.random(5) < 0.5
    expected = flip(pad_crop(batch, padding, y, x), chosen)
    assert torch.equal(pad_crop_flip(batch, padding, y, x, chosen), expected)


def test_flip_mirrors_the_chosen() -> None:
    batch = images(3)
    found = flip(batch, np.array([True, False, True]))
    assert torch.equal(found[0], batch[0].flip(-1))
    assert torch.equal(found[1], batch[1])
    assert torch.equal(found[2], batch[2].flip(-1))


def test_a_sample_does_not_depend_on_the_batch_around_it() -> None:
    batch = images(60)
    positions = np.arange(1000, 1060)
    transform = TrainTransform(EVERYTHING, (0.5,) * 3, (0.25,) * 3, key=11)
    whole = transform({"image": batch}, positions)["image"]
    order = np.random.default_rng(0).permutation(60)
    split = np.array_split(order, 7)
    parts = torch.cat([transform({"image": batch[part]}, positions[part])["image"] for part in split])
    assert torch.equal(parts, whole[order])


def test_a_sample_does_not_depend_on_those_before_it() -> None:
    """Random numbers are made for 4,096 positions at a time, and remembered."""
    batch = images(60)
    one_for_all = TrainTransform(EVERYTHING, (0.5,) * 3, (0.25,) * 3, key=11)
    for first in (1000, 4096 - 25, 2 * 4096, 4096, 1000):
        positions = np.arange(first, first + 60)
        spread = np.append(positions, 100_000)  # in no one stretch
        alone = TrainTransform(EVERYTHING, (0.5,) * 3, (0.25,) * 3, key=11)
        expected = alone.distort(torch.cat([batch, batch[:1]]), spread)[:60]
        assert torch.equal(one_for_all.distort(batch, positions), expected)


def test_keys_and_positions_differ() -> None:
    batch = images(1).expand(50, -1, -1, -1)
    transform = TrainTransform(EVERYTHING, (0.5,) * 3, (0.25,) * 3, key=1)
    other = TrainTransform(EVERYTHING, (0.5,) * 3, (0.25,) * 3, key=2)
    first, later, other_key = (
        made({"image": batch}, np.arange(start, start + 50))["image"]
        for made, start in ((transform, 0), (transform, 50), (other, 0))
    )
    assert not torch.equal(first, later)
    assert not torch.equal(first, other_key)
    assert len({image.numpy().tobytes() for image in first}) > 40


def test_input_is_left_alone() -> None:
    batch = images(20)
    before = batch.clone()
    TrainTransform(EVERYTHING, (0.5,) * 3, (0.25,) * 3, key=1)({"image": batch}, np.arange(20))
    assert torch.equal(batch, before)


def test_nothing_asked_nothing_done() -> None:
    batch = images(20)
    assert torch.equal(TrainTransform(AugmentConfig(), (0,) * 3, (1,) * 3, 0).distort(batch, np.arange(20)), batch)


def test_turning_randaugment_on_leaves_crop_and_flip_alone() -> None:
    batch = images(200)
    plain = AugmentConfig(crop_padding=2, flip=True)
    nothing = plain.model_copy(update={"randaugment": RandAugmentConfig(operations=1, magnitude=0)})
    a = TrainTransform(plain, (0,) * 3, (1,) * 3, 5).distort(batch, np.arange(200))
    b = TrainTransform(nothing, (0,) * 3, (1,) * 3, 5).distort(batch, np.arange(200))
    # At magnitude 0 all but auto_contrast and equalize leave an image as it is.
    assert (a == b).flatten(1).all(1).float().mean() > 0.75


def test_crops_and_flips_are_uniform() -> None:
    ramp = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 1, 9).expand(9000, 1, 9, 9)
    transform = TrainTransform(AugmentConfig(crop_padding=4), (0,), (1,), 3)
    middle = transform.distort(ramp, np.arange(9000))[:, 0, 4, 4].long()
    counts = torch.bincount(middle, minlength=10)
    assert counts[1:].min() > 800
    flipped = TrainTransform(AugmentConfig(flip=True), (0,), (1,), 3).distort(ramp, np.arange(9000))
    assert 0.47 < (flipped[:, 0, 0, 0] == 9).float().mean() < 0.53


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_agrees_with_the_cpu() -> None:
    batch = images(300)
    transform = TrainTransform(EVERYTHING, (0.5,) * 3, (0.25,) * 3, key=1)
    here = transform.distort(batch, np.arange(300))
    there = transform.distort(batch.cuda(), np.arange(300)).cpu()
    assert (here != there).float().mean() < 1e-3
